"""What a run needs and what it will be called: corpus, tokenizer and teacher are found, nothing is loaded or made.

No torch here, so that a refusal, or the skip of a finished run, comes at once.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kd.checkpoint_files import MODEL_FILE, find_checkpoint, run_record
from kd.config import (
    Config,
    DataConfig,
    EmbeddedTeacherConfig,
    HubTeacherConfig,
    LocalTeacherConfig,
    TrainingConfig,
)
from kd.data import (
    Corpus,
    bpe_fingerprint,
    directory_tokenizer_fingerprint,
    load_tokenizer,
    read_corpus,
    tokenizer_object_fingerprint,
    vocabulary_difference,
)
from kd.errors import ConfigError, DataError
from kd.files import digest_of, file_digest
from kd.runs import Fingerprints, RunIdentity, check_outputs, run_identity
from kd.teacher_files import PretrainedTeacher, check_vocabulary, find_teacher
from kd.torchrun import num_processes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("kd")

EMBEDDED_TEACHER_FORMAT = 1


@dataclass(frozen=True)
class TokenizerSource:
    """Where a tokenizer comes from. Without a location it is a BPE that is trained on the corpus."""

    fingerprint: str
    location: str | None = None
    """Directory or Hub id."""
    revision: str | None = None
    gguf_file: str | None = None

    def load(self) -> "PreTrainedTokenizerFast":
        """Load the tokenizer; it must have a location.

        Raises:
            DataError: if it is not there or cannot be read.
        """
        assert self.location is not None
        return load_tokenizer(self.location, self.revision, self.gguf_file)


@dataclass(frozen=True)
class Plan:
    """A run that can be done: everything was found, nothing heavy is loaded."""

    config: Config
    corpus: Corpus
    tokenizer: TokenizerSource
    teacher: PretrainedTeacher | None
    """A pretrained teacher's files; None for the embedded one, for none, or where none is at hand (alpha 0)."""
    fingerprints: Fingerprints
    init_from: Path | None
    """Checkpoint that initialises the student."""
    identity: RunIdentity


def make_plan(config: Config) -> Plan:
    """Find everything a run needs and fix its identity.

    Raises:
        KDError: of the kind that fits, if anything is missing or contradicts; nothing was made then.
    """
    check_outputs(config.name)
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
    identity = run_identity(config, fingerprints, num_processes())
    return Plan(config, corpus, tokenizer, teacher, fingerprints, init_from, identity)


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


def embedded_teacher_fingerprint(config: EmbeddedTeacherConfig, data: DataConfig, corpus: str, tokenizer: str) -> str:
    """Return the hash of all that determines the embedded teacher's weights: its recipe, known before it is trained."""
    recipe = asdict(config) | {"train": config.train.identity()}
    del recipe["cache"]
    content = {"recipe": recipe, "seq_len": data.seq_len, "corpus": corpus, "tokenizer": tokenizer}
    return digest_of({"format": EMBEDDED_TEACHER_FORMAT} | content)


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
    difference = vocabulary_difference(tokenizer, _teacher_tokenizer(teacher).load())
    if difference is not None:
        raise ConfigError(
            f"data.tokenizer={name} is not the vocabulary that the teacher's logits are over: {difference} "
            "Set data.tokenizer=teacher."
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


# --- initialisation from an earlier run --------------------------------------------------------------------------


def _check_same_tokenizer(init_from: Path, fingerprint: str) -> None:
    if run_record(init_from)["identity"]["tokenizer"] != fingerprint:
        raise ConfigError(
            f"init_from={init_from} was trained with another tokenizer, so its embeddings mean other tokens: "
            "use the same data.tokenizer."
        )
