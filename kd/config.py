"""The typed configuration and its checks. Values only: no torch, no files, no network.

Each class checks itself when it is made and raises `ConfigError` naming the key, the value and the
allowed range. Which class stands at `train`, `data` and `teacher` says which trainer, corpus and teacher
the run uses, so that no run carries another's knobs.
"""

import math
import re
from dataclasses import dataclass, field
from typing import ClassVar

from kd.errors import ConfigError

MISSING = "???"
"""OmegaConf's mark for a value that must be given."""

TEACHER_DTYPES = ("auto", "float32", "bfloat16", "float16")
TEACHER_CACHE = ("auto", "off", "require")
SMALLEST_BPE = 257
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{key}={value} is not allowed: {allowed}.")


def _require_positive(prefix: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value is None or value > 0, f"{prefix}.{name}", value, "it must be greater than 0")


def _require_finite(prefix: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(math.isfinite(value), f"{prefix}.{name}", value, "it must be a finite number")


@dataclass(frozen=True)
class ModelConfig:
    """The student's architecture (a Llama-style decoder)."""

    hidden_size: int = 512
    """Width."""
    num_layers: int = 12
    """Transformer blocks."""
    num_heads: int = 8
    """Attention heads."""
    num_kv_heads: int = 2
    """Key/value heads (grouped-query attention)."""
    intermediate_size: int = 2048
    """Hidden width of the SwiGLU."""
    vocab_size: int = 151936
    """Vocabulary; the teacher's."""
    max_seq_len: int = 512
    """Longest sequence, in tokens."""
    rope_theta: float = 1000000.0
    """Base of the rotary position embedding."""
    norm_eps: float = 1e-6
    """Epsilon of RMSNorm."""
    dropout: float = 0.0
    """Dropout rate, in [0, 1)."""

    def __post_init__(self) -> None:
        _require_finite("model", self, "rope_theta", "norm_eps", "dropout")
        _require_positive("model", self, "hidden_size", "num_layers", "num_heads", "num_kv_heads")
        _require_positive("model", self, "intermediate_size", "vocab_size", "max_seq_len", "rope_theta", "norm_eps")
        _require(0 <= self.dropout < 1, "model.dropout", self.dropout, "it must be in [0, 1)")
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} is not divisible by model.num_heads={self.num_heads}: "
                "each head takes an equal share of the width."
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_heads={self.num_heads} is not divisible by model.num_kv_heads={self.num_kv_heads}: "
                "each key/value head serves an equal group of heads."
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} / model.num_heads={self.num_heads} gives heads of odd size "
                f"{self.head_dim}: rotary positions turn pairs, so it must be even."
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


@dataclass
class TrainerConfig:
    """What every trainer needs; each trainer's own configuration derives from it."""

    trainer: ClassVar[str] = ""
    """Name of the trainer that takes this configuration."""

    batch_size: int = 8
    """Sequences per micro-batch."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; norm weights have none."""
    warmup_steps: int = 500
    """Linear warm-up, in optimizer steps."""
    num_epochs: int = 3
    """Passes over the training blocks."""
    gradient_clip: float = 1.0
    """Largest global norm of the gradient."""
    checkpoint_dir: str = "checkpoints/"
    """Relative to the run's directory."""
    log_interval: int = 50
    """Optimizer steps between log lines."""
    eval_interval: int = 500
    """Optimizer steps between evaluations."""
    save_interval: int = 1000
    """Optimizer steps between checkpoints."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, if that is sooner than num_epochs; null: no limit."""
    eval_blocks: int | None = None
    """Validation blocks of the evaluations on the way (the last one takes all); null: all."""
    compile: bool = False
    """Let torch compile the student's body: slower to start, and results differ by rounding."""

    def __post_init__(self) -> None:
        _require_finite("train", self, "learning_rate", "weight_decay", "gradient_clip")
        _require_positive("train", self, "batch_size", "learning_rate", "num_epochs", "gradient_clip")
        _require_positive("train", self, "log_interval", "eval_interval", "save_interval")
        _require_positive("train", self, "gradient_accumulation_steps", "max_steps", "eval_blocks")
        for name in ("weight_decay", "warmup_steps"):
            value = getattr(self, name)
            _require(value >= 0, f"train.{name}", value, "it must be 0 or more")
        parts = self.checkpoint_dir.replace("\\", "/").split("/")
        _require(
            bool(self.checkpoint_dir) and not self.checkpoint_dir.startswith("/") and ".." not in parts,
            "train.checkpoint_dir",
            self.checkpoint_dir,
            "it must be a folder inside the run's directory, like checkpoints/",
        )


@dataclass
class PretrainConfig(TrainerConfig):
    """Plain next-token training: cross-entropy on all tokens."""

    trainer: ClassVar[str] = "pretrain"


@dataclass
class TrainingConfig(TrainerConfig):
    """Distillation: alpha * T^2 * KL(teacher/T || student/T) + (1 - alpha) * cross-entropy."""

    trainer: ClassVar[str] = "distillation"

    alpha: float = 0.5
    """Weight of the distillation term, in [0, 1]; 0 is plain cross-entropy."""
    temperature: float = 2.0
    """Distillation temperature, > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # From Python, 4 and 4.0 must be one run.
        self.alpha, self.temperature = float(self.alpha), float(self.temperature)
        _require(0 <= self.alpha <= 1, "train.alpha", self.alpha, "it must be in [0, 1]")
        _require(
            math.isfinite(self.temperature) and self.temperature > 0,
            "train.temperature",
            self.temperature,
            "it must be a finite number greater than 0",
        )


@dataclass
class DataConfig:
    """What every corpus needs: tokenizer, block length, split."""

    tokenizer: str = "teacher"
    """`teacher`: the teacher's own; `bpe`: byte-level BPE of model.vocab_size tokens, trained on the training part, as
    the embedded teacher's is; else a path or Hub id."""
    seq_len: int = 512
    """Inputs (and targets) per block, in tokens."""
    sample_size: int | None = 50_000_000
    """About how many bytes of text to take, whole documents drawn at random; null: all."""
    val_ratio: float = 0.1
    """Share of documents for validation."""
    test_ratio: float = 0.0
    """Share of documents for the test part, scored once, at the end."""
    max_train_blocks: int | None = None
    """Train on this many blocks, spread evenly over the training part; null: all."""
    max_eval_blocks: int | None = None
    """Validate, and test, on this many blocks, spread evenly over their parts; null: all."""
    num_workers: int = 0
    """Processes that load batches; 0: the training process itself."""

    def __post_init__(self) -> None:
        _require(bool(self.tokenizer), "data.tokenizer", "''", "use teacher, bpe, a path or a Hub id")
        _require_positive("data", self, "seq_len", "sample_size", "max_train_blocks", "max_eval_blocks")
        _require(self.num_workers >= 0, "data.num_workers", self.num_workers, "it must be 0 or more")
        _require(0 < self.val_ratio < 1, "data.val_ratio", self.val_ratio, "it must be in (0, 1)")
        _require(0 <= self.test_ratio < 1, "data.test_ratio", self.test_ratio, "it must be in [0, 1)")
        if self.val_ratio + self.test_ratio >= 1:
            raise ConfigError(
                f"data.val_ratio={self.val_ratio} and data.test_ratio={self.test_ratio} leave nothing to train on: "
                "their sum must be below 1."
            )


@dataclass
class StdlibDataConfig(DataConfig):
    """The embedded corpus: the source text of the running Python's standard library, split by top-level module."""


@dataclass
class TextDataConfig(DataConfig):
    """Local files: .txt, .md, .py (a document each), .jsonl and .parquet (a document a row)."""

    path: str = MISSING
    """A file, a folder (searched through) or a glob pattern."""
    text_column: str = "text"
    """Column of .jsonl and .parquet rows that holds the text."""
    document_separator: str | None = None
    """Cut .txt, .md and .py files into documents at this string; null: a file is a document."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(bool(self.path), "data.path", "''", "give a file, a folder or a glob pattern")
        _require(self.document_separator != "", "data.document_separator", "''", "give a string, or null")


@dataclass
class HubDataConfig(DataConfig):
    """A data set of the Hugging Face Hub, or a local directory in the same format."""

    path: str = MISSING
    """Hub id or local directory, as for `datasets.load_dataset`."""
    name: str | None = None
    """Configuration of the data set."""
    revision: str | None = None
    """Branch, tag or commit; null: the default branch."""
    split: str = "train"
    """Split whose documents are taken (and split again by `val_ratio`)."""
    text_column: str = "text"
    """Column that holds the text."""


@dataclass
class TeacherConfig:
    """No teacher."""


@dataclass
class PresentTeacherConfig(TeacherConfig):
    """What every teacher has."""

    cache: str = "auto"
    """Whether to keep the teacher's hidden states on disk. auto: if a run visits as many blocks as that takes, or if
    they are there already; off: no; require: yes, also for a shorter run."""

    def __post_init__(self) -> None:
        _require(self.cache in TEACHER_CACHE, "teacher.cache", self.cache, f"use one of {', '.join(TEACHER_CACHE)}")


@dataclass
class EmbeddedTeacherConfig(PresentTeacherConfig):
    """A model of the student's family, trained once on the training part and cached."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The teacher's architecture."""
    train: PretrainConfig = field(default_factory=PretrainConfig)
    """How the teacher is trained."""
    seed: int = 0
    """Seed of the teacher's training."""


@dataclass
class HubTeacherConfig(PresentTeacherConfig):
    """A causal language model of the Hugging Face Hub, or a local directory in the same format."""

    model_id: str = MISSING
    """Hub id or local directory, as for `from_pretrained`."""
    revision: str | None = None
    """Branch, tag or commit; null: the default branch."""
    dtype: str = "float16"
    """float32, bfloat16, float16, or auto: bfloat16 on a GPU that has it, else float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.dtype in TEACHER_DTYPES, "teacher.dtype", self.dtype, f"use one of {', '.join(TEACHER_DTYPES)}")


@dataclass
class LocalTeacherConfig(PresentTeacherConfig):
    """A causal language model in a local directory, in Hugging Face's format or as a GGUF file."""

    path: str = MISSING
    """The directory."""
    gguf_file: str | None = None
    """Name of a GGUF file in that directory; null: Hugging Face's format."""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto: bfloat16 on a GPU that has it, else float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.dtype in TEACHER_DTYPES, "teacher.dtype", self.dtype, f"use one of {', '.join(TEACHER_DTYPES)}")


@dataclass
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainerConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=HubDataConfig)
    teacher: TeacherConfig = field(default_factory=HubTeacherConfig)
    name: str = "default"
    """Of the experiment: runs go to outputs/<name>/."""
    seed: int = 0
    """Of initialisation, data order and dropout."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    threads: int | None = None
    """CPU threads; null: as torch chooses."""
    init_from: str | None = None
    """A run's directory whose last checkpoint initialises the student; null: from scratch."""
    overwrite: bool = False
    """Do a finished run again."""
    tracker: str = "none"
    """Experiment tracker."""

    def __post_init__(self) -> None:
        allowed = "use letters, digits, '.', '-' and '_' (100 at most, a letter or digit first)"
        _require(NAME_PATTERN.fullmatch(self.name) is not None, "name", repr(self.name), allowed)
        _require(0 <= self.seed < 2**32, "seed", self.seed, "it must be in [0, 2^32)")
        _require(self.threads is None or self.threads > 0, "threads", self.threads, "it must be greater than 0")
        device_ok = re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None
        _require(device_ok, "device", self.device, "use auto, cpu, cuda or cuda:N")
        _require(self.tracker == "none", "tracker", self.tracker, "only none is supported")
        if self.data.seq_len > self.model.max_seq_len:
            raise ConfigError(
                f"data.seq_len={self.data.seq_len} is longer than model.max_seq_len={self.model.max_seq_len}: "
                f"set model.max_seq_len={self.data.seq_len} or shorten the blocks."
            )
        self._check_teacher()

    def _check_teacher(self) -> None:
        without_teacher = type(self.teacher) is TeacherConfig
        if isinstance(self.train, TrainingConfig) and self.train.alpha > 0 and without_teacher:
            raise ConfigError(
                f"teacher=none with train.alpha={self.train.alpha}: distillation needs a teacher. "
                "Set train.alpha=0, or choose a teacher."
            )
        if self.data.tokenizer == "teacher" and without_teacher:
            raise ConfigError(
                "data.tokenizer=teacher with teacher=none: there is no teacher whose tokenizer could be used. "
                "Set data.tokenizer=bpe, or to a path or Hub id."
            )
        teacher = self.teacher
        trains_bpe = self.data.tokenizer == "bpe" or isinstance(teacher, EmbeddedTeacherConfig)
        if trains_bpe and self.model.vocab_size < SMALLEST_BPE:
            raise ConfigError(
                f"model.vocab_size={self.model.vocab_size} is too small for a byte-level BPE, which needs the 256 "
                f"bytes and an end-of-text token: set model.vocab_size={SMALLEST_BPE} or more."
            )
        if not isinstance(teacher, EmbeddedTeacherConfig):
            return
        if self.data.tokenizer not in ("teacher", "bpe"):
            raise ConfigError(
                f"data.tokenizer={self.data.tokenizer} with teacher=embedded: that teacher is trained with a "
                "BPE of its own. Set data.tokenizer=teacher."
            )
        if teacher.model.vocab_size != self.model.vocab_size:
            raise ConfigError(
                f"teacher.model.vocab_size={teacher.model.vocab_size}, but model.vocab_size={self.model.vocab_size}: "
                "their logits are compared column by column, so set both to the same."
            )
        if self.data.seq_len > teacher.model.max_seq_len:
            raise ConfigError(
                f"data.seq_len={self.data.seq_len} is longer than teacher.model.max_seq_len="
                f"{teacher.model.max_seq_len}: set teacher.model.max_seq_len={self.data.seq_len}."
            )
