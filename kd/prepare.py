"""From a configuration to ready parts, in two steps.

`make_plan` finds corpus, tokenizer and teacher and fixes the run's identity; it loads no weights and makes
no file. `build_parts` then makes or opens what training needs: tokenizer, packed blocks, teacher, student.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kd.cache import all_or_nothing
from kd.checkpoint import MODEL_FILE, load_weights
from kd.config import Config, EmbeddedTeacherConfig, HubTeacherConfig, LocalTeacherConfig, TrainingConfig
from kd.data import (
    BlockLoader,
    Corpus,
    PackedBlocks,
    bpe_fingerprint,
    bpe_tokenizer_directory,
    build_blocks,
    directory_tokenizer_fingerprint,
    eval_loader,
    load_tokenizer,
    num_token_ids,
    read_corpus,
    tokenizer_object_fingerprint,
    train_loader,
    vocabulary_difference,
)
from kd.distributed import seed_everything
from kd.embedded_teacher import embedded_teacher_fingerprint, load_embedded_teacher
from kd.errors import ConfigError, DataError
from kd.files import file_digest
from kd.model import StudentModel
from kd.runs import Fingerprints, RunIdentity, check_outputs, run_identity
from kd.student import find_checkpoint, run_record
from kd.teacher import LiveTeacher, PretrainedTeacher, check_teacher, check_vocabulary, find_teacher
from kd.trainers.stop import StopSignal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("kd")


@dataclass(frozen=True)
class TokenizerSource:
    """Where a tokenizer comes from. Without a location it is a BPE that is trained on the corpus."""

    fingerprint: str
    location: str | None = None
    """Directory or Hub id."""
    revision: str | None = None
    gguf_file: str | None = None


@dataclass(frozen=True)
class Plan:
    """A run that can be done: everything was found, nothing heavy is loaded."""

    config: Config
    device: torch.device
    corpus: Corpus
    tokenizer: TokenizerSource
    teacher: PretrainedTeacher | None
    """A pretrained teacher's files; None for the embedded one, for none, or where none is at hand (alpha 0)."""
    fingerprints: Fingerprints
    init_from: Path | None
    """Checkpoint that initialises the student."""
    identity: RunIdentity


@dataclass(frozen=True)
class Parts:
    """What a trainer takes."""

    student: StudentModel
    teacher: LiveTeacher | None
    tokenizer: "PreTrainedTokenizerFast"
    tokenizer_source: TokenizerSource
    """With its location filled in."""
    train_loader: BlockLoader
    val_loader: BlockLoader
    test_loader: BlockLoader | None


def make_plan(config: Config) -> Plan:
    """Find everything a run needs and fix its identity.

    Raises:
        KDError: of the kind that fits, if anything is missing or contradicts; nothing was made then.
    """
    check_outputs(config.name)
    device = resolve_device(config.device)
    teacher = _find_pretrained_teacher(config)
    init_from = None if config.init_from is None else find_checkpoint(Path(config.init_from))
    corpus = read_corpus(config.data)
    _check_blocks_fit(config, corpus)
    tokenizer = _find_tokenizer(config, teacher, corpus)
    fingerprints = Fingerprints(
        corpus=corpus.fingerprint,
        tokenizer=tokenizer.fingerprint,
        teacher=_teacher_fingerprint(config, teacher, corpus, tokenizer),
        init_from=None if init_from is None else file_digest(init_from / MODEL_FILE),
    )
    if init_from is not None:
        _check_same_tokenizer(init_from, tokenizer.fingerprint)
    identity = run_identity(config, fingerprints)
    return Plan(config, device, corpus, tokenizer, teacher, fingerprints, init_from, identity)


def build_parts(plan: Plan, stop: StopSignal) -> Parts:
    """Make or open what training needs; the student is initialised last, from the run's seed.

    Raises:
        KDError: of the kind that fits. What was newly cached for data that turn out too small is removed again.
    """
    config = plan.config
    with all_or_nothing():
        source = _place_tokenizer(plan)
        assert source.location is not None
        tokenizer = load_tokenizer(source.location, source.revision, source.gguf_file)
        _check_tokenizer_fits(config, tokenizer)
        blocks = build_blocks(plan.corpus, tokenizer, source.fingerprint, config.data.seq_len)
        loaders = _open_loaders(config, blocks)
    teacher = _load_teacher(plan, blocks, stop)
    if teacher is not None:
        batch = next(iter(loaders[1]))
        check_teacher(teacher, {name: x.to(plan.device) for name, x in batch.items()}, config.model.vocab_size)
    seed_everything(config.seed)
    student = StudentModel(config.model)
    if plan.init_from is not None:
        load_weights(plan.init_from, student)
    return Parts(student, teacher, tokenizer, source, *loaders)


def resolve_device(name: str) -> torch.device:
    """Return the device of a name; `auto` is the GPU where there is one, else the CPU.

    Raises:
        ConfigError: if a GPU is named that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name}, but {torch.cuda.device_count()} CUDA devices are visible: set device=cpu.")
    return device


# --- teacher -----------------------------------------------------------------------------------------------------


def _needs_teacher(config: Config) -> bool:
    return isinstance(config.train, TrainingConfig) and config.train.alpha > 0


def _find_pretrained_teacher(config: Config) -> PretrainedTeacher | None:
    if not isinstance(config.teacher, HubTeacherConfig | LocalTeacherConfig):
        return None
    wants_tokenizer = config.data.tokenizer == "teacher"
    if not isinstance(config.train, TrainingConfig) and not wants_tokenizer:
        return None
    try:
        teacher = find_teacher(config.teacher)
    except DataError as error:
        if _needs_teacher(config) or wants_tokenizer:
            raise
        log.warning("Training without a teacher (train.alpha=0); evaluations will not compare with one: %s", error)
        return None
    if isinstance(config.train, TrainingConfig):
        _check_teacher_fits(config, teacher)
    return teacher


def _check_teacher_fits(config: Config, teacher: PretrainedTeacher) -> None:
    check_vocabulary(teacher.vocab_size, config.model.vocab_size)
    if teacher.max_seq_len is not None and config.data.seq_len > teacher.max_seq_len:
        raise ConfigError(
            f"data.seq_len={config.data.seq_len} is longer than the teacher's {teacher.max_seq_len} positions: "
            f"set data.seq_len={teacher.max_seq_len} or less."
        )


def _teacher_fingerprint(
    config: Config, teacher: PretrainedTeacher | None, corpus: Corpus, tokenizer: TokenizerSource
) -> str | None:
    if not isinstance(config.train, TrainingConfig):
        return None
    if isinstance(config.teacher, EmbeddedTeacherConfig):
        return embedded_teacher_fingerprint(config.teacher, config.data, corpus.fingerprint, tokenizer.fingerprint)
    return None if teacher is None else teacher.fingerprint


def _load_teacher(plan: Plan, blocks: Path, stop: StopSignal) -> LiveTeacher | None:
    """The teacher, also at alpha 0, where evaluations compare with it; none for plain pre-training."""
    config, fingerprint = plan.config, plan.fingerprints.teacher
    if fingerprint is None:
        return None
    if isinstance(config.teacher, EmbeddedTeacherConfig):
        return load_embedded_teacher(config.teacher, fingerprint, blocks, plan.device, stop)
    assert plan.teacher is not None
    return plan.teacher.load(plan.device)


# --- tokenizer ---------------------------------------------------------------------------------------------------


def _find_tokenizer(config: Config, teacher: PretrainedTeacher | None, corpus: Corpus) -> TokenizerSource:
    name = config.data.tokenizer
    if name == "bpe" or (name == "teacher" and isinstance(config.teacher, EmbeddedTeacherConfig)):
        _check_bpe_teacher(teacher)
        return TokenizerSource(bpe_fingerprint(corpus, config.model.vocab_size))
    if name == "teacher":
        assert teacher is not None
        return _teacher_tokenizer(teacher)
    tokenizer = load_tokenizer(name)
    if teacher is not None:
        _check_same_vocabulary(tokenizer, teacher, name)
    return TokenizerSource(tokenizer_object_fingerprint(tokenizer), name)


def _teacher_tokenizer(teacher: PretrainedTeacher) -> TokenizerSource:
    if Path(teacher.model_id).is_dir():
        fingerprint = directory_tokenizer_fingerprint(Path(teacher.model_id), teacher.gguf_file)
    else:
        assert teacher.revision is not None
        fingerprint = teacher.revision
    return TokenizerSource(fingerprint, teacher.model_id, teacher.revision, teacher.gguf_file)


def _check_bpe_teacher(teacher: PretrainedTeacher | None) -> None:
    if teacher is not None:
        raise ConfigError(
            f"data.tokenizer=bpe with the teacher {teacher.model_id}: its logits are over its own vocabulary. "
            "Set data.tokenizer=teacher."
        )


def _check_same_vocabulary(tokenizer: "PreTrainedTokenizerFast", teacher: PretrainedTeacher, name: str) -> None:
    source = _teacher_tokenizer(teacher)
    assert source.location is not None
    difference = vocabulary_difference(tokenizer, load_tokenizer(source.location, source.revision, source.gguf_file))
    if difference is not None:
        raise ConfigError(
            f"data.tokenizer={name} is not the vocabulary that the teacher's logits are over: {difference} "
            "Set data.tokenizer=teacher."
        )


def _place_tokenizer(plan: Plan) -> TokenizerSource:
    if plan.tokenizer.location is not None:
        return plan.tokenizer
    directory = bpe_tokenizer_directory(plan.corpus, plan.config.model.vocab_size)
    return TokenizerSource(plan.tokenizer.fingerprint, str(directory))


def _check_tokenizer_fits(config: Config, tokenizer: "PreTrainedTokenizerFast") -> None:
    size = num_token_ids(tokenizer)
    if size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is less than the tokenizer's {size} tokens: "
            f"set model.vocab_size={size} or more."
        )


# --- data --------------------------------------------------------------------------------------------------------


def _check_blocks_fit(config: Config, corpus: Corpus) -> None:
    """Refuse a hopelessly short corpus before anything is made: a token is at least a byte."""
    for part in corpus.part_names:
        most = corpus.num_bytes(part) + corpus.num_documents(part)
        if most < config.data.seq_len + 1:
            raise DataError(
                f"The {part} part of {corpus.description} has {corpus.num_bytes(part)} bytes, too few for one block of "
                f"data.seq_len={config.data.seq_len}: give more text or set a smaller data.seq_len."
            )


def _open_loaders(config: Config, blocks: Path) -> tuple[BlockLoader, BlockLoader, BlockLoader | None]:
    size, workers = config.train.batch_size, config.data.num_workers
    limit = config.data.max_eval_blocks
    training = PackedBlocks(blocks, "train", config.data.max_train_blocks)
    test = None
    if config.data.test_ratio > 0:
        test = eval_loader(PackedBlocks(blocks, "test", limit), size, workers)
    return (
        train_loader(training, size, config.seed, workers),
        eval_loader(PackedBlocks(blocks, "validation", limit), size, workers),
        test,
    )


# --- initialisation from an earlier run --------------------------------------------------------------------------


def _check_same_tokenizer(init_from: Path, fingerprint: str) -> None:
    if run_record(init_from)["identity"]["tokenizer"] != fingerprint:
        raise ConfigError(
            f"init_from={init_from} was trained with another tokenizer, so its embeddings mean other tokens: "
            "use the same data.tokenizer."
        )
