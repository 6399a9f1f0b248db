"""Small trainings that one process does with the accumulation of two that share it."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd.distributed import get_world_size, process_group
from kd.model import StudentModel
from kd.trainers.base import BaseTrainer
from kd.trainers.state import Batch

from ..trainers.examples import dpo, grpo, make_answers, make_pairs, make_rollouts, orpo, sft
from ..trainers.helpers import LENGTH, distill, make_batch, make_batches, make_student, pretrain

STEPS, EPOCHS = 20, 4
ACCUMULATION = 4
"""Micro-batches of an optimizer step, of all processes."""
SIZES = (3, 1, 2, 2)
"""Rows of the micro-batches of a step."""
BATCHES = 17
"""Of an epoch: its last step has one micro-batch, and so nothing for a second process."""


class LogitsOnly(nn.Module):
    """A student of which nothing but its logits can be seen."""

    def __init__(self, student: StudentModel) -> None:
        super().__init__()
        self.student = student

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.student(input_ids)
        return logits


@dataclass(frozen=True)
class Job:
    """A trainer and the rows of its steps, `scale` of them to one of a batch."""

    make: Callable[..., BaseTrainer[Any]]
    window: Callable[[int], Batch]
    scale: int = 1
    settings: tuple[tuple[str, Any], ...] = ()
    wrap: Callable[[StudentModel], nn.Module] | None = None


def blocks(seed: int) -> Batch:
    """Rows of which some have no label at all."""
    return make_batch(sum(SIZES), seed, masked=[(3 * row + seed) % (LENGTH + 1) for row in range(sum(SIZES))])


ROWS = sum(SIZES)
JOBS = {
    "pretrain": Job(pretrain, blocks),
    "logits": Job(pretrain, blocks, wrap=LogitsOnly),
    "recomputed": Job(pretrain, blocks, settings=(("gradient_checkpointing", True),)),
    "distillation": Job(distill, blocks, settings=(("alpha", 0.6),)),
    "sft": Job(sft, lambda seed: make_answers(ROWS, seed)),
    "dpo": Job(dpo, lambda seed: make_pairs(ROWS, seed), settings=(("label_smoothing", 0.1),)),
    "orpo": Job(orpo, lambda seed: make_pairs(ROWS, seed)),
    "grpo": Job(
        grpo, lambda seed: make_rollouts(ROWS, seed), scale=2, settings=(("kl_coef", 0.1), ("entropy_coef", 0.05))
    ),
    "grpo twice": Job(
        grpo, lambda seed: make_rollouts(ROWS, seed), scale=2, settings=(("optimization_epochs", 2), ("num_epochs", 2))
    ),
}
FOR_FSDP = ("pretrain", "logits", "recomputed", "distillation", "sft", "orpo")
SAVED_AT = 10
"""The step of the checkpoint on the way."""


def make_trainer(name: str, run_dir: Path | None = None, seed: int = 0, **settings: Any) -> BaseTrainer[Any]:
    """Return a job's trainer with this process's share of the accumulation."""
    job = JOBS[name]
    bounds = [job.scale * sum(SIZES[:index]) for index in range(1, len(SIZES))]
    batches = []
    for window in range(-(-BATCHES // ACCUMULATION)):
        parts = {key: value.tensor_split(bounds) for key, value in job.window(window).items()}
        batches += [{key: values[index] for key, values in parts.items()} for index in range(len(SIZES))]
    student = make_student(seed)
    return job.make(
        student if job.wrap is None else job.wrap(student),
        batches[:BATCHES],
        **{
            "num_epochs": EPOCHS,
            "gradient_accumulation_steps": ACCUMULATION // get_world_size(),
            "log_interval": 1,
            "learning_rate": 3e-3,
            "save_interval": SAVED_AT,
            "run_dir": run_dir,
            **dict(job.settings),
            **settings,
        },
    )


def do_job(name: str, run_dir: Path, **settings: Any) -> None:
    """Train, leaving checkpoints and a history."""
    trainer = make_trainer(name, run_dir, **settings)
    if name in ("pretrain", "distillation"):
        # Before training, whose rounding differs: here every digit must be the same. Five batches are no multiple of 2.
        scores = [trainer.score(make_batches(5, seed=1), limit).metrics() for limit in (None, 5)]
        if trainer.is_main:
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "scores.json").write_text(json.dumps(scores))
    trainer.train()
    assert trainer.step == STEPS


def main(folder: str) -> None:
    """Do all jobs in the processes of torchrun."""
    torch.set_num_threads(1)
    with process_group("cpu"):
        for name in JOBS:
            do_job(name, Path(folder) / "ddp" / name)
        for name in FOR_FSDP:
            do_job(name, Path(folder) / "fsdp" / name, strategy="fsdp")


if __name__ == "__main__":
    main(*sys.argv[1:])
