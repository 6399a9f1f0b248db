"""The trainers: one loop (`BaseTrainer`), one short file each."""

from kd.optim import configure_optimizer
from kd.trainers.base import BaseTrainer
from kd.trainers.distillation import DistillationTrainer
from kd.trainers.pretrain import PretrainTrainer

__all__ = ["BaseTrainer", "DistillationTrainer", "PretrainTrainer", "configure_optimizer"]
