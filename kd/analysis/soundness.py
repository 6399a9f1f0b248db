"""What makes an answer unsafe, whatever its intervals say: a recipe that is unsteady, unfinished or not yet found."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from kd.analysis.arms import USUAL_NUISANCE, arms_of, short_name
from kd.analysis.evidence import PARTS, setting_columns
from kd.analysis.loading import Runs
from kd.analysis.statistics import Arm

MOST_NAMED = 6
UNSTEADY = 4
"""Times the median setting's standard deviation over seeds. Of equal noise and three seeds, one in millions is so."""
SMALLEST_SPREAD = 0.02
"""Nats per token: below, no reader minds."""
RISE = 0.05
"""Nats per token above an earlier evaluation: more than a mean over some dozens of blocks wavers."""
FEWEST_POINTS = 6
MOST_CLIPPED = 0.5


def warnings_of(
    runs: Runs, tried: pd.DataFrame, arms: Sequence[Arm], frame: pd.DataFrame, nuisance: Sequence[str]
) -> list[str]:
    """Return sentences on what the comparison of arms stands on; none if nothing speaks against it.

    Args:
        runs: All that was read.
        tried: A row a setting, numbered from 0.
        arms: What is compared.
        frame: The runs behind `tried`.
        nuisance: Columns in which each arm is at its best; if empty, those that usually are such.
    """
    chosen = tried.loc[[arm.chosen for arm in arms]]
    keys = setting_columns(runs)
    behind = frame.merge(chosen[[*keys, "label"]], on=keys)
    sentences = [*_seeds(chosen), *_curves(runs, behind), *_edges(tried, arms, keys, nuisance), *_clipped(chosen)]
    return list(sentences)


def _named(labels: Sequence[str]) -> str:
    more = len(labels) - MOST_NAMED
    return "; ".join(labels[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _seeds(chosen: pd.DataFrame) -> Iterator[str]:
    means, spreads = (chosen[f"{PARTS['validation']}{ending}"].to_numpy(dtype=float) for ending in ("", "_sd"))
    if len(chosen) < 2 or not np.isfinite(spreads).any():
        return
    usual, between = float(np.nanmedian(spreads)), float(np.std(means, ddof=1))
    if usual > between:
        yield (
            f"Seeds differ more than settings: standard deviation {usual:.2g} over the seeds of a setting (median), "
            f"{between:.2g} over the settings. Ranks are mostly luck; more seeds or a steadier recipe are needed."
        )
    odd = chosen[(spreads > UNSTEADY * usual) & (spreads > SMALLEST_SPREAD)]
    if len(odd):
        labels = [f"{row['label']} ({row[PARTS['validation'] + '_sd']:.2g})" for row in odd.to_dict("records")]
        yield (
            f"Some settings' seeds differ far more than the others' (standard deviation, median {usual:.2g}), so that "
            f"intervals with them may be too narrow: {_named(labels)}."
        )


def _curves(runs: Runs, behind: pd.DataFrame) -> Iterator[str]:
    """Runs whose curves say that the recipe, not the setting, was what mattered."""
    text = behind[behind["val_ppl"].notna()]
    curves = runs.metrics[runs.metrics["directory"].isin(text["directory"])]
    rising = [name for name, values in _series(curves, "val_loss") if rises(values)]
    stalled = [name for name, values in _series(curves, "train_loss") if stalls(values)]
    for found, what in (
        (rising, f"The validation loss rises by more than {RISE:g} nats on the way"),
        (stalled, "More than half of the fall in training loss comes in the second half of the steps (a late start)"),
    ):
        if found:
            counts = text[text["directory"].isin(found)]["label"].value_counts(sort=False)
            labels = [f"{label}: {count}" for label, count in counts.items()]
            yield f"{what} in {len(found)} of {len(text)} runs ({_named(labels)})."


def _series(curves: pd.DataFrame, metric: str) -> Iterator[tuple[str, np.ndarray[tuple[int], np.dtype[np.float64]]]]:
    known = curves[(curves["metric"] == metric) & curves["value"].notna()]
    for name, rows in known.groupby("directory"):
        yield str(name), rows.sort_values("step")["value"].to_numpy(dtype=float)


def rises(values: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> bool:
    """Return whether evaluations (at least 3) come to lie well above an earlier one.

    The last is left out: it takes all blocks, those before it perhaps a part.
    """
    way = values[:-1]
    return len(way) > 1 and bool((way - np.minimum.accumulate(way)).max() > RISE)


def stalls(values: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> bool:
    """Return whether a training loss has made less than half of its whole fall by the middle, or does not fall."""
    if len(values) < FEWEST_POINTS:
        return False
    fall = values[0] - values[-1]
    return bool(fall <= 0 or values[0] - values[(len(values) - 1) // 2] < fall / 2)


def _edges(tried: pd.DataFrame, arms: Sequence[Arm], keys: Sequence[str], nuisance: Sequence[str]) -> Iterator[str]:
    """Arms whose best value is the largest or smallest that was tried."""
    names = nuisance or [name for name in USUAL_NUISANCE if name in keys and tried[name].nunique() > 1]
    if not nuisance and names:
        arms = arms_of(tried, [key for key in keys if key not in names])
    for name in names:
        values = pd.to_numeric(tried[name], errors="coerce")
        at_edge = [arm.chosen for arm in arms if _is_at_edge(values, arm)]
        labels = [tried["label"][row] + (f" ({values[row]:g})" if nuisance else "") for row in at_edge]
        if labels:
            share = f"all {len(arms)}" if len(labels) == len(arms) else f"{len(labels)} of {len(arms)}"
            yield (
                f"The best {short_name(name)} is the largest or smallest that was tried, so a better one may lie "
                f"beyond, in {share}: {_named(labels)}."
            )


def _is_at_edge(values: "pd.Series[float]", arm: Arm) -> bool:
    mine = sorted(values[list(arm.members)].dropna().unique())
    if len(mine) < 2:
        return False
    best = values[arm.chosen]
    # Below 0 there is nothing.
    return bool(best == mine[-1] or (best == mine[0] and best > 0))


def _clipped(chosen: pd.DataFrame) -> Iterator[str]:
    often = chosen[chosen["clip_rate"] > MOST_CLIPPED]
    if len(often):
        labels = [f"{row['label']} ({row['clip_rate']:.0%})" for row in often.to_dict("records")]
        yield (
            "Gradients are clipped at most log points, so the clip sets the step size and differences between settings "
            f"may be those of their step sizes: {_named(labels)}."
        )
