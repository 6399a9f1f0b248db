"""Trainers by name, for scripts that take the name from their command line."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kd.config import TrainerConfig
from kd.trainers.base import BaseTrainer
from kd.trainers.distillation import DistillationTrainer
from kd.trainers.dpo import DPOTrainer
from kd.trainers.grpo import GRPOTrainer
from kd.trainers.orpo import ORPOTrainer
from kd.trainers.pretrain import PretrainTrainer
from kd.trainers.sft import SFTTrainer
from kd.trainers.state import Batch

_CLASSES: dict[str, type[BaseTrainer[Any]]] = {
    "pretrain": PretrainTrainer,
    "sft": SFTTrainer,
    "dpo": DPOTrainer,
    "orpo": ORPOTrainer,
    "grpo": GRPOTrainer,
    "distillation": DistillationTrainer,
}


def get_trainer_class(name: str) -> type[BaseTrainer[Any]]:
    """Return the trainer of a name: pretrain, sft, dpo, orpo, grpo or distillation.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in _CLASSES:
        raise ValueError(f"trainer={name} is unknown: use one of {', '.join(_CLASSES)}.")
    return _CLASSES[name]


def create_trainer(
    name: str,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    train_loader: Iterable[Batch] | None = None,
    val_loader: Iterable[Batch] | None = None,
    *,
    lr_scheduler: LRScheduler | None = None,
    config: TrainerConfig | None = None,
    device: torch.device | str | None = None,
    run_dir: Path | None = None,
) -> BaseTrainer[Any]:
    """Return a trainer by name, with the arguments that all share; see `BaseTrainer`.

    What only one trainer takes (a reference, a reward function, a teacher) is given to its class.

    Raises:
        ValueError: if the name is unknown, or that of a trainer that cannot do without arguments of its own, or if
            the config is another trainer's.
    """
    trainer_class = get_trainer_class(name)
    if trainer_class is DistillationTrainer:
        raise ValueError("trainer=distillation needs a teacher: make a DistillationTrainer itself.")
    wanted = trainer_class.config_class
    if config is not None and not isinstance(config, wanted):
        raise ValueError(f"trainer={name} needs a config of {wanted.__name__}, and got one of {type(config).__name__}.")
    return trainer_class(
        model,
        optimizer,
        train_loader,
        val_loader,
        lr_scheduler=lr_scheduler,
        config=config,
        device=device,
        run_dir=run_dir,
    )
