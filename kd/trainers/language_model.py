"""What the trainers on next-token targets share: cross-entropy, and scores per block, without logits where possible."""

import logging
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor, nn

from kd.errors import ConfigError
from kd.heads import NoLinearHeadError, logits_of
from kd.losses import causal_lm_loss
from kd.trainers.base import BaseTrainer, Terms
from kd.trainers.evaluation import BlockScores, score_logits, sum_blocks
from kd.trainers.linear import LinearLoss
from kd.trainers.state import Batch, C

log = logging.getLogger("kd")

STAYS_ON_CPU = "block_id"
"""Looked up in files and tables, never computed with."""


class Loss(NamedTuple):
    """A loss that was computed together with the forward pass."""

    value: Tensor
    terms: Terms


class LanguageModelTrainer(BaseTrainer[C]):
    """Cross-entropy on next-token targets; the model gives logits, or an object or mapping that holds them.

    A model with a linear head is trained without ever computing the logits of a whole batch.
    """

    loss_terms: tuple[str, ...] = ("ce_loss",)

    @cached_property
    def linear_loss(self) -> LinearLoss | None:
        """The path without logits; None where the model does not allow it (the log then says why)."""
        reason = self._reason_for_logits()
        if reason is None:
            try:
                return LinearLoss(self.model, compile_body=self.config.compile)
            except NoLinearHeadError as error:
                reason = f"the model allows no other: {error}"
        if self.config.compile:
            raise ConfigError(f"train.compile=true has no effect here, since the loss needs full logits: {reason}.")
        log.info("The loss is computed on full logits: %s", reason)
        return None

    def _reason_for_logits(self) -> str | None:
        """Return what, other than the model, asks for full logits; None if nothing does."""
        return None

    def _trained_module(self) -> nn.Module:
        return self.model if self.linear_loss is None else self.linear_loss

    def _prepare_batch(self, batch: Batch) -> Batch:
        return {
            name: value if name == STAYS_ON_CPU else value.to(self.device, non_blocking=True)
            for name, value in batch.items()
        }

    def _forward(self, batch: Batch) -> Any:
        if self.linear_loss is not None:
            return Loss(*self.module(batch["input_ids"], batch["labels"]))
        return logits_of(self.module(batch["input_ids"]))

    def _compute_loss(self, outputs: Any, batch: Batch) -> tuple[Tensor, Terms]:
        if isinstance(outputs, Loss):
            return outputs.value, {name: outputs.terms[name] for name in self.loss_terms}
        loss = causal_lm_loss(outputs, batch["labels"])
        return loss, {"ce_loss": loss.detach()}

    def _score_batch(self, batch: Batch, with_teacher: bool) -> BlockScores:  # noqa: ARG002 - there is none
        if self.linear_loss is not None:
            return sum_blocks(self.linear_loss.scores(batch["input_ids"], batch["labels"]), batch["labels"])
        return score_logits(logits_of(self.model(batch["input_ids"])), None, batch["labels"])

    def _get_extra_config_info(self) -> dict[str, Any]:
        return {"loss": "on full logits" if self.linear_loss is None else "from hidden states"}
