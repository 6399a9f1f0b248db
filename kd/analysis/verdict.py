"""The comparison in sentences, including what the data do not say."""

import math

import numpy as np

from kd.analysis.comparison import Comparison, sd_text
from kd.analysis.loading import Runs
from kd.analysis.statistics import LEVEL, MIN_DOCUMENTS

MOST_NAMED = 8


def verdict(comparison: Comparison, level: float = LEVEL) -> list[str]:
    """Return the answer in sentences: the best and its equals, how sure, against the baseline, the gap closed."""
    best = comparison.best
    if best is None:
        return ["No run is finished, so there is nothing to compare yet."]
    count = len(comparison.settings)
    seeds = int(best["seeds"])
    quoted = _quoted(comparison)
    if count == 1:
        return [f"Only one setting is finished ({best['label']}, {quoted}): there is nothing to compare it with."]
    sentences = [f"Lowest validation loss of {count} settings: {best['label']} ({quoted})."]
    sentences.append(_equals(comparison, level))
    sentences += _basis(comparison)
    sentences += _against_baseline(comparison, level)
    if seeds == 1 and comparison.part == "validation":
        sentences.append("With one seed and no test part, the winner's number is flattered by having been chosen.")
    elif comparison.part == "validation":
        sentences.append(
            "There is no test part: the quoted numbers are of the text that chose, and so a little flattering."
        )
    return sentences


def _quoted(comparison: Comparison) -> str:
    best, column = comparison.best, comparison.column
    assert best is not None
    measure = "perplexity" if comparison.measure == "ppl" else "loss"
    seeds, sd = int(best["seeds"]), float(best[f"{column}_sd"])
    spread = "one seed" if seeds == 1 else f"SD {sd_text(sd)} over {seeds} seeds"
    return f"{comparison.part} {measure} {float(best[column]):.5g}, {spread}"


def _equals(comparison: Comparison, level: float) -> str:
    if not comparison.has_set:
        return "Whether the others are really worse, these data cannot say."
    equals = comparison.equals
    if not equals:
        return f"All other settings are worse by more than the noise ({level:.0%} confidence)."
    named = "; ".join(equals[:MOST_NAMED]) + (
        f"; and {len(equals) - MOST_NAMED} more" if len(equals) > MOST_NAMED else ""
    )
    if len(equals) == len(comparison.settings) - 1:
        return f"No setting can be told from it ({level:.0%} confidence): {named}."
    return f"Cannot be told from it ({level:.0%} confidence), {len(equals)} of {len(comparison.settings) - 1}: {named}."


def _basis(comparison: Comparison) -> list[str]:
    """What noise was counted."""
    part = comparison.validation
    assert part is not None
    seeds = np.isfinite(part.scores.losses).sum(axis=1)
    if seeds.max() == 1:
        if not part.num_documents:
            return [
                "Each setting has one seed and the documents cannot be used, so no interval and no set of equals is "
                "given: run more seeds (seed=0,1,2)."
            ]
        return [
            f"Each setting has one seed: intervals and equals count the choice of documents ({part.num_documents}) "
            "alone, so they are about these trained models. Another seed may rank them differently: run seed=0,1,2."
        ]
    if not comparison.has_set:
        return []
    range_ = f"{seeds.min()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
    documents = (
        f"and documents ({part.num_documents})" if part.num_documents else "alone; the documents are not counted"
    )
    return [f"Noise counted: seeds ({range_} a setting) {documents}. Intervals are for one pair at a time."]


def _against_baseline(comparison: Comparison, level: float) -> list[str]:
    best, settings = comparison.best, comparison.settings
    assert best is not None
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
        "A difference is between paired runs: same seeds, same documents. Its interval joins Student's interval over "
        "the per-seed differences with that over documents, and stands for that one pair; with one seed it is a "
        f"bootstrap over whole documents. Parts with fewer than {MIN_DOCUMENTS} documents give none.",
        f"The equals of the best are a set that holds the truly best of these settings with {level:.0%} probability "
        "(multiple comparisons with the best, Hsu 1984, on the validation part). It and the intervals may differ: it "
        "makes up for the number of settings and pools seed noise over them, an interval stands for its pair alone.",
        "Gap closed: (baseline loss - student loss) / (baseline loss - teacher loss), in nats, validation part.",
        "Clip rate: share of log points whose mean gradient norm, before clipping, lies above train.gradient_clip. "
        "Near 1, the clip sets the step size and acts as a learning rate that differs between settings.",
        "FLOPs and wall-clock are of the run itself, what the teacher computed during it included; what was made "
        "once for all runs (an embedded teacher, cached hidden states) is not in them.",
    ]
