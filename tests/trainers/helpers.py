"""Small models, ragged batches, and what a trainer's run leaves, in a form that compares."""

import signal
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd.config import ModelConfig, PretrainConfig, TrainingConfig
from kd.losses import IGNORE_INDEX
from kd.model import StudentModel
from kd.trainers import DistillationTrainer, PretrainTrainer
from kd.trainers.state import Batch

LENGTH = 8
VOCAB = 13
BYTES = 257
"""Vocabulary of the packed store: the bytes and the end-of-text token."""

AnyTrainer = PretrainTrainer | DistillationTrainer
MakeTrainer = Callable[..., AnyTrainer]


def make_student(seed: int = 0, *, dropout: float = 0.0, vocab_size: int = VOCAB) -> StudentModel:
    """Return a small student; its weights depend on the seed alone."""
    torch.manual_seed(seed)
    config = ModelConfig(
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=24,
        vocab_size=vocab_size,
        max_seq_len=LENGTH,
        rope_theta=10000.0,
        dropout=dropout,
    )
    model = StudentModel(config)
    with torch.no_grad():  # the usual initialisation gives nearly uniform predictions, which hide mistakes
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return model


def make_batch(rows: int, seed: int = 0, masked: Iterable[int] = (), vocab_size: int = VOCAB) -> Batch:
    """Return one batch; `masked` says how many leading labels of each row are ignored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (rows, LENGTH + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    for row, count in enumerate(masked):
        labels[row, :count] = IGNORE_INDEX
    return {"input_ids": tokens[:, :-1].clone(), "labels": labels, "block_id": torch.arange(rows)}


def split(batch: Batch, rows: int) -> list[Batch]:
    """Cut a batch into batches of `rows` rows."""
    total = len(batch["labels"])
    return [{name: x[start : start + rows] for name, x in batch.items()} for start in range(0, total, rows)]


def make_batches(count: int, rows: int = 2, seed: int = 0) -> list[Batch]:
    """Return batches with ragged masks."""
    return [
        make_batch(rows, seed=100 * seed + i, masked=[(3 * i + row) % LENGTH for row in range(rows)])
        for i in range(count)
    ]


def pretrain(model: nn.Module, train: Any, val: Any = None, **settings: Any) -> PretrainTrainer:
    """Return a PretrainTrainer; `run_dir` and the config's fields are keywords."""
    run_dir = settings.pop("run_dir", None)
    config = PretrainConfig(**{"warmup_steps": 0, "learning_rate": 1e-2, **settings})
    return PretrainTrainer(model, train_loader=train, val_loader=val, config=config, device="cpu", run_dir=run_dir)


def distill(model: nn.Module, train: Any, val: Any = None, **settings: Any) -> DistillationTrainer:
    """Return a DistillationTrainer with a teacher of the student's shape."""
    run_dir = settings.pop("run_dir", None)
    teacher = settings.pop("teacher", None)
    if teacher is None:
        random_state = torch.get_rng_state()
        assert isinstance(model, StudentModel)
        teacher = make_student(seed=77, vocab_size=model.config.vocab_size)
        torch.set_rng_state(random_state)
    config = TrainingConfig(**{"warmup_steps": 0, "learning_rate": 1e-2, **settings})
    return DistillationTrainer(model, teacher, train, val, config, torch.device("cpu"), run_dir=run_dir)


TRAINERS: dict[str, MakeTrainer] = {"pretrain": pretrain, "distill": distill}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of all weights."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Return whether two sets of tensors are equal bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def first_gradients(trainer: AnyTrainer) -> dict[str, Tensor]:
    """Train, and return the gradients that the first optimizer step was given."""
    gradients: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        if not gradients:
            found = {name: p.grad for name, p in trainer.model.named_parameters()}
            gradients.update({name: grad.clone() for name, grad in found.items() if grad is not None})

    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    return gradients


def stop_in(trainer: AnyTrainer, step: int, signum: int = signal.SIGTERM) -> None:
    """Ask the trainer to stop while it takes optimizer step `step`."""

    def ask(*_: Any) -> None:
        if trainer.step + 1 == step:
            trainer.stop.request(signum)

    trainer.optimizer.register_step_post_hook(ask)


def history_of(trainer: AnyTrainer) -> dict[str, Any]:
    """Return a trainer's history without what a clock measures."""
    history = asdict(trainer.history)
    del history["timing"]
    return history


def checkpoints_in(run_dir: Path) -> list[int]:
    """Return the steps of a run's checkpoints."""
    return sorted(int(path.name.split("-")[1]) for path in (run_dir / "checkpoints").glob("checkpoint-*"))


def summed_nll(model: nn.Module, batches: list[Batch]) -> tuple[float, int]:
    """Return the summed negative log-likelihood of all valid tokens, in float64, and their number."""
    total, tokens = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            log_p = torch.log_softmax(model(batch["input_ids"]).double(), dim=-1)
        for row, column in (batch["labels"] != IGNORE_INDEX).nonzero().tolist():
            total -= float(log_p[row, column, batch["labels"][row, column]])
            tokens += 1
    return total, tokens
