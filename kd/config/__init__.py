"""The typed configuration and its checks. Values only: no torch, no files, no network.

Each class checks itself when it is made and raises `ConfigError` naming the key, the value and the
allowed range. Which class stands at `train`, `data` and `teacher` says which trainer, corpus and teacher
the run uses, so that no run carries another's knobs.
"""

from kd.config.data import MISSING, CorpusConfig, DataConfig, HubDataConfig, StdlibDataConfig, TextDataConfig
from kd.config.examples import (
    ArithmeticDataConfig,
    ExampleConfig,
    ExampleFilesConfig,
    InstructionsDataConfig,
    PreferencesDataConfig,
)
from kd.config.model import ModelConfig
from kd.config.root import NAME_PATTERN, Config
from kd.config.teacher import (
    EmbeddedTeacherConfig,
    HubTeacherConfig,
    LocalTeacherConfig,
    PresentTeacherConfig,
    TeacherConfig,
)
from kd.config.train import (
    DPOConfig,
    GRPOConfig,
    ORPOConfig,
    PretrainConfig,
    SFTConfig,
    TrainerConfig,
    TrainingConfig,
)

__all__ = [
    "ArithmeticDataConfig",
    "Config",
    "CorpusConfig",
    "DPOConfig",
    "DataConfig",
    "EmbeddedTeacherConfig",
    "ExampleConfig",
    "ExampleFilesConfig",
    "GRPOConfig",
    "HubDataConfig",
    "HubTeacherConfig",
    "InstructionsDataConfig",
    "LocalTeacherConfig",
    "MISSING",
    "ModelConfig",
    "NAME_PATTERN",
    "ORPOConfig",
    "PreferencesDataConfig",
    "PresentTeacherConfig",
    "PretrainConfig",
    "SFTConfig",
    "StdlibDataConfig",
    "TeacherConfig",
    "TextDataConfig",
    "TrainerConfig",
    "TrainingConfig",
]
