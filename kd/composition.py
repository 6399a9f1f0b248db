"""From Hydra's composed values to the typed `Config`, and from Hydra's errors to ours.

Only the entry points use this; nothing below them knows Hydra or OmegaConf.
"""

import dataclasses
import difflib
import re
import shlex
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from kd.config import (
    MISSING,
    AdapterConfig,
    ArithmeticDataConfig,
    Config,
    DPOConfig,
    EmbeddedTeacherConfig,
    ExampleFilesConfig,
    GRPOConfig,
    HubDataConfig,
    HubTeacherConfig,
    InstructionsDataConfig,
    IntegerConfig,
    LocalTeacherConfig,
    LoRAConfig,
    ORPOConfig,
    PreferencesDataConfig,
    PretrainConfig,
    QuantizationConfig,
    SFTConfig,
    StdlibDataConfig,
    TeacherConfig,
    TextDataConfig,
    TrainingConfig,
)
from kd.errors import ConfigError, KDError

SCHEMAS: dict[str, type] = {
    "config": Config,
    "train_distillation": TrainingConfig,
    "train_pretrain": PretrainConfig,
    "train_sft": SFTConfig,
    "train_dpo": DPOConfig,
    "train_orpo": ORPOConfig,
    "train_grpo": GRPOConfig,
    "data_stdlib": StdlibDataConfig,
    "data_text": TextDataConfig,
    "data_hub": HubDataConfig,
    "data_instructions": InstructionsDataConfig,
    "data_preferences": PreferencesDataConfig,
    "data_arithmetic": ArithmeticDataConfig,
    "data_examples": ExampleFilesConfig,
    "teacher_none": TeacherConfig,
    "teacher_embedded": EmbeddedTeacherConfig,
    "teacher_hub": HubTeacherConfig,
    "teacher_local": LocalTeacherConfig,
    "adapter_none": AdapterConfig,
    "adapter_lora": LoRAConfig,
    "quantization_none": QuantizationConfig,
    "quantization_integer": IntegerConfig,
}
"""Name under which a YAML file in conf/ lists its class (`/schema/<name>@_here_`)."""

CONFIG_NAME = "config"
"""The file in conf/ that lists everything else."""
SWEEPER = "hydra_plugins.kd.GridSweeper"
"""What Hydra calls our sweeper: it takes plugins by a name under `hydra_plugins` only."""

NOT_AN_OPTION = "Config group override must be a string"
"""How Hydra begins its plain ValueError for `teacher=null` or `model=7`."""


LAUNCHERS = "hydra/launcher/"


@dataclasses.dataclass
class SweeperConfig:
    """What `hydra.sweeper` holds: the class of `kd.sweeper`, and the values by key that files of `sweep/` give."""

    _target_: str = SWEEPER
    params: dict[str, str] = dataclasses.field(default_factory=dict)


def conf_dir() -> str:
    """Return the absolute path of `conf/`: the checkout's, or the copy inside an installed wheel."""
    package = Path(__file__).resolve().parent
    for candidate in (package.parent / "conf", package / "conf"):
        if (candidate / "config.yaml").is_file():
            return str(candidate)
    raise ConfigError(f"conf/config.yaml is neither beside nor inside {package}: install the package again.")


def register_schemas() -> None:
    """Make the dataclasses known to Hydra, so that composition refuses unknown keys and wrong types."""
    store = ConfigStore.instance()
    for name, cls in SCHEMAS.items():
        node = OmegaConf.structured(cls)
        _make_writable(node)
        if cls is Config:
            # Their class comes from the chosen group option; a default instance would forbid its siblings.
            for group in ("train", "data", "teacher", "adapter", "quantization"):
                node[group] = MISSING
        store.store(group="schema", name=name, node=node, package="_global_" if cls is Config else "_group_")
    store.store(group="hydra/sweeper", name="kd", node=SweeperConfig, provider="kd")
    # Hydra deep-copies its store some 90 times to print --help, half of that command's time; yet what it takes out
    # of the store, it copies again.
    store.repo = _SharedDict(store.repo)


class _SharedDict(dict[str, Any]):
    """A dict whose deep copy is itself."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_SharedDict":
        return self


def _make_writable(node: DictConfig) -> None:
    # OmegaConf marks frozen dataclasses read-only, also for the YAML files and overrides that fill them.
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _make_writable(child)


def to_config(values: DictConfig) -> Config:
    """Return composed values as a checked `Config`.

    Raises:
        ConfigError: for a key that no class has (also one appended with `+`), a value that must be given
            and was not, or a value outside its range.
    """
    _refuse_unknown_keys(values, "")
    try:
        config = OmegaConf.to_object(values)
    except MissingMandatoryValue as error:
        key = error.full_key
        raise ConfigError(f"{key} must be given and was not: add {key}=... to the command.") from error
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{key}{str(error).splitlines()[0]}") from error
    assert isinstance(config, Config)
    return config


def _refuse_unknown_keys(node: DictConfig, prefix: str) -> None:
    cls = OmegaConf.get_type(node)
    assert cls is not None
    assert dataclasses.is_dataclass(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    for key in map(str, node):
        if key not in known:
            raise ConfigError(_unknown_key(f"{prefix}{key}", known, prefix))
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_missing():
            _refuse_unknown_keys(child, f"{prefix}{key}.")


def _unknown_key(key: str, known: list[str], prefix: str) -> str:
    near = difflib.get_close_matches(key.rpartition(".")[2], known, n=1)
    hint = f"Did you mean {prefix}{near[0]}?" if near else f"Known there: {', '.join(known)}."
    return f"{key} is not a known key. {hint}"


def explain(error: Exception) -> KDError | None:
    """Return an error of composition as one of ours, or None if it is none (a fault of the code)."""
    if isinstance(error, KDError):
        return error
    if isinstance(error, HydraException | OmegaConfBaseException):
        return ConfigError(_explain_composition(error))
    if isinstance(error.__cause__, OmegaConfBaseException):
        return ConfigError(_explain_composition(error))
    if isinstance(error, ValueError) and str(error).startswith(NOT_AN_OPTION):
        return ConfigError(f"{error}. A group takes the name of an option, like teacher=none; see --help.")
    return None


def _explain_composition(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        key = str(cause.full_key)
        cls = cause.object_type if isinstance(cause.object_type, type) else None
        known = [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
        return _unknown_key(key, known, key.rpartition(".")[0] + "." if "." in key else "")
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        return f"{cause.full_key}: {str(cause).splitlines()[0]}. See python -m kd.train --cfg job for the values."
    if isinstance(error, OverrideParseException) and "=" in error.override:
        return _unreadable_value(*error.override.split("=", maxsplit=1))
    lines = [line for line in str(error).splitlines() if line.strip() and "provider=" not in line]
    text = " ".join(line.strip() for line in lines if "search path" not in line)
    if LAUNCHERS in text:
        return f"{text} joblib needs pip install 'kd-train[sweep]'; submitit and slurm need 'kd-train[slurm]'."
    return f"{text} (python -m kd.train --help lists groups and keys)"


def _unreadable_value(key: str, value: str) -> str:
    # In Hydra's quotes, backslashes are doubled only before a quote.
    escaped = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + found[2].replace('"', '\\"'), value)
    quoted = shlex.quote(f'{key}="{escaped}"')
    return f"{key}={value} cannot be read as it stands. Quote the value, for Hydra and for the shell: {quoted}"
