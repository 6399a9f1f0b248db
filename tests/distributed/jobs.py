"""Small trainings that one process does with the accumulation of two that share it."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from kd.adapters import add_adapters
from kd.config import LoRAConfig, PretrainConfig
from kd.data import PositionedLoader
from kd.data.loaders import BatchOrder
from kd.distributed import alone, get_rank, get_world_size, is_distributed, process_group
from kd.errors import KDError
from kd.model import StudentModel
from kd.trainers import PretrainTrainer, configure_optimizer
from kd.trainers.base import BaseTrainer
from kd.trainers.state import Batch
from tests.trainers.examples import dpo, grpo, make_answers, make_pairs, make_rollouts, orpo, sft
from tests.trainers.helpers import LENGTH, distill, make_batch, make_batches, make_student, pretrain

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


def with_adapters(student: StudentModel) -> StudentModel:
    """Give a student adapters, always the same ones."""
    torch.manual_seed(1)
    add_adapters(student, LoRAConfig(rank=2, lora_alpha=4))
    return student


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
ADAPTED = {
    "lora": Job(pretrain, blocks, wrap=with_adapters),
    "lora dpo": replace(JOBS["dpo"], wrap=with_adapters),
    "lora grpo": replace(JOBS["grpo"], wrap=with_adapters),
}
"""Jobs that need peft, whose references are the weights beside the adapters."""
FOR_FSDP = ("pretrain", "logits", "recomputed", "distillation", "sft", "orpo")
SAVED_AT = 8
"""The step of the checkpoint on the way, amid an epoch."""


def make_trainer(name: str, run_dir: Path | None = None, seed: int = 0, **settings: Any) -> BaseTrainer[Any]:
    """Return a job's trainer with this process's share of the accumulation."""
    job = (JOBS | ADAPTED)[name]
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


def continue_job(name: str, checkpoint: Path, run_dir: Path, **settings: Any) -> None:
    """Train from a checkpoint to the end; the model that it is loaded into begins with other weights, if it can."""
    # A reference, and the weights beside adapters, are what the model begins with.
    keeps_its_start = name.startswith(("dpo", "grpo")) or name in ADAPTED
    trainer = make_trainer(name, run_dir, seed=0 if keeps_its_start else 9, **settings)
    trainer.load_checkpoint(checkpoint)
    trainer.train()


def train(folder: str, *names: str) -> None:
    """Do jobs with both strategies."""
    for name in names or JOBS:
        do_job(name, Path(folder) / "ddp" / name)
        if name in FOR_FSDP:
            do_job(name, Path(folder) / "fsdp" / name, strategy="fsdp")


def go_on(folder: str) -> None:
    """Continue every run of a job with both strategies from its checkpoint on the way."""
    for run in sorted(Path(folder).glob("*/*")):
        for strategy in ("ddp", "fsdp") if run.name in FOR_FSDP else ("ddp",):
            end = run / f"to-{strategy}"
            continue_job(run.name, run / "checkpoints" / f"checkpoint-{SAVED_AT}", end, strategy=strategy)


def fault(folder: str, name: str) -> None:
    """Do what must be refused, or end, in every process."""
    FAULTS[name](Path(folder))


def _unequal_batches(folder: Path) -> None:
    pretrain(make_student(), make_batches(5 + get_rank()), run_dir=folder)


def _shuffled(folder: Path) -> None:
    batches: Any = DataLoader(make_batches(6), batch_size=None, shuffle=True)  # type: ignore[arg-type]
    pretrain(make_student(), batches, run_dir=folder)


def _model_called_alone(folder: Path) -> None:
    class Careless(PretrainTrainer):
        def _reason_for_logits(self) -> str:
            return "a test"

        def _forward(self, batch: Batch) -> Tensor:
            logits: Tensor = self.model(batch["input_ids"])
            return logits

    Careless(make_student(), None, make_batches(6), config=PretrainConfig(), run_dir=folder).train()


def _out_of_memory(folder: Path) -> None:
    trainer = pretrain(make_student(), make_batches(6), run_dir=folder, max_steps=3)

    def fail(*_: Any) -> None:
        if get_rank() == 1 and trainer.step == 1:
            raise MemoryError("a tensor of 80 GB")

    trainer.optimizer.register_step_post_hook(fail)
    trainer.train()


def _an_optimizer_of_whole_weights(folder: Path) -> None:
    model = make_student()
    config = PretrainConfig(strategy="fsdp")
    PretrainTrainer(model, configure_optimizer(model), make_batches(6), config=config, run_dir=folder)


def _three_to_two(folder: Path) -> None:
    with alone():
        one = pretrain(make_student(), make_batches(6), gradient_accumulation_steps=3)
        one.save_checkpoint(folder / f"rank{get_rank()}")
    pretrain(make_student(), make_batches(6)).load_checkpoint(folder / "rank0")


FAULTS: dict[str, Callable[[Path], None]] = {
    "unequal": _unequal_batches,
    "shuffled": _shuffled,
    "careless": _model_called_alone,
    "memory": _out_of_memory,
    "optimizer": _an_optimizer_of_whole_weights,
    "three": _three_to_two,
}


class Rows(Dataset[Batch]):
    """Rows that are asked for by lists of indexes, as a `PositionedLoader` does."""

    def __init__(self, rows: list[Batch]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indexes: Any) -> Batch:
        return {key: torch.stack([self.rows[index][key] for index in indexes]) for key in self.rows[0]}


def own_loaders(folder: str) -> None:
    """Train on a DataLoader that deals itself, on a plain one, and on loaders of kd.data; keep the losses."""
    batches = make_batches(6)
    rows = [{key: value[row] for key, value in batch.items()} for batch in batches for row in range(2)]
    dataset: Any = rows
    sampler: Any = (
        DistributedSampler(dataset, get_world_size(), get_rank(), shuffle=False) if is_distributed() else None
    )
    for name, loader in {
        "dealing": DataLoader(dataset, batch_size=1, sampler=sampler),
        "plain": DataLoader(dataset, batch_size=1),
        **{
            f"{name} {workers}": PositionedLoader(Rows(rows), BatchOrder(len(rows), 1, seed), workers)
            for name, seed in (("in order", None), ("shuffled", 5))
            for workers in (0, 2)
        },
    }.items():
        trainer = pretrain(
            make_student(),
            loader,
            num_epochs=2,
            log_interval=1,
            gradient_accumulation_steps=4 // get_world_size(),
            run_dir=Path(folder) / name,
        )
        trainer.train()


def dropout(folder: str) -> None:
    """Keep what each process draws in training; all were seeded alike."""
    trainer = pretrain(make_student(dropout=0.5), make_batches(4), num_epochs=1, run_dir=Path(folder))
    trainer.train()
    (Path(folder) / f"rank{get_rank()}").write_text(repr(float(torch.rand(()))))


ACTIONS: dict[str, Callable[..., None]] = {
    "train": train,
    "go_on": go_on,
    "fault": fault,
    "own_loaders": own_loaders,
    "dropout": dropout,
}


def main(action: str, *arguments: str) -> None:
    """Do something in the processes of torchrun; an error of the user's ends them with its exit code."""
    torch.set_num_threads(1)
    try:
        with process_group("cpu"):
            ACTIONS[action](*arguments)
    except (KDError, ValueError) as error:
        print(f"rank {os.environ['RANK']}: {error}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, KDError) else 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
