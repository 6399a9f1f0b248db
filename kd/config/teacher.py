"""Whom to learn from."""

from dataclasses import dataclass, field

from kd.config.checks import require
from kd.config.data import MISSING
from kd.config.model import ModelConfig
from kd.config.train import PretrainConfig

TEACHER_DTYPES = ("auto", "float32", "bfloat16", "float16")
TEACHER_CACHE = ("auto", "off", "require")


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
        require(self.cache in TEACHER_CACHE, "teacher.cache", self.cache, f"use one of {', '.join(TEACHER_CACHE)}")


@dataclass
class EmbeddedTeacherConfig(PresentTeacherConfig):
    """A model of the student's family, trained once on the training part and cached."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The teacher's architecture."""
    train: PretrainConfig = field(default_factory=PretrainConfig)
    """How the teacher is trained."""
    seed: int = 0
    """Seed of the teacher's training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.train.require_checkpoints_inside("teacher.train")


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
        require(self.dtype in TEACHER_DTYPES, "teacher.dtype", self.dtype, f"use one of {', '.join(TEACHER_DTYPES)}")


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
        require(self.dtype in TEACHER_DTYPES, "teacher.dtype", self.dtype, f"use one of {', '.join(TEACHER_DTYPES)}")
