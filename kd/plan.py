"""What a run needs and what it will be called: corpus, tokenizer and teacher are found, nothing is loaded or made.

No torch here, so that a refusal, or the skip of a finished run, comes at once.
"""

import logging
from dataclasses import asdict, dataclass

from kd.checkpoint_files import MODEL_FILE
from kd.config import (
    Config,
    CorpusConfig,
    EmbeddedTeacherConfig,
    ExampleConfig,
    ExampleFilesConfig,
    GRPOConfig,
    HubTeacherConfig,
    LocalTeacherConfig,
    SFTConfig,
    TrainerConfig,
    TrainingConfig,
)
from kd.data import (
    ChatExample,
    Corpus,
    Example,
    ExampleSet,
    TokenizerSource,
    answer_set,
    chat_template_fingerprint,
    preference_set,
    prompt_set,
    read_corpus,
)
from kd.errors import ConfigError, DataError
from kd.extras import require_extra
from kd.files import digest_of, file_digest
from kd.rewards import ANSWER_CHECKS
from kd.runs import Fingerprints, RunIdentity, check_outputs, run_identity
from kd.start import Start, find_start
from kd.teacher_files import PretrainedTeacher, check_vocabulary, find_teacher
from kd.tokenizer_choice import find_tokenizer
from kd.torchrun import num_processes

log = logging.getLogger("kd")

EMBEDDED_TEACHER_FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """A run that can be done: everything was found, nothing heavy is loaded."""

    config: Config
    data: Corpus | ExampleSet[Example]
    """What is learned from; packed into blocks, or encoded, later."""
    tokenizer: TokenizerSource
    teacher: PretrainedTeacher | None
    """A pretrained teacher's files; None for the embedded one, for none, or where none is at hand (alpha 0)."""
    fingerprints: Fingerprints
    start: Start | None
    """What initialises the student; None: its seed."""
    identity: RunIdentity


def make_plan(config: Config) -> Plan:
    """Find everything a run needs and fix its identity.

    Raises:
        KDError: of the kind that fits, if anything is missing or contradicts; nothing was made then.
    """
    check_outputs(config.name)
    check_extras(config)
    _warn_of_frozen_weights(config)
    teacher = _find_pretrained_teacher(config)
    start = None if config.init_from is None else find_start(config.init_from, config.model)
    data = _read_data(config)
    tokenizer = find_tokenizer(config, data, teacher, start)
    fingerprints = Fingerprints(
        corpus=data.fingerprint,
        tokenizer=_tokenizer_fingerprint(config, data, tokenizer),
        teacher=_teacher_fingerprint(config, teacher, data.fingerprint, tokenizer.fingerprint),
        init_from=None if start is None else file_digest(start.checkpoint / MODEL_FILE),
    )
    identity = run_identity(config, fingerprints, num_processes())
    return Plan(config, data, tokenizer, teacher, fingerprints, start, identity)


def check_strategy(config: TrainerConfig, *, alone: bool) -> None:
    """Raise ConfigError, with the ways to start several, if a process that is alone is to share its weights."""
    if config.strategy == "fsdp" and alone:
        raise ConfigError(
            "train.strategy=fsdp shares weights among processes, and this is one alone: start several with torchrun "
            "--nproc-per-node=N -m kd.train (in a sweep: hydra.launcher.tasks_per_node=N, with hydra/launcher=submitit "
            "or slurm), or leave train.strategy out."
        )


def check_extras(config: Config) -> None:
    """Raise ConfigError, with the command that installs it, if a package is missing that a setting needs."""
    require_extra("adapter=lora", config.adapter.extra)
    require_extra("quantization", config.quantization.extra)


def _warn_of_frozen_weights(config: Config) -> None:
    if config.adapter.extra is not None and config.init_from is None:
        log.warning("adapter=lora without init_from: the weights that the adapters stand beside are random, and frozen")


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
    assert isinstance(config.data, CorpusConfig)
    if teacher.max_seq_len is not None and config.data.seq_len > teacher.max_seq_len:
        raise ConfigError(
            f"data.seq_len={config.data.seq_len} is longer than the teacher's {teacher.max_seq_len} positions: "
            f"set data.seq_len={teacher.max_seq_len} or less."
        )


def _teacher_fingerprint(config: Config, teacher: PretrainedTeacher | None, corpus: str, tokenizer: str) -> str | None:
    if not isinstance(config.train, TrainingConfig):
        return None
    if isinstance(config.teacher, EmbeddedTeacherConfig):
        assert isinstance(config.data, CorpusConfig)
        return embedded_teacher_fingerprint(config.teacher, config.data, corpus, tokenizer)
    return None if teacher is None else teacher.fingerprint


def embedded_teacher_fingerprint(config: EmbeddedTeacherConfig, data: CorpusConfig, corpus: str, tokenizer: str) -> str:
    """Return the hash of the embedded teacher's recipe, by which runs name it, since it is known before it is trained.

    Another machine or library makes other weights of one recipe. So what is made with them is kept by their own digest,
    and each run records it and goes on with no other (`kd.embedded_teacher`, `kd.attempt`).
    """
    recipe = asdict(config) | {"train": config.train.identity()}
    del recipe["cache"]
    content = {"recipe": recipe, "seq_len": data.seq_len, "corpus": corpus, "tokenizer": tokenizer}
    return digest_of({"format": EMBEDDED_TEACHER_FORMAT} | content)


# --- data --------------------------------------------------------------------------------------------------------


def _read_data(config: Config) -> Corpus | ExampleSet[Example]:
    if isinstance(config.data, ExampleConfig):
        return _example_set(config.data, config)
    assert isinstance(config.data, CorpusConfig)
    corpus = read_corpus(config.data)
    _check_blocks_fit(corpus, config.data.seq_len)
    return corpus


def _example_set(data: ExampleConfig, config: Config) -> ExampleSet[Example]:
    """The examples in the form that the trainer needs."""
    if isinstance(config.train, SFTConfig):
        return answer_set(data)
    if isinstance(config.train, GRPOConfig):
        return prompt_set(data, ANSWER_CHECKS.get(config.train.reward))
    return preference_set(data)


def _tokenizer_fingerprint(config: Config, data: Corpus | ExampleSet[Example], tokenizer: TokenizerSource) -> str:
    """The tokenizer's fingerprint; with that of what renders chats where there are any, which only files can hold."""
    if isinstance(data, Corpus) or not isinstance(config.data, ExampleFilesConfig):
        return tokenizer.fingerprint
    if not any(isinstance(example, ChatExample) for part in data.parts.values() for example in part):
        return tokenizer.fingerprint
    return digest_of({"tokenizer": tokenizer.fingerprint, "chats": chat_template_fingerprint(tokenizer.load())})


def _check_blocks_fit(corpus: Corpus, seq_len: int) -> None:
    """Refuse a hopelessly short corpus before anything is made: a token is at least a byte."""
    for part in corpus.part_names:
        most = corpus.num_bytes(part) + corpus.num_documents(part)
        if most < seq_len + 1:
            raise DataError(
                f"The {part} part of {corpus.description} has {corpus.num_bytes(part)} bytes, too few for one block of "
                f"data.seq_len={seq_len}: give more text or set a smaller data.seq_len."
            )
