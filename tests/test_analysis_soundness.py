"""What a comparison stands on: unsteady seeds, curves that rise or start late, edges of a grid, the clip."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd.analysis import best_of, compare, load_runs
from kd.analysis.soundness import rises, stalls

from .synthetic_runs import Sweep, make_grid


def warnings() -> str:
    """Compare all runs and return what speaks against the answer."""
    return " ".join(compare(load_runs("outputs")).warnings)


def test_a_sound_comparison_has_no_warnings() -> None:
    make_grid(Sweep())
    assert warnings() == ""


def test_seeds_that_differ_more_than_settings() -> None:
    sweep = Sweep(seed_spread=0.2, random=np.random.default_rng(1))
    for alpha in (0.0, 0.3, 0.5, 1.0):
        for seed in range(4):
            sweep.add(alpha, 1, 4.5, seed)
    assert "Seeds differ more than settings: standard deviation 0." in warnings()


def test_a_setting_whose_seeds_differ_far_more_than_the_others() -> None:
    sweep = Sweep()
    make_grid(sweep)
    for seed, loss in enumerate((5.0, 5.5, 6.2)):
        sweep.add(0.7, 1, loss, seed)
    assert "intervals with them may be too narrow: alpha 0.7, T 1 (0.6" in warnings()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5.0, 4.5, 4.2], False),
        ([5.0, 4.5, 4.53, 4.4], False),
        ([5.0, 4.5, 4.6, 4.4], True),
        ([5.0, 4.5, 4.9], False),  # the last takes other blocks
        ([5.0, 4.2], False),
    ],
)
def test_rises(values: list[float], expected: bool) -> None:
    assert rises(np.array(values)) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([8.0, 6.5, 6.0, 5.6, 5.4, 5.3, 5.3], False),
        ([8.0, 7.9, 7.9, 7.8, 6.5, 6.0, 5.5], True),
        ([8.0, 8.1, 8.0, 8.1, 8.0, 8.1, 8.0], True),
        ([8.0, 7.9, 5.0], False),  # too few to say
    ],
)
def test_stalls(values: list[float], expected: bool) -> None:
    assert stalls(np.array(values)) == expected


def test_runs_that_rise_or_start_late_are_counted_by_setting() -> None:
    sweep = Sweep()
    make_grid(sweep)
    late: dict[str, Any] = {"train_step": list(range(1, 8)), "train_loss": [8.0, 7.9, 7.9, 7.8, 6.5, 6.0, 5.5]}
    late["grad_norm"] = [0.1] * 7
    rising = {"val_step": [1, 2, 3, 4], "val_loss": [5.0, 4.5, 4.8, 5.3], "val_ppl": [148.0, 90.0, 121.0, 200.0]}
    rising |= {name: None for name in ("val_kl", "val_agreement")}
    for seed in range(2):
        sweep.add(0.7, 1, 5.3, seed, curves=late)
    sweep.add(0.7, 2, 5.3, 0, curves=rising)
    words = warnings()
    assert "second half of the steps (a late start) in 2 of 18 runs (alpha 0.7, T 1: 2)." in words
    assert "rises by more than 0.05 nats on the way in 1 of 18 runs (alpha 0.7, T 2: 1)." in words


def test_gradients_clipped_at_most_steps() -> None:
    sweep = Sweep()
    make_grid(sweep)
    sweep.add(0.7, 1, 4.5, curves={"grad_norm": [2.0, 1.5, 0.5]})
    assert "the clip sets the step size" in warnings()
    assert warnings().endswith("alpha 0.7, T 1 (67%).")


def test_best_values_at_the_edge_of_what_was_tried() -> None:
    sweep = Sweep(Path("outputs/made"))
    for seed in range(2):
        for rate, loss in ((0.001, 4.5), (0.003, 4.2), (0.01, 4.4)):
            sweep.add(1.0, 1, loss, seed, learning_rate=rate, warmup_steps=0)
            sweep.add(0.0, 1, loss + rate * 200, seed, learning_rate=rate, warmup_steps=0)
            sweep.add(1.0, 1, loss + 0.2, seed, learning_rate=rate, warmup_steps=100)
    runs = load_runs("outputs")
    edge = "The best learning_rate is the largest or smallest that was tried, so a better one may lie beyond, in 1 of 2"
    assert best_of(runs, ["learning_rate", "warmup_steps"]).warnings == [f"{edge}: alpha 0 (0.001)."]
    assert any(sentence.startswith(edge) for sentence in compare(runs).warnings)
