"""Distillation: match a frozen teacher's next-token distribution.

Source: Hinton, Vinyals, Dean (2015), "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd.config import TrainingConfig
from kd.heads import logits_of
from kd.losses import distillation_loss
from kd.model import StudentModel, forward_flops_per_token
from kd.teacher import LiveTeacher, Teacher, check_finite
from kd.trainers.base import Terms
from kd.trainers.evaluation import BlockScores, score_logits, sum_blocks
from kd.trainers.language_model import LanguageModelTrainer, Loss
from kd.trainers.linear import NO_TEACHER, TeacherStates
from kd.trainers.state import Batch


class Logits(NamedTuple):
    """Both models' logits on a batch, (B, L, V)."""

    student: Tensor
    teacher: Tensor


class DistillationTrainer(LanguageModelTrainer[TrainingConfig]):
    """Train a student on alpha * T^2 * KL(teacher/T || student/T) + (1 - alpha) * cross-entropy.

    At `alpha=0` the teacher takes no part in training; where there is one, evaluations still compare with it.

    Args:
        student_model: The model that is trained.
        teacher_model: Gives logits as a tensor, an object with `.logits` or a mapping with "logits"; put into
            eval mode and frozen. Or any `Teacher`. None is allowed at `alpha=0`.
        train_loader, val_loader, config, device: As for `BaseTrainer`.
        run_dir: As for `BaseTrainer`.

    Raises:
        ValueError: if there is no teacher and `config.alpha` is above 0.
        NumericError: if a weight of the teacher is not finite.
    """

    config_class = TrainingConfig
    loss_terms: tuple[str, ...] = ("kl_loss", "ce_loss")

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: nn.Module | Teacher | None,
        train_loader: Iterable[Batch] | None,
        val_loader: Iterable[Batch] | None,
        config: TrainingConfig,
        device: torch.device | str,
        *,
        run_dir: Path | None = None,
    ) -> None:
        if teacher_model is None and config.alpha > 0:
            raise ValueError(f"train.alpha={config.alpha} needs a teacher_model, and None was given")
        if isinstance(teacher_model, nn.Module):
            teacher_model = LiveTeacher(teacher_model, torch.device(device))
        if teacher_model is not None:
            check_finite(teacher_model)
        self.teacher: Teacher | None = teacher_model
        if config.alpha == 0:
            self.loss_terms = ("ce_loss",)
        super().__init__(student_model, None, train_loader, val_loader, config=config, device=device, run_dir=run_dir)
        self._explain_nulls()

    def _explain_nulls(self) -> None:
        if self.config.alpha == 0:
            self.history.notes["kl_loss"] = "train.alpha=0: the teacher takes no part in training"
        if self.teacher is None:
            for key in ("val_kl", "val_agreement", "teacher_val_ppl"):
                self.history.notes[key] = "no teacher at hand"

    def _reason_for_logits(self) -> str | None:
        if self.teacher is not None and self.teacher.head is None:
            return f"the teacher gives nothing else ({self.teacher.description})"
        return None

    def _forward(self, batch: Batch) -> Any:
        alpha = self.config.alpha
        if alpha == 0:
            return super()._forward(batch)
        if self.teacher is None:  # a loaded checkpoint has brought another alpha
            raise ValueError(f"train.alpha={alpha} needs a teacher_model, and None was given")
        if self.linear_loss is None:
            return Logits(logits_of(self.module(batch["input_ids"])), _logits(self.teacher, batch))
        states = self._teacher_states(batch)
        return Loss(*self.module(batch["input_ids"], batch["labels"], states, alpha, self.config.temperature))

    def _teacher_states(self, batch: Batch) -> TeacherStates:
        assert self.teacher is not None
        assert self.teacher.head is not None
        return TeacherStates.of(self.teacher.hidden(batch), self.teacher.head)

    def _compute_loss(self, outputs: Any, batch: Batch) -> tuple[Tensor, Terms]:
        if not isinstance(outputs, Logits):
            return super()._compute_loss(outputs, batch)
        loss, terms = distillation_loss(
            outputs.student, outputs.teacher, batch["labels"], self.config.alpha, self.config.temperature
        )
        return loss, {name: terms[name] for name in self.loss_terms}

    def _score_batch(self, batch: Batch, with_teacher: bool) -> BlockScores:
        teacher = self.teacher if with_teacher else None
        if self.linear_loss is not None:
            states = NO_TEACHER if teacher is None else self._teacher_states(batch)
            return sum_blocks(self.linear_loss.scores(batch["input_ids"], batch["labels"], states), batch["labels"])
        student = logits_of(self.model(batch["input_ids"]))
        return score_logits(student, None if teacher is None else teacher.logits(batch), batch["labels"])

    def _flops_per_token(self, length: float) -> float:
        own = super()._flops_per_token(length)
        return own if self.teacher is None or self.config.alpha == 0 else own + _forward_flops(self.teacher, length)

    def _get_extra_config_info(self) -> dict[str, Any]:
        teacher = "none" if self.teacher is None else self.teacher.description
        own = {"alpha": self.config.alpha, "temperature": self.config.temperature, "teacher": teacher}
        return own | super()._get_extra_config_info()


def _logits(teacher: Teacher, batch: Batch) -> Tensor:
    with torch.autocast(batch["input_ids"].device.type, enabled=False):  # its precision is its own concern
        return teacher.logits(batch)


def _forward_flops(teacher: Teacher, length: float) -> float:
    if isinstance(teacher, LiveTeacher) and isinstance(teacher.model, StudentModel):
        return forward_flops_per_token(teacher.model.config, length)
    return teacher.flops_per_token
