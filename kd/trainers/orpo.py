"""Odds-ratio preference optimisation: fine-tuning on the chosen answer and its preference in one, without a reference.

Source: Hong et al. 2024, arXiv:2403.07691, eq. 6.
"""

from typing import Any

import torch
from torch import Tensor

from kd.config import ORPOConfig
from kd.losses import IGNORE_INDEX
from kd.preference_losses import orpo_odds_ratio_loss
from kd.trainers.base import Terms
from kd.trainers.evaluation import ExampleScores
from kd.trainers.preferences import PairLogprobs, PreferenceTrainer
from kd.trainers.state import Batch


class ORPOTrainer(PreferenceTrainer[ORPOConfig]):
    """Train on pairs of answers with ORPO. Batches: see `PreferenceTrainer`.

    The loss is the chosen answers' cross-entropy, a mean over their tokens, plus `beta` times the odds-ratio loss, a
    mean over pairs. An answer's reward is beta times its mean log-probability. TRL's ORPOTrainer counts the prompt's
    tokens in the cross-entropy too; here, as in SFT, prompts are not learned.
    """

    config_class = ORPOConfig
    loss_terms = ("ce_loss", "odds_ratio_loss", "reward_margin", "reward_accuracy")
    units_of_terms = {"ce_loss": 0}  # noqa: RUF012 - never changed

    def _forward(self, batch: Batch) -> PairLogprobs:
        return self._pair_logprobs(self.module, batch)

    def _count_units(self, batch: Batch) -> Tensor:
        pairs = len(batch["labels"]) // 2
        chosen_tokens = (batch["labels"][:pairs] != IGNORE_INDEX).sum()
        return torch.stack([chosen_tokens, torch.full_like(chosen_tokens, pairs)])

    def _compute_loss(self, outputs: PairLogprobs, batch: Batch) -> tuple[Tensor, Terms]:  # noqa: ARG002
        cross_entropy = -outputs.summed[:, 0].sum() / outputs.tokens[:, 0].sum().clamp_min(1)
        odds_ratio = orpo_odds_ratio_loss(*self._means(outputs).unbind(1)).mean()
        terms = {"ce_loss": cross_entropy.detach(), "odds_ratio_loss": odds_ratio.detach()}
        rewards = self.config.beta * self._means(outputs)
        return torch.stack([cross_entropy, self.config.beta * odds_ratio]), terms | self._reward_terms(rewards)

    @staticmethod
    def _means(outputs: PairLogprobs) -> Tensor:
        """Return the mean log-probability of each answer's tokens, (B, 2)."""
        return outputs.summed / outputs.tokens.clamp_min(1)

    def _score_batch(self, batch: Batch, with_teacher: bool) -> ExampleScores:  # noqa: ARG002 - there is none
        outputs = self._forward(batch)
        means = self._means(outputs)
        # Here each pair weighs the same: a score is of a pair, and not of its tokens.
        losses = -means[:, 0] + self.config.beta * orpo_odds_ratio_loss(*means.unbind(1))
        return self._pair_scores(losses, self.config.beta * means, self.config.beta)

    def _get_extra_config_info(self) -> dict[str, Any]:
        return {"beta": self.config.beta}
