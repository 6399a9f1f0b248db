"""From Hydra's composed values to the typed `Config`, and from Hydra's errors to ours.

Only the entry points use this; nothing below them knows Hydra or OmegaConf.
"""

import dataclasses
import difflib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, OverrideParseException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

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
    ModelConfig,
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

SHAPE = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "intermediate_size",
    "vocab_size",
    "max_seq_len",
    "rope_theta",
)
"""What a file of `model/` must say, and one of `teacher/` that trains a model: the class's defaults are one job's."""
CONFIG_NAME = "config"
"""The file in conf/ that lists everything else."""
SWEEPER = "hydra_plugins.kd.GridSweeper"
"""What Hydra calls our sweeper: it takes plugins by a name under `hydra_plugins` only."""

NOT_AN_OPTION = "Config group override must be a string"
"""How Hydra begins its plain ValueError for `teacher=null` or `model=7`."""
FLAGS_THAT_CLASH = ("Only one of --run, ", "The --resolve flag ")
"""How Hydra begins its plain ValueErrors for options like `--cfg job -m`."""
TEACHER_OF_DEBUG = "'${debug}_${teacher}'"
"""In Hydra's words where one of the two was deleted; see conf/config.yaml."""
KEY_AND_VALUE = re.compile(r"(?P<key>[+~]{0,2}[^=\s]+)=(?P<value>.*)", re.DOTALL)

LAUNCHERS = "hydra/launcher/"
FOLDERS_OF_HYDRA = {
    "run.dir": (".",),
    "output_subdir": (None,),
    "sweep.subdir": (".",),
    "job.chdir": (None, False),
}
"""Settings of Hydra's by which it would make folders of its own and work in them, and what they may be."""


@dataclasses.dataclass
class SweeperConfig:
    """What `hydra.sweeper` holds: the class of `kd.sweeper`, and the values by key that files of `sweep/` give."""

    _target_: str = SWEEPER
    params: dict[str, str] = dataclasses.field(default_factory=dict)


class Refusal(BaseException):
    """Takes an error past Hydra, which lets nothing that is an Exception out of its callbacks."""

    def __init__(self, error: ConfigError) -> None:
        super().__init__(str(error))
        self.error = error


class FolderCheck(Callback):
    """Refuses settings of Hydra's folders. Hydra calls it, before it makes them."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002 - Hydra's signature
        """Check a single run's settings; see `check_folders`."""
        try:
            check_folders(config)
        except ConfigError as error:
            raise Refusal(error) from error

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002 - Hydra's signature
        """Check a sweep's settings; see `check_folders`."""
        self.on_run_start(config)


def check_folders(composed: DictConfig) -> None:
    """Check that Hydra keeps out of the runs' directories.

    Args:
        composed: The configuration with Hydra's own settings.

    Raises:
        ConfigError: if one of `FOLDERS_OF_HYDRA` is set to something else.
    """
    for key, allowed in FOLDERS_OF_HYDRA.items():
        group, _, name = key.rpartition(".")
        node = composed.hydra[group] if group else composed.hydra
        value = OmegaConf.to_container(node, resolve=False)[name]  # type: ignore[index, call-overload]
        if value not in allowed:
            raise ConfigError(
                f"hydra.{key}={value} is not supported: kd itself makes a directory for each run, outputs/<name>/<run> "
                "beneath the folder that the command is given in, and paths are relative to that folder. Leave it out; "
                "name=... chooses <name>, and hydra.sweep.dir where a sweep keeps its logs."
            )


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
        _leave_shapes_to_files(node)
        if cls is Config:
            # Their class comes from the chosen group option; a default instance would forbid its siblings.
            for group in ("train", "data", "teacher", "adapter", "quantization"):
                node[group] = MISSING
        store.store(group="schema", name=name, node=node, package="_global_" if cls is Config else "_group_")
    store.store(group="hydra/sweeper", name="kd", node=SweeperConfig, provider="kd")
    check = {"folders": {"_target_": f"{FolderCheck.__module__}.{FolderCheck.__qualname__}"}}
    store.store(group="hydra/callbacks", name="kd", node=check, provider="kd")
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


def _leave_shapes_to_files(node: DictConfig) -> None:
    for key in map(str, node):
        child = node._get_node(key)
        if not isinstance(child, DictConfig):
            continue
        if OmegaConf.get_type(child) is ModelConfig:
            child.update(dict.fromkeys(SHAPE, MISSING))
        else:
            _leave_shapes_to_files(child)


def to_config(values: DictConfig) -> Config:
    """Return composed values as a checked `Config`.

    Raises:
        ConfigError: for a key that no class has (also one appended with `+`), a value that must be given
            and was not, or a value outside its range.
    """
    _refuse_unknown_keys(values, "")
    # Not OmegaConf.missing_keys, which stumbles over values that refer to missing ones.
    if missing := list(_missing_keys(OmegaConf.to_container(values, resolve=False), "")):
        raise ConfigError(_missing(missing))
    try:
        config = OmegaConf.to_object(values)
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


def _missing_keys(value: Any, key: str) -> Iterator[str]:
    if value == MISSING:
        yield key
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _missing_keys(child, f"{key}.{name}" if key else str(name))


def _missing(keys: list[str]) -> str:
    shape = {key: key.rpartition(".")[2] for key in keys if key.rpartition(".")[0].endswith("model")}
    given = ", ".join(keys)
    text = f"{given} must be given and {'were' if len(keys) > 1 else 'was'} not: add "
    if not shape:
        return text + f"{' '.join(f'{key}=...' for key in keys)} to the command."
    usual = ModelConfig()
    specified = " ".join(f"{key}={getattr(usual, name)}" for key, name in shape.items())
    return text + (
        "them to the command, or to the file that was chosen: a model's file says its whole shape, or begins with that "
        f"of another (defaults: [tiny, _self_]). The specified student has {specified}."
    )


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
    if isinstance(error, ValueError) and str(error).startswith(FLAGS_THAT_CLASH):
        return ConfigError(str(error))
    return None


def _explain_composition(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        key = str(cause.full_key)
        cls = cause.object_type if isinstance(cause.object_type, type) else None
        known = [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
        if key.startswith("hydra.launcher.") and known == ["_target_"]:  # Hydra's own launcher has no settings
            return f"{key} needs a launcher that has it: hydra/launcher=joblib, submitit or slurm."
        return _unknown_key(key, known, key.rpartition(".")[0] + "." if "." in key else "")
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        return f"{cause.full_key}: {str(cause).splitlines()[0]}. See python -m kd.train --cfg job for the values."
    if TEACHER_OF_DEBUG in str(error):
        return "A group that others refer to was deleted (~teacher or ~debug): choose teacher=none, leave ~debug out."
    if isinstance(error, OverrideParseException):
        return _explain_unreadable(error)
    text = " ".join(line.strip() for line in str(error).partition("Config search path:")[0].splitlines() if line)
    if LAUNCHERS in text:
        return f"{text} joblib needs pip install 'kd-train[sweep]'; submitit and slurm need 'kd-train[slurm]'."
    return f"{text} (python -m kd.train --help lists groups and keys)"


def _explain_unreadable(error: OverrideParseException) -> str:
    """Hydra's grammar leaves many characters to quoted values, and a shell takes one pair of quotes for itself."""
    text = error.override.strip()
    parts = KEY_AND_VALUE.fullmatch(text)
    if parts is None:
        return f"{text} is no key=value. A value with spaces goes in quotes, as 'data.path=\"my folder\"'."
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    told = [line for line in lines if not line.startswith(("Error parsing", "Lexer", "See http"))]
    reason = f": {told[0]}" if told else ""
    quoted = QuotedString(parts["value"], Quote.double).with_quotes()
    way_out = shlex.quote(f"{parts['key']}={quoted}")
    return f"{text} cannot be read as key=value{reason}. If the value is meant as it stands, quote it twice: {way_out}"
