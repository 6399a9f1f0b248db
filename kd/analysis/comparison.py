"""The answer of a sweep: which setting is best, what cannot be told from it, how sure that is, what it cost.

The validation part chooses; the numbers that are quoted, and the intervals and verdicts beside them, come from the test
part where there is one, so that the text on which the best looked best is not the text that reports it. (The seeds are
the same in both: that part of a winner's luck the simultaneous intervals count.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kd.analysis.arms import USUAL_NUISANCE, arms_of, find_nuisance, in_order, short_name
from kd.analysis.evidence import PARTS, Part, collect, comparable_runs, has_part, setting_columns
from kd.analysis.loading import Runs
from kd.analysis.soundness import warnings_of
from kd.analysis.statistics import (
    LEVEL,
    Arm,
    Differences,
    Interval,
    arm_interval,
    document_interval,
    paired_differences,
    simultaneous_bounds,
)
from kd.errors import DataError

WITH_SPREAD = (
    *("val_objective", "val_loss", "val_ppl", "val_reward_accuracy"),
    *("test_objective", "test_loss", "test_ppl", "test_reward_accuracy"),
)
MEANS = ("val_kl", "val_agreement", "val_bits_per_byte", "val_log_ratio_margin", "teacher_val_ppl", "clip_rate")
COSTS = ("tokens", "flops", "wall_seconds", "parameters")
UNITS = {"ppl": "nats per token", "loss": "in units of the loss", "reward_accuracy": "share of pairs ranked wrongly"}
EQUAL = 1e-9
SMALLEST_GAP = 0.02
"""Nats per token, 2 % of perplexity: no share is given of a smaller gap between baseline and teacher."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` or `best_of` found."""

    settings: pd.DataFrame
    """A row a setting (of `best_of` an arm, at its best nuisance values): means and `_sd` over seeds, cost,
    `gap_closed`, `is_best`, `in_set`, and the differences in what chooses (`kd.outcome.objective`; positive is worse)
    to the best and to the baseline, with simultaneous intervals: `in_set` is false where that to the best is above
    0."""
    part: str
    """Which part the differences and quoted numbers are of: test or validation."""
    quoted: Part | None
    panels: list[str]
    """Columns, beside alpha and temperature, in which the settings differ."""
    has_set: bool
    """Whether the data say how sure the choice is."""
    notes: list[str]
    """What was left out of the comparison, and why."""
    warnings: list[str]
    """What makes the answer unsafe, whatever its intervals say."""
    tried: pd.DataFrame
    """A row a setting, those of nuisance values that were not chosen too."""
    nuisance: list[str]
    """Columns in which each arm is at its best value; empty for `compare`."""
    directories: list[str]
    """The runs behind `settings`."""
    evaluation: str
    """What they are scored on, as in `Runs.runs`."""

    @property
    def best(self) -> "pd.Series[Any] | None":
        """The row of the best setting, None where there is nothing to compare."""
        rows = self.settings[self.settings["is_best"]] if len(self.settings) else self.settings
        return rows.iloc[0] if len(rows) else None

    @property
    def measure(self) -> str:
        """What numbers are quoted in: `ppl`, `reward_accuracy`, or `loss` for trainers that have neither."""
        known = (name for name in ("ppl", "reward_accuracy") if self.settings[f"val_{name}"].notna().any())
        return next(known, "loss")

    @property
    def unit(self) -> str:
        """What differences are in."""
        return UNITS[self.measure]

    @property
    def column(self) -> str:
        """The column of the quoted numbers."""
        return f"{'test' if self.part == 'test' else 'val'}_{self.measure}"

    @property
    def equals(self) -> list[str]:
        """Labels of the settings that cannot be told from the best, without itself."""
        if not self.has_set:
            return []
        return list(self.settings[self.settings["in_set"] & ~self.settings["is_best"]]["label"])

    def table(self, value: str | None = None) -> pd.DataFrame:
        """Return alpha (rows) by temperature (columns) as text, mean +- SD over seeds; alpha 0 has no temperature.

        Args:
            value: Column to show; `column` if None.
        """
        return _grid(self.settings, self.panels, value or self.column)

    def sensitivity(self, value: str = "val_ppl") -> pd.DataFrame:
        """Return what each arm reaches at each value of the nuisance settings, as text: mean +- SD over seeds.

        Args:
            value: Column to show. The validation part's by default: it is what chose.
        """
        return _grid(self.tried, [*self.nuisance, *self.panels], value)


def _grid(settings: pd.DataFrame, panels: list[str], name: str) -> pd.DataFrame:
    frame = settings[settings["alpha"].notna()].copy() if len(settings) else settings
    if frame.empty:
        return pd.DataFrame()
    frame["shown"] = [
        f"{mean:.4g}" + ("" if math.isnan(sd) else f" +- {sd_text(sd)}")
        for mean, sd in zip(frame[name], frame[f"{name}_sd"], strict=True)
    ]
    frame["temperature"] = frame["temperature"].map(lambda value: "-" if math.isnan(value) else f"T={value:g}")
    order = ["-", *(f"T={value:g}" for value in sorted(settings["temperature"].dropna().unique()))]
    table = frame.pivot_table(index=[*panels, "alpha"], columns="temperature", values="shown", aggfunc="first")
    return table.reindex(columns=[column for column in order if column in table.columns]).fillna("")


@dataclass(frozen=True)
class PairComparison:
    """Two runs compared token by token."""

    interval: Interval
    """First minus second, nats per token; positive: the first is worse."""
    part: str
    sentence: str


def compare(runs: Runs, level: float = LEVEL) -> Comparison:
    """Compare all finished runs by setting.

    Args:
        runs: What `load_runs` returned.
        level: Probability that all intervals hold together, and with them that the truly best setting is the best shown
            or among its equals.
    """
    return _compare(runs, [], level, [])


def best_of(runs: Runs, nuisance: Sequence[str], level: float = LEVEL) -> Comparison:
    """Compare alpha, temperature and all else that differs, each arm at its own best value of the nuisance settings.

    The best value is the one of the lowest mean on the validation part. That it was picked for being lowest is counted:
    the intervals are of the difference between arms each at its *truly* best value among those tried, whichever that
    is, and hold together (see `kd.analysis.statistics.arm_interval`). The more values were tried, the wider they are.

    Args:
        runs: What `load_runs` returned.
        nuisance: Settings that must be right but are not the question, like `learning_rate` and `warmup_steps`.
        level: As for `compare`.

    Raises:
        DataError: if a name is not a setting of these runs, or is what repeats them (seed) or the trainer.
    """
    notes: list[str] = []
    return _compare(runs, find_nuisance(runs, nuisance, notes), level, notes)


def _compare(runs: Runs, nuisance: list[str], level: float, notes: list[str]) -> Comparison:
    frame = comparable_runs(runs, notes)
    empty = pd.DataFrame()
    if frame.empty:
        notes.append("No run is finished yet.")
        return Comparison(empty, "validation", None, [], False, notes, [], empty, nuisance, [], "")
    columns = setting_columns(runs)
    varied = _panels(runs, frame)
    panels = [name for name in varied if name not in nuisance]
    ordered = frame.sort_values(columns, key=in_order, kind="stable")
    groups = [group for _, group in ordered.groupby(columns, dropna=False, sort=False)]
    tried = pd.DataFrame([_summary(group, columns, panels, nuisance) for group in groups])
    arms = arms_of(tried, [name for name in columns if name not in nuisance])
    part = "test" if has_part(frame, "test") else "validation"
    quoted = collect(runs, groups, part)
    settings, has_set = _judged(tried, arms, quoted, panels, level, notes)
    directories = [name for arm in arms for name in groups[arm.chosen]["directory"]]
    warnings = warnings_of(runs, tried, arms, frame, nuisance)
    if recipe := [name for name in USUAL_NUISANCE if name in panels]:
        apart, together = (",".join(map(short_name, names)) for names in (recipe, [*nuisance, *recipe]))
        notes.append(f"Settings differ in {apart} too: --best-of {together} compares the others each at its own best.")
    evaluation = str(frame["evaluation"].iloc[0])
    return Comparison(
        settings, part, quoted, panels, has_set, notes, warnings, tried, nuisance, directories, evaluation
    )


def _judged(
    tried: pd.DataFrame, arms: Sequence[Arm], part: Part, panels: Sequence[str], level: float, notes: list[str]
) -> tuple[pd.DataFrame, bool]:
    """Return the arms' rows with differences, intervals and verdicts, and whether there are verdicts."""
    settings = tried.iloc[[arm.chosen for arm in arms]].reset_index(drop=True)
    best = int(np.argmin(settings[PARTS["validation"]]))
    settings["is_best"] = np.arange(len(settings)) == best
    differences = paired_differences(part.scores, [arm.members for arm in arms] if len(arms) < len(tried) else [])
    bounds = simultaneous_bounds(differences, len(arms), level)
    has_set = _is_told(part, differences, notes)

    def add(prefix: str, references: Sequence[int | None]) -> None:
        rows = [
            Interval(math.nan)
            if reference in (None, row)
            else arm_interval(differences, bounds, arms[row], arms[reference])
            for row, reference in enumerate(references)
        ]
        settings[f"{prefix}difference"] = [interval.estimate for interval in rows]
        settings[f"{prefix}low"] = [interval.low for interval in rows]
        settings[f"{prefix}high"] = [interval.high for interval in rows]

    baselines = _baselines(settings, panels)
    add("", [best] * len(settings))
    add("baseline_", baselines)
    settings["in_set"] = ~(settings["low"] > 0) if has_set else settings["is_best"]
    settings["gap_closed"] = [_gap_closed(settings, row, baselines[row]) for row in range(len(settings))]
    return settings, has_set


def _panels(runs: Runs, frame: pd.DataFrame) -> list[str]:
    candidates = ["trainer", "learning_rate", *runs.varied]
    panels = [name for name in candidates if name != "teacher" and frame[name].nunique(dropna=False) > 1]
    if "teacher" in frame and frame[frame["teacher"] != "None"]["teacher"].nunique() > 1:
        panels.append("teacher")
    return panels


def _summary(
    group: pd.DataFrame, columns: Sequence[str], panels: Sequence[str], nuisance: Sequence[str]
) -> dict[str, object]:
    first = group.iloc[0]
    row: dict[str, object] = {"label": setting_label(first, panels), **{name: first[name] for name in columns}}
    row["best_at"] = ", ".join(f"{short_name(name)} {_plain(first[name])}" for name in nuisance)
    row["seeds"] = len(group)
    for name in WITH_SPREAD:
        row[name], row[f"{name}_sd"] = group[name].mean(), group[name].std(ddof=1)
    return row | {name: group[name].mean() for name in (*MEANS, *COSTS)}


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def sd_text(value: float) -> str:
    """Return a standard deviation for readers: two digits, and no exponent for large ones."""
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def setting_label(row: "pd.Series[Any]", panels: Sequence[str]) -> str:
    """Return a setting's name for readers, like `alpha 0.5, T 2, learning_rate 0.003`."""
    alpha, temperature = float(row["alpha"]), float(row["temperature"])
    words = [str(row["trainer"])] if math.isnan(alpha) else [f"alpha {alpha:g}"]
    words += [] if math.isnan(temperature) else [f"T {temperature:g}"]
    return ", ".join(
        [*words, *(f"{name} {row[name]}" for name in panels if name != "trainer" or not math.isnan(alpha))]
    )


def _is_told(part: Part, differences: Differences, notes: list[str]) -> bool:
    """Return whether the data can tell settings apart at all; notes say what is missing."""
    losses = part.scores.losses
    if len(losses) < 2:
        return False
    spread = float(np.nanmax(losses) - np.nanmin(losses))
    if spread <= EQUAL * abs(float(np.nanmean(losses))):
        notes.append("All losses are equal: there is nothing to tell apart. Are these really different runs?")
        return False
    if (differences.seeds == 0).any():
        notes.append("Some settings share no seed, so these cannot be compared in pairs: run all with the same seeds.")
    if len(set(np.isfinite(losses).sum(axis=1))) > 1:
        notes.append(
            "Settings have different numbers of seeds (runs are missing or failed), so their means are over different "
            "seeds. Differences use the seeds that a pair shares."
        )
    if part.reason:
        notes.append(f"Documents are not counted as a source of noise: {part.reason}.")
    errors = np.concatenate([differences.pooled_error.ravel(), differences.document_error.ravel()])
    if differences.pooled_freedom and not np.nansum(errors):
        notes.append("All seeds and all documents agree to the last digit: there is no noise to measure against.")
        return False
    return differences.pooled_freedom > 0


def _baselines(settings: pd.DataFrame, panels: Sequence[str]) -> list[int | None]:
    """For each setting the row of plain cross-entropy with all else equal (no teacher trains it, so any will do)."""
    keys = [name for name in panels if name not in ("teacher", "trainer")]
    plain = {tuple(settings.loc[row, keys]): row for row in settings.index[settings["alpha"] == 0]}
    return [plain.get(tuple(settings.loc[row, keys])) for row in settings.index]


def _gap_closed(settings: pd.DataFrame, row: int, baseline: int | None) -> float:
    """Share of the way from the baseline's cross-entropy (nats) to the teacher's; NaN where there is no such way."""
    if baseline is None:
        return math.nan
    teachers = settings["teacher_val_ppl"].to_numpy(dtype=float)
    known = [value for value in teachers[[row, baseline]] if math.isfinite(value) and value > 0]
    if not known:
        return math.nan
    losses = settings["val_loss"].to_numpy(dtype=float)
    gap = losses[baseline] - math.log(known[0])
    return float((losses[baseline] - losses[row]) / gap) if gap >= SMALLEST_GAP else math.nan


def compare_pair(runs: Runs, first: str | Path, second: str | Path, level: float = LEVEL) -> PairComparison:
    """Compare two finished runs on the blocks that both were scored on, by a bootstrap over documents.

    Args:
        runs: What `load_runs` returned.
        first: Directory, or its last name, of a run.
        second: Likewise.
        level: Coverage of the interval.

    Raises:
        DataError: if a run is not among the finished ones, or the two were scored on different text.
    """
    chosen = [_find(runs, str(name)) for name in (first, second)]
    frame = pd.DataFrame(chosen)
    if frame["evaluation"].nunique() > 1:
        raise DataError(f"{first} and {second} were scored on different text or tokens: their losses do not compare.")
    name = "test" if has_part(frame, "test") else "validation"
    part = collect(runs, [frame.iloc[:1].assign(seed=0), frame.iloc[1:].assign(seed=0)], name)
    estimate = float(frame[PARTS[name]].iloc[0] - frame[PARTS[name]].iloc[1])
    nll, tokens = part.scores.document_nll, part.scores.document_tokens
    if nll is None or tokens is None:
        reason = f"There is no interval: {part.reason}."
        return PairComparison(Interval(estimate), name, f"{estimate:+.4f} nats per token ({name} part). {reason}")
    interval = document_interval(nll[0] - nll[1], tokens, level)
    return PairComparison(interval, name, _pair_sentence(interval, part, level))


def _find(runs: Runs, name: str) -> "pd.Series[Any]":
    frame = runs.runs[(runs.runs["state"] == "done") & runs.runs["val_objective"].notna()]
    found = frame[(frame["directory"] == name.rstrip("/")) | (frame["run"] == Path(name).name)]
    if found.empty:
        raise DataError(f"{name} is not among the finished runs: {', '.join(frame['run'][:10]) or 'there are none'}.")
    return found.iloc[0]


def _pair_sentence(interval: Interval, part: Part, level: float) -> str:
    if not interval.known:
        return (
            f"{interval.estimate:+.4f} nats per token ({part.name} part); all documents agree, so there is no interval."
        )
    return (
        f"{interval.estimate:+.4f} nats per token ({level:.0%} interval {interval.low:+.4f} to {interval.high:+.4f}, "
        f"bootstrap over {part.num_documents} documents of the {part.name} part). That is about these two trained "
        "models; another seed may give another difference."
    )
