"""The trainers: one loop (`BaseTrainer`), one short file each."""

from kd.optim import configure_optimizer, create_optimizer, create_schedule, get_parameter_groups
from kd.trainers.base import BaseTrainer
from kd.trainers.distillation import DistillationTrainer
from kd.trainers.dpo import DPOTrainer
from kd.trainers.factory import create_trainer, get_trainer_class
from kd.trainers.grpo import GRPOTrainer
from kd.trainers.orpo import ORPOTrainer
from kd.trainers.pretrain import PretrainTrainer
from kd.trainers.sft import SFTTrainer

__all__ = [
    "BaseTrainer",
    "DPOTrainer",
    "DistillationTrainer",
    "GRPOTrainer",
    "ORPOTrainer",
    "PretrainTrainer",
    "SFTTrainer",
    "configure_optimizer",
    "create_optimizer",
    "create_schedule",
    "create_trainer",
    "get_parameter_groups",
    "get_trainer_class",
]
