"""The answer of a sweep: which setting is best, what cannot be told from it, how sure that is, what it cost.

The validation part chooses; the numbers that are quoted come from the test part where there is one, so that the text
on which the best looked best is not the text that reports it. (The seeds are the same in both: that part of a winner's
luck remains.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kd.analysis.evidence import PARTS, Part, collect, comparable_runs, has_part, setting_columns
from kd.analysis.loading import Runs
from kd.analysis.statistics import (
    LEVEL,
    BestSet,
    Differences,
    Interval,
    document_interval,
    equals_of_the_best,
    interval_parts,
    paired_differences,
    setting_interval,
)
from kd.errors import DataError

WITH_SPREAD = ("val_loss", "val_ppl", "test_loss", "test_ppl")
MEANS = ("val_kl", "val_agreement", "val_bits_per_byte", "teacher_val_ppl", "clip_rate")
COSTS = ("tokens", "flops", "wall_seconds", "parameters")
EQUAL = 1e-9
SMALLEST_GAP = 0.02
"""Nats per token, 2 % of perplexity: no share is given of a smaller gap between baseline and teacher."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` found."""

    settings: pd.DataFrame
    """A row a setting: means and `_sd` over seeds, cost, `gap_closed`, `is_best`, `in_set`, and the differences in loss
    to the best and to the baseline (nats per token, positive is worse) with their intervals."""
    part: str
    """Which part the differences and quoted numbers are of: test or validation."""
    validation: Part | None
    quoted: Part | None
    panels: list[str]
    """Columns, beside alpha and temperature, in which the settings differ."""
    has_set: bool
    """Whether the data say how sure the choice is."""
    notes: list[str]
    """What was left out of the comparison, and why."""

    @property
    def best(self) -> "pd.Series[Any] | None":
        """The row of the best setting, None where there is nothing to compare."""
        rows = self.settings[self.settings["is_best"]] if len(self.settings) else self.settings
        return rows.iloc[0] if len(rows) else None

    @property
    def measure(self) -> str:
        """What numbers are quoted in: `ppl`, or `loss` for trainers that have no perplexity."""
        return "ppl" if self.settings["val_ppl"].notna().any() else "loss"

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
        name = value or self.column
        frame = self.settings[self.settings["alpha"].notna()].copy() if len(self.settings) else self.settings
        if frame.empty:
            return pd.DataFrame()
        frame["shown"] = [
            f"{mean:.4g}" + ("" if math.isnan(sd) else f" +- {sd_text(sd)}")
            for mean, sd in zip(frame[name], frame[f"{name}_sd"], strict=True)
        ]
        frame["temperature"] = frame["temperature"].map(lambda value: "-" if math.isnan(value) else f"T={value:g}")
        rows = [*self.panels, "alpha"]
        order = ["-", *(f"T={value:g}" for value in sorted(self.settings["temperature"].dropna().unique()))]
        table = frame.pivot_table(index=rows, columns="temperature", values="shown", aggfunc="first")
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
        level: Coverage of each interval, and probability that the truly best setting is among the equals.
    """
    notes: list[str] = []
    frame = comparable_runs(runs, notes)
    if frame.empty:
        return Comparison(pd.DataFrame(), "validation", None, None, [], False, [*notes, "No run is finished yet."])
    panels = _panels(runs, frame)
    columns = setting_columns(runs)
    groups = [group for _, group in frame.groupby(columns, dropna=False, sort=True)]
    settings = pd.DataFrame([_summary(group, columns, panels) for group in groups])
    part = "test" if has_part(frame, "test") else "validation"
    validation, quoted = collect(runs, groups, "validation"), collect(runs, groups, part)
    best_set = _choose(validation, level, notes)
    chosen = best_set.best if best_set else int(np.argmin(settings["val_loss"]))
    settings["is_best"] = np.arange(len(settings)) == chosen
    settings["in_set"] = best_set.inside if best_set else settings["is_best"]
    baselines = _baselines(settings, panels)
    _add_differences(settings, "", quoted, [chosen] * len(settings), level)
    _add_differences(settings, "baseline_", quoted, baselines, level)
    settings["gap_closed"] = [_gap_closed(settings, row, baselines[row]) for row in range(len(settings))]
    return Comparison(settings, part, validation, quoted, panels, best_set is not None, notes)


def _panels(runs: Runs, frame: pd.DataFrame) -> list[str]:
    candidates = ["trainer", "learning_rate", *runs.varied]
    panels = [name for name in candidates if name != "teacher" and frame[name].nunique(dropna=False) > 1]
    if "teacher" in frame and frame[frame["teacher"] != "None"]["teacher"].nunique() > 1:
        panels.append("teacher")
    return panels


def _summary(group: pd.DataFrame, columns: Sequence[str], panels: Sequence[str]) -> dict[str, object]:
    first = group.iloc[0]
    row: dict[str, object] = {"label": setting_label(first, panels), **{name: first[name] for name in columns}}
    row["seeds"] = len(group)
    for name in WITH_SPREAD:
        row[name], row[f"{name}_sd"] = group[name].mean(), group[name].std(ddof=1)
    return row | {name: group[name].mean() for name in (*MEANS, *COSTS)}


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


def _choose(part: Part, level: float, notes: list[str]) -> BestSet | None:
    losses = part.scores.losses
    if len(losses) < 2:
        return None
    spread = float(np.nanmax(losses) - np.nanmin(losses))
    if spread <= EQUAL * abs(float(np.nanmean(losses))):
        notes.append(
            "All validation losses are equal: there is nothing to tell apart. Are these really different runs?"
        )
        return None
    differences = paired_differences(part.scores)
    if (differences.seeds == 0).any():
        notes.append("Some settings share no seed, so these cannot be compared in pairs: run all with the same seeds.")
    if len(set(np.isfinite(losses).sum(axis=1))) > 1:
        notes.append(
            "Settings have different numbers of seeds (runs are missing or failed), so their means are over different "
            "seeds. Differences use the seeds that a pair shares; with only one, their intervals count documents alone."
        )
    if part.reason:
        notes.append(f"Documents are not counted as a source of noise: {part.reason}.")
    errors = np.concatenate([differences.pooled_error.ravel(), differences.document_error.ravel()])
    if not np.nansum(errors):
        notes.append("All seeds and all documents agree to the last digit: there is no noise to measure against.")
        return None
    return equals_of_the_best(losses, differences, level)


def _baselines(settings: pd.DataFrame, panels: Sequence[str]) -> list[int | None]:
    """For each setting the row of plain cross-entropy with all else equal (no teacher trains it, so any will do)."""
    keys = [name for name in panels if name not in ("teacher", "trainer")]
    plain = {tuple(settings.loc[row, keys]): row for row in settings.index[settings["alpha"] == 0]}
    return [plain.get(tuple(settings.loc[row, keys])) for row in settings.index]


def _add_differences(
    settings: pd.DataFrame, prefix: str, part: Part, references: Sequence[int | None], level: float
) -> None:
    """Add columns for the difference in loss of each setting to its reference, with its interval."""
    differences = paired_differences(part.scores)
    rows: list[tuple[float, ...]] = []
    for row, reference in enumerate(references):
        if reference is None or reference == row:
            rows.append((math.nan,) * 5)
            continue
        interval = _interval(part, differences, row, reference, level)
        halves = interval_parts(differences, row, reference, level)
        rows.append((interval.estimate, interval.low, interval.high, *(half or math.nan for half in halves)))
    names = ("difference", "low", "high", "half_by_seeds", "half_by_documents")
    for name, values in zip(names, zip(*rows, strict=True), strict=True):
        settings[prefix + name] = values


def _interval(part: Part, differences: Differences, row: int, reference: int, level: float) -> Interval:
    """With one seed the documents alone speak, and are drawn anew; else seeds and documents are joined."""
    nll, tokens = part.scores.document_nll, part.scores.document_tokens
    one_seed = np.isfinite(part.scores.losses).sum(axis=1).max() == 1 and differences.seeds[row, reference] == 1
    if one_seed and nll is not None and tokens is not None:
        return document_interval(nll[row] - nll[reference], tokens, level)
    return setting_interval(differences, row, reference, level)


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
    frame = runs.runs[(runs.runs["state"] == "done") & runs.runs["val_loss"].notna()]
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
