"""How the rows of an optimizer step are cut into micro-batches changes no trainer's run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

from kd.trainers.base import BaseTrainer
from kd.trainers.state import Batch

from .examples import dpo, grpo, make_answers, make_pairs, make_rollouts, orpo, sft
from .helpers import LENGTH, distill, make_batch, make_student, pretrain, weights

ROWS = 8
SIZES = {"8x1": [1] * 8, "4x2": [2] * 4, "1x8": [8], "5+1+2": [5, 1, 2]}
"""Rows of the micro-batches of a step."""
STEPS, WINDOWS = 20, 5
TOLERANCE = 1e-5


@dataclass
class Case:
    """A trainer and the rows of its steps, `scale` of them to one of a batch."""

    make: Callable[..., BaseTrainer[Any]]
    window: Callable[[int], Batch]
    scale: int = 1


def blocks(seed: int) -> Batch:
    return make_batch(ROWS, seed, masked=[(3 * row + seed) % (LENGTH + 1) for row in range(ROWS)])


CASES = {
    "pretrain": Case(pretrain, blocks),
    "distillation": Case(distill, blocks),
    "sft": Case(sft, lambda seed: make_answers(ROWS, seed)),
    "dpo": Case(dpo, lambda seed: make_pairs(ROWS, seed)),
    "orpo": Case(orpo, lambda seed: make_pairs(ROWS, seed)),
    "grpo": Case(grpo, lambda seed: make_rollouts(ROWS, seed), scale=2),
}
EXTRA: dict[str, dict[str, Any]] = {
    "distillation": {"alpha": 0.6, "temperature": 2.0},
    "dpo": {"label_smoothing": 0.1},
    "grpo": {"kl_coef": 0.1, "entropy_coef": 0.05},
}


def cut(window: Batch, sizes: Sequence[int], scale: int) -> list[Batch]:
    bounds = [scale * sum(sizes[:i]) for i in range(1, len(sizes))]
    parts = {name: value.tensor_split(bounds) for name, value in window.items()}
    return [{name: values[i] for name, values in parts.items()} for i in range(len(sizes))]


def run(name: str, split: str) -> tuple[dict[str, Tensor], dict[str, list[Any]]]:
    """Return the weights and the records after 20 steps of the same rows in other micro-batches."""
    case, sizes = CASES[name], SIZES[split]
    batches = [part for seed in range(WINDOWS) for part in cut(case.window(seed), sizes, case.scale)]
    settings = {"optimizer": "sgd", "learning_rate": 0.02, "schedule": "constant", "log_interval": 4}
    settings |= {"num_epochs": STEPS // WINDOWS, "gradient_accumulation_steps": len(sizes), **EXTRA.get(name, {})}
    trainer = case.make(make_student(), batches, **settings)
    history = trainer.train()
    assert trainer.step == STEPS
    return weights(trainer.model), {key: history[key] for key in ("train_loss", "grad_norm", *trainer.loss_terms)}


@pytest.mark.parametrize("name", CASES)
def test_the_cut_into_micro_batches_does_not_matter(name: str) -> None:
    expected, expected_records = run(name, "1x8")
    assert abs(expected_records["train_loss"][-1] / expected_records["train_loss"][0] - 1) > 0.02
    for split in ("8x1", "4x2", "5+1+2"):
        found, records = run(name, split)
        worst = max(float((found[key] - expected[key]).norm() / expected[key].norm()) for key in expected)
        assert worst < TOLERANCE
        for key, column in expected_records.items():
            assert records[key] == pytest.approx(column, rel=TOLERANCE, abs=1e-6), (split, key)


@pytest.mark.parametrize("name", CASES)
def test_the_tolerance_tells_a_step_of_other_rows(name: str) -> None:
    """Without this, the test above could pass because nothing in these runs matters."""
    case = CASES[name]
    moved = []
    for rows in (ROWS, ROWS - 1):
        batch = cut(case.window(0), [rows, ROWS - rows], case.scale)[0]
        trainer = case.make(make_student(), [batch], optimizer="sgd", num_epochs=1, **EXTRA.get(name, {}))
        trainer.train()
        moved.append(weights(trainer.model)["embedding.weight"])
    assert float((moved[0] - moved[1]).norm() / moved[0].norm()) > 10 * TOLERANCE
