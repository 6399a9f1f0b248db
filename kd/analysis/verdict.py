"""The comparison in sentences, including what the data do not say."""

import math

import numpy as np

from kd.analysis.arms import short_name
from kd.analysis.comparison import Comparison, sd_text
from kd.analysis.loading import Runs
from kd.analysis.statistics import LEVEL

MOST_NAMED = 8


def verdict(comparison: Comparison, level: float = LEVEL) -> list[str]:
    """Return the answer in sentences: the best and its equals, how sure, against the baseline, the gap closed."""
    best = comparison.best
    if best is None:
        return ["No run is finished, so there is nothing to compare yet."]
    count = len(comparison.settings)
    quoted = _quoted(comparison)
    if count == 1:
        return [f"Only one setting is finished ({best['label']}, {quoted}): there is nothing to compare it with."]
    what = "Best" if comparison.measure == "reward_accuracy" else "Lowest"
    measure = "reward accuracy" if comparison.measure == "reward_accuracy" else "loss"
    each = f", each at its own best {_and(comparison.nuisance)}" if comparison.nuisance else ""
    sentences = [f"{what} validation {measure} of {count} settings{each}: {best['label']} ({quoted})."]
    sentences += [*_equals(comparison, level), *_basis(comparison), *_against_baseline(comparison, level)]
    if comparison.part == "validation":
        sentences.append(
            "There is no test part: the quoted numbers are of the text that chose, and so a little flattering."
        )
    return sentences


def _and(nuisance: list[str]) -> str:
    return " and ".join(map(short_name, nuisance))


def _quoted(comparison: Comparison) -> str:
    best, column = comparison.best, comparison.column
    assert best is not None
    measure = {"ppl": "perplexity", "reward_accuracy": "reward accuracy"}.get(comparison.measure, "loss")
    seeds, sd = int(best["seeds"]), float(best[f"{column}_sd"])
    spread = "one seed" if seeds == 1 else f"SD {sd_text(sd)} over {seeds} seeds"
    at = f"at {best['best_at']}; " if comparison.nuisance else ""
    return f"{at}{comparison.part} {measure} {float(best[column]):.5g}, {spread}"


def _equals(comparison: Comparison, level: float) -> list[str]:
    if not comparison.has_set:
        return ["Whether the others are really worse, these data cannot say."]
    equals, others = comparison.equals, len(comparison.settings) - 1
    if not equals:
        return [f"All other settings are worse by more than the noise ({level:.0%} confidence)."]
    more = f"; and {len(equals) - MOST_NAMED} more" if len(equals) > MOST_NAMED else ""
    named = "; ".join(equals[:MOST_NAMED]) + more
    if len(equals) == others:
        return [f"No setting can be told from it ({level:.0%} confidence): {named}."]
    return [f"Cannot be told from it ({level:.0%} confidence), {len(equals)} of {others}: {named}."]


def _basis(comparison: Comparison) -> list[str]:
    """What noise was counted."""
    part = comparison.quoted
    assert part is not None
    seeds = np.isfinite(part.scores.losses).sum(axis=1)
    if seeds.max() == 1:
        return [
            "Each setting has one seed, and another seed may rank them differently: no intervals and no verdicts are "
            "given. Run seed=0,1,2."
        ]
    if not comparison.has_set:
        return []
    counts = f"{seeds.min()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
    documents = (
        f"and documents ({part.num_documents})" if part.num_documents else "alone; the documents are not counted"
    )
    sentences = [f"Noise counted: seeds ({counts} a setting) {documents}. All intervals hold together."]
    if comparison.nuisance:
        sentences.append(
            f"They also count the choice of the best {_and(comparison.nuisance)}, from {len(comparison.tried)} "
            "settings in all."
        )
    return sentences


def _against_baseline(comparison: Comparison, level: float) -> list[str]:
    best, settings = comparison.best, comparison.settings
    assert best is not None
    if settings["alpha"].isna().all():
        return []
    if not (settings["alpha"] == 0).any():
        return ["There is no baseline (train.alpha=0), so whether distilling helps at all is not answered."]
    if best["alpha"] == 0:
        return ["The best setting is the baseline itself (alpha 0): no distillation did better."]
    estimate, low, high, gap = (
        float(best[name]) for name in ("baseline_difference", "baseline_low", "baseline_high", "gap_closed")
    )
    if math.isnan(estimate):
        return ["The best setting has no baseline (train.alpha=0) with all else equal and a seed in common."]
    interval = "no interval" if math.isnan(low) else f"{level:.0%} interval {low:+.4f} to {high:+.4f}"
    sentences = [f"Against the baseline: {estimate:+.4f} nats per token ({interval}; {comparison.part} part)."]
    if math.isnan(gap):
        reason = "no teacher's loss is known that is clearly below the baseline's"
        return [*sentences, f"Which share of the gap to the teacher it closes is not said: {reason}."]
    return [
        *sentences,
        f"It closes {gap:.0%} of the gap between baseline and teacher (cross-entropy, validation part).",
    ]


def states(runs: Runs) -> str:
    """Return how many runs are in which state."""
    counts = runs.runs["state"].value_counts()
    words = [f"{counts[state]} {state}" for state in ("done", "failed", "running", "interrupted") if state in counts]
    return f"{len(runs.runs)} runs: {', '.join(words)}."


def method(level: float = LEVEL) -> list[str]:
    """Return how to read the numbers, for the end of a report."""
    return [
        "Loss is the student's cross-entropy at temperature 1 in nats per token, perplexity its exponential; both "
        "compare across alpha and temperature. The validation part chooses; numbers are of the test part, if any.",
        "A difference is between paired runs: same seeds, same documents. Its interval counts both, with the seeds' "
        f"spread pooled over settings. All intervals of a report hold together with {level:.0%} probability (Tukey and "
        "Kramer's), also for the pair that was picked for looking best.",
        "Worse: the interval of the difference to the best lies above 0. Equal: it does not, so these runs cannot tell "
        "the setting from the best; more seeds may. With one seed there are no intervals, and nothing is called worse.",
        "Each at its own best (--best-of): the settings named are chosen for each arm on the validation part, and the "
        "intervals are wide enough for whichever choice is truly best.",
        "Gap closed: (baseline loss - student loss) / (baseline loss - teacher loss), in nats, validation part.",
        "Clip rate: share of log points whose mean gradient norm, before clipping, lies above train.gradient_clip. "
        "Near 1, the clip sets the step size and acts as a learning rate that differs between settings.",
        "FLOPs and wall-clock are of the run itself, what the teacher computed during it included; what was made "
        "once for all runs (an embedded teacher, cached hidden states) is not in them.",
    ]
