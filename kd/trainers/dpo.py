"""Direct preference optimisation: rank the chosen answer above the rejected one, near a reference model.

Source: Rafailov et al. 2023, arXiv:2305.18290.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kd.config import DPOConfig
from kd.preference_losses import dpo_loss
from kd.trainers.answers import AnswerScorer, frozen_copy
from kd.trainers.base import Terms
from kd.trainers.evaluation import ExampleScores
from kd.trainers.preferences import PairLogprobs, PreferenceTrainer
from kd.trainers.state import Batch

PairIds = tuple[bool, int]
"""Whether an example is of training, and its id."""


class _Outputs(NamedTuple):
    policy: PairLogprobs
    reference: Tensor
    """(B, 2): the chosen and the rejected answer's."""


class DPOTrainer(PreferenceTrainer[DPOConfig]):
    """Train on pairs of answers with DPO. Batches: see `PreferenceTrainer`.

    With `example_id` (B,) in the batches the reference scores each example once: its log-probabilities are kept.

    Args:
        ref_model: The reference, put into eval mode and frozen; a copy of the model as it is now if None.
        model, optimizer, train_loader, val_loader, lr_scheduler, config, device, run_dir: As for `BaseTrainer`.
    """

    config_class = DPOConfig

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        train_loader: Iterable[Batch] | None = None,
        val_loader: Iterable[Batch] | None = None,
        *,
        ref_model: nn.Module | None = None,
        lr_scheduler: LRScheduler | None = None,
        config: DPOConfig | None = None,
        device: torch.device | str | None = None,
        run_dir: Path | None = None,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            train_loader,
            val_loader,
            lr_scheduler=lr_scheduler,
            config=config,
            device=device,
            run_dir=run_dir,
        )
        reference = frozen_copy(model) if ref_model is None else ref_model.eval().requires_grad_(False)
        self._reference = AnswerScorer(reference.to(self.device))
        self._known: dict[PairIds, Tensor] = {}

    def _forward(self, batch: Batch) -> _Outputs:
        return _Outputs(self._pair_logprobs(self.scorer, batch), self._reference_logprobs(batch))

    @torch.no_grad()
    def _reference_logprobs(self, batch: Batch) -> Tensor:
        if "example_id" not in batch:
            return self._pair_logprobs(self._reference, batch).summed
        ids = [(self.model.training, int(number)) for number in batch["example_id"]]
        if not all(number in self._known for number in ids):
            rows = self._pair_logprobs(self._reference, batch).summed.cpu()
            self._known |= dict(zip(ids, rows, strict=True))
        return torch.stack([self._known[number] for number in ids]).to(self.device)

    def _compute_loss(self, outputs: _Outputs, batch: Batch) -> tuple[Tensor, Terms]:  # noqa: ARG002
        losses, rewards = self._losses(outputs)
        return losses.mean(), self._reward_terms(rewards)

    def _losses(self, outputs: _Outputs) -> tuple[Tensor, Tensor]:
        """Return the losses (B,) and the rewards (B, 2) of pairs."""
        policy, reference = outputs.policy.summed, outputs.reference
        beta, smoothing = self.config.beta, self.config.label_smoothing
        terms = dpo_loss(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1], beta, smoothing)
        return terms.losses, torch.stack([terms.chosen_rewards, terms.rejected_rewards], dim=1)

    def _score_batch(self, batch: Batch, with_teacher: bool) -> ExampleScores:  # noqa: ARG002 - there is none
        return self._pair_scores(*self._losses(self._forward(batch)))

    def _get_extra_checkpoint_state(self) -> dict[str, Any]:
        # In another order of batches padding differs, and with it the last digit: a resumed run keeps what it had.
        training = [(number, row) for (is_training, number), row in self._known.items() if is_training]
        ids, rows = zip(*training, strict=True) if training else ((), ())
        return {"ids": list(ids), "logprobs": torch.stack(rows) if rows else torch.empty(0, 2)}

    def _load_extra_checkpoint_state(self, state: dict[str, Any]) -> None:
        self._known = {(True, number): row for number, row in zip(state["ids"], state["logprobs"], strict=True)}

    def _get_extra_config_info(self) -> dict[str, Any]:
        return {"beta": self.config.beta, "label_smoothing": self.config.label_smoothing}
