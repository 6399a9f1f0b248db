"""All runs below a folder as two tidy tables."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from kd.analysis.reading import FINAL, OBJECTIVES, RESULT_ONLY, TOTALS, RunFiles, is_run, read_run
from kd.errors import DataError, ResourceError
from kd.runs import OUTPUTS

DEPTH = 3
"""Folders between the given one and a run, at most."""
AXES = ("trainer", "alpha", "temperature", "learning_rate", "seed")
NOT_SETTINGS = ("schema", *AXES)
MEASURED = (*FINAL, *OBJECTIVES, *RESULT_ONLY, *TOTALS, "wall_seconds", "clip_rate")


@dataclass(frozen=True)
class Runs:
    """What `load_runs` found."""

    runs: pd.DataFrame
    """A row a run: experiment, run, directory, state (`kd.runs.RunState`), settings, final metrics, cost."""
    metrics: pd.DataFrame
    """A row a run, metric and step: experiment, run, directory, alpha, temperature, seed, metric, step, value."""
    problems: list[str]
    """A sentence for each thing that was left out, and why."""
    varied: list[str] = field(default_factory=list)
    """Columns of `runs` that name further settings which differ between runs, in dotted form."""
    files: dict[str, RunFiles] = field(default_factory=dict)
    """Everything read, by directory."""


def load_runs(*paths: str | Path) -> Runs:
    """Read all runs below the given folders (`outputs` if none is given).

    Args:
        *paths: `outputs`, experiments in it, or single runs, in any mix; a run that is met twice counts once.

    Raises:
        DataError: if a path does not exist or none holds a run.
        ResourceError: if a given path cannot be listed.
    """
    problems: list[str] = []
    given = [Path(path) for path in paths] or [OUTPUTS]
    found = {directory.resolve(): directory for path in given for directory in _directories(path, problems)}
    if not found:
        raise DataError(
            f"{', '.join(map(str, given))}: no runs there. Make some with `python -m kd.train`, or name the folder "
            "that holds them, like outputs/default."
        )
    files = [read_run(directory) for directory in sorted(found.values())]
    problems += [problem for run in files for problem in run.problems]
    varied = _varied(files)
    frame = pd.DataFrame([_row(run, varied) for run in files])
    return Runs(frame, _long(files), problems, varied, {str(run.directory): run for run in files})


def _directories(path: Path, problems: list[str]) -> Iterator[Path]:
    if not path.is_dir():
        raise DataError(f"{path} is not a folder: name outputs/<name> or outputs/<name>/<run>.")
    try:
        list(path.iterdir())
    except OSError as error:
        raise ResourceError(f"{path} cannot be read: {error}.") from error
    yield from _search(path, DEPTH, problems)


def _search(path: Path, depth: int, problems: list[str]) -> Iterator[Path]:
    """Yield the runs at or below a path; hidden folders hold none."""
    try:
        if is_run(path):
            yield path
            return
        below = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    except OSError as error:
        problems.append(f"{path} was left out: it cannot be read ({error}).")
        return
    if depth < DEPTH and not below and "reports" not in path.parts[-2:]:
        problems.append(f"{path} was left out: it holds none of a run's files.")
    if depth:
        for child in below:
            yield from _search(child, depth - 1, problems)


def _varied(files: Sequence[RunFiles]) -> list[str]:
    """Keys of settings with more than one value. Runs without a teacher do not make the teacher a setting."""
    known = [run.settings for run in files if "train.gradient_clip" in run.settings or "seq_len" in run.settings]
    keys = sorted({key for settings in known for key in settings} - set(NOT_SETTINGS))
    return [key for key in keys if len(_values(known, key)) > 1]


def _values(known: Sequence[dict[str, Any]], key: str) -> set[str]:
    values = {str(settings.get(key)) for settings in known}
    return values - {"None"} if key == "teacher" else values


def _row(run: RunFiles, varied: Sequence[str]) -> dict[str, Any]:
    settings = {axis: run.settings.get(axis, "" if axis == "trainer" else float("nan")) for axis in AXES}
    return {
        "experiment": run.directory.resolve().parent.name,
        "run": run.directory.resolve().name,
        "directory": str(run.directory),
        "state": run.state,
        **settings,
        **{key: _shown(run.settings.get(key)) for key in varied},
        **{key: run.metrics[key] for key in MEASURED},
        "evaluation": run.evaluation,
        "error": run.error,
        "command": run.command,
    }


def _shown(value: object) -> str:
    """A setting as text; a digest by its first 8 digits."""
    text = str(value)
    return text[:8] if len(text) == 64 else text


def _long(files: Sequence[RunFiles]) -> pd.DataFrame:
    columns = ["experiment", "run", "directory", "alpha", "temperature", "seed", "metric", "step", "value"]
    rows = [
        (*_place(run), metric, step, value)
        for run in files
        for metric, (steps, values) in run.series.items()
        for step, value in zip(steps, values, strict=True)
    ]
    return pd.DataFrame(rows, columns=columns)


def _place(run: RunFiles) -> tuple[Any, ...]:
    directory = run.directory.resolve()
    settings = [run.settings.get(axis, float("nan")) for axis in ("alpha", "temperature", "seed")]
    return (directory.parent.name, directory.name, str(run.directory), *settings)
