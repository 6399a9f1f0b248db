"""The points of a sweep: all of them composed, checked and named before the first one starts."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

# Hydra has no public way to change a composed configuration; composing each of 100 points anew takes it 5 s.
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, open_dict

from kd.composition import explain, to_config
from kd.config import Config, TrainingConfig
from kd.errors import ConfigError, Interrupted, KDError
from kd.plan import Plan, check_extras, check_strategy, make_plan
from kd.runs import run_identity

T = TypeVar("T")
R = TypeVar("R")
NAMED = 3
"""So many points are named for one fault; of the others it says how many."""


@dataclass(frozen=True)
class Point:
    """One combination of a sweep's values."""

    overrides: tuple[str, ...]
    """All of the command line that concerns the task."""
    label: str
    """The overrides in which points differ."""
    config: Config
    directory: Path
    """Of the run that it asks for. Points may share one: at alpha 0 the temperature does not enter."""


def find_points(arguments: list[str], loader: ConfigLoader, master: DictConfig, num_processes: int = 1) -> list[Point]:
    """Return all points of a sweep, checked; nothing is made.

    Args:
        arguments: Overrides, some of them with several values.
        loader: Of the configuration.
        master: What the command line composes to without them.
        num_processes: That will work on each point's run.

    Raises:
        KDError: naming every point that is not allowed or cannot be done, of the kind that their faults have;
            a ConfigError for faults of several kinds.
    """
    combinations = _combinations(arguments, loader)
    varying = _varying(combinations)
    labels = [" ".join(text for text in overrides if text in varying) for overrides in combinations]
    composer = _Composer(loader, master, combinations)
    configs = _for_each(combinations, labels, lambda overrides: to_config(composer.compose(overrides)))
    planner = _Planner(num_processes)
    directories = _for_each(configs, labels, planner.directory)
    rows = zip(combinations, labels, configs, directories, strict=True)
    return [Point(tuple(overrides), label, config, directory) for overrides, label, config, directory in rows]


def _combinations(arguments: list[str], loader: ConfigLoader) -> list[list[str]]:
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(arguments)
    for override in parsed:
        if override.is_sweep_override():
            _check_values(override)
    return BasicSweeper.split_arguments(parsed, None)[0]


def _check_values(override: Override) -> None:
    if not override.is_discrete_sweep():
        raise ConfigError(
            f"{override.input_line} names no values: list them, as in {override.key_or_group}=1,2 or =range(0,1,0.25)."
        )
    if next(iter(override.sweep_string_iterator()), None) is None:
        raise ConfigError(f"{override.input_line} gives no value, so the sweep has no point: give at least one.")


def _varying(combinations: Sequence[Sequence[str]]) -> set[str]:
    """Return the overrides that not all points have."""
    counts = Counter(text for overrides in combinations for text in set(overrides))
    return {text for text, count in counts.items() if count < len(combinations)}


def _for_each(items: Iterable[T], labels: Sequence[str], make: Callable[[T], R]) -> list[R]:
    """Return what is made of each item; if some cannot be made, say so of all of them at once."""
    made: list[R] = []
    faults: list[tuple[str, KDError]] = []
    for item, label in zip(items, labels, strict=True):
        try:
            made.append(make(item))
        except Interrupted:
            raise
        except Exception as error:
            ours = explain(error)
            if ours is None:
                raise
            faults.append((label, ours))
    if faults:
        raise _refusal(faults, len(labels))
    return made


def _refusal(faults: list[tuple[str, KDError]], num_points: int) -> KDError:
    """Return the error of all faulty points; each text stands once, however many points share it."""
    points_of: dict[str, list[str]] = {}
    for label, error in faults:
        points_of.setdefault(str(error), []).append(label)
    lines = [f"{len(faults)} of {num_points} points cannot be done, so nothing was started."]
    for text, labels in points_of.items():
        more = f", and {len(labels) - NAMED} more" if len(labels) > NAMED else ""
        where = "; ".join(label or "the only point" for label in labels[:NAMED])
        lines.append(f"  {where}{more}: {text}")
    kinds = {type(error) for _, error in faults}
    kind = kinds.pop() if len(kinds) == 1 else ConfigError
    return kind("\n".join(lines))


class _Composer:
    """Composes points by Hydra once for all that differ in plain values only, and sets those afterwards."""

    def __init__(self, loader: ConfigLoader, master: DictConfig, combinations: Sequence[Sequence[str]]) -> None:
        self._loader, self._master = loader, master
        self._parser = OverridesParser.create(config_loader=loader)
        self._groups = set(loader.list_groups(""))
        self._parsed: dict[str, Override] = {}
        self._bases: dict[tuple[str, ...], DictConfig | Exception] = {}
        texts = {text for overrides in combinations for text in overrides}
        keys = {self._parse(text).key_or_group for text in texts}
        self._plain = {text for text in _varying(combinations) if self._is_plain(self._parse(text), keys)}

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """Return what Hydra would compose."""
        values = copy.deepcopy(self._base(tuple(text for text in overrides if text not in self._plain)))
        ConfigLoaderImpl._apply_overrides_to_config(
            [self._parse(text) for text in overrides if text in self._plain], values
        )
        return values

    def _base(self, overrides: tuple[str, ...]) -> DictConfig:
        if overrides not in self._bases:
            self._bases[overrides] = self._compose(list(overrides))
        base = self._bases[overrides]
        if isinstance(base, Exception):
            raise base
        return base

    def _compose(self, overrides: list[str]) -> DictConfig | Exception:
        try:
            values = self._loader.load_sweep_config(self._master, overrides)
        except Interrupted:
            raise
        except Exception as error:  # kept: it is the fault of every point with these overrides
            return error
        with open_dict(values):
            del values["hydra"]
        return values

    def _parse(self, text: str) -> Override:
        if text not in self._parsed:
            self._parsed[text] = self._parser.parse_override(text)
        return self._parsed[text]

    def _is_plain(self, override: Override, keys: set[str]) -> bool:
        """Whether the order of setting this value does not matter, and no file depends on it."""
        key = override.key_or_group
        if override.is_delete() or "/" in key or key in self._groups or override.package is not None:
            return False
        return not any(key.startswith(f"{other}.") or other.startswith(f"{key}.") for other in keys)


class _Planner:
    """Names runs. Corpus, tokenizer and teacher are read once for all points that share them."""

    def __init__(self, num_processes: int) -> None:
        self._num_processes = num_processes
        self._plans: dict[str, Plan] = {}

    def directory(self, config: Config) -> Path:
        """Return the directory of the run that a configuration asks for."""
        train = config.train
        check_strategy(train, alone=self._num_processes == 1)
        check_extras(config)
        needs_teacher = isinstance(train, TrainingConfig) and train.alpha > 0
        inputs = (
            config.name,
            config.model,
            config.data,
            config.teacher,
            config.init_from,
            train.trainer,
            needs_teacher,
        )
        key = repr(inputs)
        if key not in self._plans:
            self._plans[key] = make_plan(config)
        return run_identity(config, self._plans[key].fingerprints, self._num_processes).directory
