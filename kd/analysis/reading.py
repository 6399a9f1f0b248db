"""One run's directory to values, whatever state its files are in. What cannot be read is a sentence, never an error."""

import math
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kd.analysis.blocks import Blocks, read_blocks
from kd.config import TrainerConfig
from kd.config.train import LATER
from kd.errors import IntegrityError
from kd.files import digest_of, read_json
from kd.outcome import objective
from kd.runs import RunState, is_held

MARKS = ("result.json", "history.json", "environment.json", "failure.json", "config.yaml")
"""Any of these makes a directory a run."""
PREFERENCES = ("reward_accuracy", "log_ratio_margin")
"""What trainers on pairs of answers measure that does not depend on their settings."""
FINAL = (
    *("val_loss", "val_ppl", "val_kl", "val_agreement", "val_bits_per_byte"),
    *(f"val_{name}" for name in PREFERENCES),
)
TOTALS = (
    *("test_loss", "test_ppl", "teacher_val_ppl", "tokens", "flops", "parameters"),
    *(f"test_{name}" for name in PREFERENCES),
)
OBJECTIVES = ("val_objective", "test_objective")
"""What runs are chosen by, the lower the better; see `kd.outcome.objective`."""
RESULT_ONLY = ("best_val_loss", "best_step", "steps")
TEXT_TRAINERS = ("distillation", "pretrain")
"""Their validation losses are one measure: the cross-entropy of running text."""
INPUTS = ("corpus", "tokenizer", "seq_len", "max_eval_blocks", "max_eval_examples")
"""What determines the text, or the examples, a run is scored on; runs that differ here do not compare."""
NAME = re.compile(r"alpha([0-9.e-]+?)(?:-temperature([0-9.e-]+?))?-seed([0-9]+)-[0-9a-f]{8}")
SAME = 1e-6
"""Relative difference up to which two records of a number agree."""

Series = dict[str, tuple[list[float], list[float]]]


@dataclass
class RunFiles:
    """What the files of one run say."""

    directory: Path
    state: str = RunState.INTERRUPTED.value
    """done, failed, running or interrupted (see `kd.runs.RunState`)."""
    error: str = ""
    command: str = ""
    evaluation: str = ""
    """Short digest of what the run is scored on."""
    settings: dict[str, Any] = field(default_factory=dict)
    """alpha, temperature, seed, trainer and, by dotted key, all else of the identity."""
    metrics: dict[str, float] = field(default_factory=dict)
    series: Series = field(default_factory=dict)
    """Steps and values by metric."""
    blocks: dict[str, Blocks] = field(default_factory=dict)
    """By part: validation, test."""
    problems: list[str] = field(default_factory=list)

    def object_in(self, name: str) -> dict[str, Any]:
        """Return a JSON file's object; empty, with a sentence, if it is not one; empty if there is no file."""
        path = self.directory / name
        if not path.exists():
            return {}
        try:
            value = read_json(path)
        except (IntegrityError, RecursionError) as error:
            self.problems.append(f"{path} was left out: it cannot be read as JSON ({error.__cause__ or error}).")
            return {}
        if not isinstance(value, dict):
            self.problems.append(f"{path} was left out: it holds no JSON object.")
            return {}
        return value


def is_run(directory: Path) -> bool:
    """Return whether a directory holds any of a run's files."""
    return any((directory / name).is_file() for name in MARKS)


def read_run(directory: Path) -> RunFiles:
    """Read all that a run's directory says."""
    run = RunFiles(directory)
    history, result = run.object_in("history.json"), run.object_in("result.json")
    _read_state(run, result)
    _read_settings(run)
    run.series = _series(run, history)
    _read_metrics(run, history, result)
    for part, name in (("validation", "val_blocks.npy"), ("test", "test_blocks.npy")):
        _read_part(run, part, directory / name)
    return run


def _read_state(run: RunFiles, result: dict[str, Any]) -> None:
    if result.get("state") == "done":
        run.state = RunState.DONE.value
        return
    if result:
        run.problems.append(f"{run.directory / 'result.json'} does not say that the run is done: taken as interrupted.")
    if is_held(run.directory):
        run.state = RunState.RUNNING.value
        return
    failure = run.object_in("failure.json")
    if (run.directory / "failure.json").is_file():
        run.state = RunState.FAILED.value
        run.error = str(failure.get("error", "unknown error"))


def _read_settings(run: RunFiles) -> None:
    environment = run.object_in("environment.json")
    identity = environment.get("identity")
    if isinstance(identity, dict):
        run.settings = _flat(identity)
        run.evaluation = digest_of(_measure(identity))[:8]
    else:
        _settings_from_name(run)
    if run.settings.get("alpha") == 0:
        run.settings["temperature"] = math.nan
    process = environment.get("process")
    arguments = process.get("arguments") if isinstance(process, dict) else None
    if isinstance(arguments, list):
        run.command = shlex.join(["python", "-m", "kd.train", *map(str, arguments)])


def _measure(identity: dict[str, Any]) -> dict[str, str]:
    """Return all that decides what a run's final numbers are of; only where it is the same do they compare."""
    trainer = str(identity.get("trainer"))
    flat = _dotted(identity)
    # Runs in half precision were once scored in it too.
    scored_in = None if identity.get("half_precision") else flat.get("train.precision")
    measure = {key: flat.get(key) for key in INPUTS} | {"scored_in": scored_in}
    if trainer not in TEXT_TRAINERS:
        # Examples are cut, or left out, where they are longer than the model reads.
        measure |= {"trainer": trainer, "max_seq_len": flat.get("model.max_seq_len")}
    if trainer == "dpo":
        measure["reference"] = flat.get("init_from")
    if trainer == "grpo":
        measure |= {key: flat.get(f"train.{key}") for key in ("reward", "max_new_tokens")}
    return {key: str(value) for key, value in measure.items()}


def _dotted(identity: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in identity.items():
        inner = {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
        flat |= inner
    return flat


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    """Flatten an identity to dotted keys; training values that have a column of their own lose their prefix."""
    usual = TrainerConfig()
    # An identity leaves out what came later and is as it was before.
    flat: dict[str, Any] = {f"train.{name}": getattr(usual, name) for name in LATER if "train" in identity}
    flat |= _dotted(identity)
    for name in ("alpha", "temperature", "learning_rate"):
        flat[name] = number(flat.pop(f"train.{name}", None))
    flat["seed"] = number(flat.get("seed"))
    return flat


def _settings_from_name(run: RunFiles) -> None:
    found = NAME.fullmatch(run.directory.name)
    if found is None:
        run.problems.append(
            f"{run.directory} does not say its settings (environment.json): it stays out of comparisons."
        )
        return
    alpha, temperature, seed = found.groups()
    run.settings = {
        "trainer": "distillation",
        "alpha": number(_parsed(alpha)),
        "temperature": number(_parsed(temperature or "nan")),
        "seed": number(_parsed(seed)),
    }
    if run.state == "done":
        run.problems.append(f"{run.directory}: settings were read off its name, as environment.json has none.")


def _parsed(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def number(value: object) -> float:
    """Return a finite number as float, anything else as NaN."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if fits else math.nan  # type: ignore[arg-type]


def _series(run: RunFiles, history: dict[str, Any]) -> Series:
    columns = {key: value for key, value in history.items() if isinstance(value, list)}
    timing = history.get("timing")
    if isinstance(timing, dict) and isinstance(timing.get("tokens_per_second"), list):
        columns["tokens_per_second"] = timing["tokens_per_second"]
    series: Series = {}
    for key, values in columns.items():
        steps = columns.get("val_step" if key.startswith("val_") else "train_step", [])
        if key in ("train_step", "val_step"):
            continue
        if len(steps) != len(values):
            run.problems.append(
                f"{run.directory / 'history.json'}: {key} has {len(values)} values for "
                f"{len(steps)} steps; it was left out."
            )
            continue
        numbers = [number(value) for value in values]
        odd = sum(math.isnan(new) and old is not None for new, old in zip(numbers, values, strict=True))
        if odd:
            run.problems.append(f"{run.directory / 'history.json'}: {odd} values of {key} are not numbers; left out.")
        series[key] = ([number(step) for step in steps], numbers)
    return series


def _read_metrics(run: RunFiles, history: dict[str, Any], result: dict[str, Any]) -> None:
    for key in FINAL:
        run.metrics[key] = _agreed(run, key, _final(run, key, history), number(result.get(key)))
    for key in TOTALS:
        run.metrics[key] = _agreed(run, key, number(history.get(key)), number(result.get(key)))
    run.metrics |= _objectives(run.metrics)
    run.metrics |= {key: number(result.get(key)) for key in RESULT_ONLY}
    if math.isnan(run.metrics["best_val_loss"]) and "val_loss" in run.series:
        known = [value for value in run.series["val_loss"][1] if not math.isnan(value)]
        run.metrics["best_val_loss"] = min(known, default=math.nan)
    timings = [source.get("timing") for source in (history, result)]
    walls = [number(timing.get("wall_seconds")) for timing in timings if isinstance(timing, dict)]
    run.metrics["wall_seconds"] = next((wall for wall in walls if not math.isnan(wall)), math.nan)
    run.metrics["clip_rate"] = _clip_rate(run)
    if run.state == "done" and math.isnan(run.metrics["val_loss"]):
        run.problems.append(f"{run.directory} has no final validation loss: it stays out of comparisons.")


def _objectives(metrics: dict[str, float]) -> dict[str, float]:
    measured: dict[str, float] = {"val_loss": math.nan, "test_loss": math.nan}
    measured |= {name: value for name, value in metrics.items() if not math.isnan(value)}
    return {f"{part}_objective": objective(measured, part) for part in ("val", "test")}


def _final(run: RunFiles, key: str, history: dict[str, Any]) -> float:
    """Return a series' value of the final weights: the last, unless training has gone back to an earlier step."""
    steps, values = run.series.get(key, ([], []))
    if not values:
        return math.nan
    step = number(history.get("final_step"))
    return values[steps.index(step)] if step in steps else values[-1]


def _agreed(run: RunFiles, key: str, raw: float, summary: float) -> float:
    """The history's number, or the result's where the history has none; a contradiction is said."""
    if math.isnan(raw) or run.state != "done":
        return summary if math.isnan(raw) else raw
    if not math.isnan(summary) and not math.isclose(raw, summary, rel_tol=SAME):
        run.problems.append(
            f"{run.directory}: {key} is {raw:g} in history.json but {summary:g} in result.json; the former is used."
        )
    return raw


def _clip_rate(run: RunFiles) -> float:
    """Share of log points whose mean gradient norm, before clipping, lies above the clip."""
    norms = np.array(run.series.get("grad_norm", ([], []))[1])
    clip = number(run.settings.get("train.gradient_clip"))
    known = norms[np.isfinite(norms)] if len(norms) else norms
    return float(np.mean(known > clip)) if len(known) and not math.isnan(clip) else math.nan


def _read_part(run: RunFiles, part: str, path: Path) -> None:
    if run.state != "done" or not path.exists():
        return
    blocks, fault = read_blocks(path)
    if blocks is None:
        run.problems.append(f"{path} was left out: {fault}.")
        return
    recorded = run.metrics["val_loss" if part == "validation" else "test_loss"]
    if not math.isclose(blocks.loss, recorded, rel_tol=SAME):
        run.problems.append(
            f"{path} was left out: its blocks give a loss of {blocks.loss:g}, the run's record says {recorded:g}."
        )
        return
    run.blocks[part] = blocks
