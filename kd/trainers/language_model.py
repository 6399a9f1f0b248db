"""What the trainers on next-token targets share: plain cross-entropy, and scores per block."""

from typing import Any

from torch import Tensor

from kd.losses import causal_lm_loss
from kd.teacher import logits_of
from kd.trainers.base import BaseTrainer, Terms
from kd.trainers.evaluation import BlockScores, score_logits
from kd.trainers.state import Batch, C


class LanguageModelTrainer(BaseTrainer[C]):
    """Cross-entropy on next-token targets; the model gives logits, or an object or mapping that holds them."""

    loss_terms: tuple[str, ...] = ("ce_loss",)

    def _prepare_batch(self, batch: Batch) -> Batch:
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def _forward(self, batch: Batch) -> Any:
        return logits_of(self.model(batch["input_ids"]))

    def _compute_loss(self, outputs: Any, batch: Batch) -> tuple[Tensor, Terms]:
        loss = causal_lm_loss(outputs, batch["labels"])
        return loss, {"ce_loss": loss.detach()}

    def _score_batch(self, batch: Batch, with_teacher: bool) -> BlockScores:  # noqa: ARG002 - there is none
        return score_logits(logits_of(self.model(batch["input_ids"])), None, batch["labels"])
