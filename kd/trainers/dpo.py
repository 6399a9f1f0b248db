"""Direct preference optimisation: rank the chosen answer above the rejected one, near a reference model.

Source: Rafailov et al. 2023, arXiv:2305.18290.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kd.config import DPOConfig
from kd.losses import IGNORE_INDEX
from kd.preference_losses import dpo_loss
from kd.trainers.answers import reference_scorer
from kd.trainers.base import Terms
from kd.trainers.evaluation import ExampleScores
from kd.trainers.preferences import PairLogprobs, PreferenceTrainer
from kd.trainers.state import Batch


class _Outputs(NamedTuple):
    policy: PairLogprobs
    reference: Tensor
    """(B, 2): the chosen and the rejected answer's."""


class DPOTrainer(PreferenceTrainer[DPOConfig]):
    """Train on pairs of answers with DPO. Batches: see `PreferenceTrainer`.

    The reference scores each pair once: its log-probabilities are kept, some hundred bytes a pair.

    Args:
        ref_model: The reference, put into eval mode and frozen; if None a copy of the model as it is now or, where
            adapters train, the weights beside them.
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
        self._reference = reference_scorer(model, ref_model, self.device)
        self._known: dict[int, float] = {}

    def _forward(self, batch: Batch) -> _Outputs:
        policy = self._pair_logprobs(self.module, batch)
        return _Outputs(policy, self._reference_logprobs(batch).to(policy.summed))

    @torch.no_grad()
    def _reference_logprobs(self, batch: Batch) -> Tensor:
        """Return the reference's log-probabilities of pairs, (B, 2)."""
        # An evaluation's float32 and training's half precision are not compared with each other's.
        keys = _keys(batch, b"autocast" if torch.is_autocast_enabled(self.device.type) else b"")
        if not all(key in self._known for key in keys):
            logprobs = self._reference(batch["input_ids"], batch["labels"]).logprobs.sum(dim=1)
            self._known |= dict(zip(keys, logprobs.tolist(), strict=True))
        return torch.tensor([self._known[key] for key in keys], dtype=torch.float64).view(2, -1).T

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
        return self._pair_scores(*self._losses(self._forward(batch)), self.config.beta)

    def _get_extra_checkpoint_state(self) -> dict[str, Any]:
        # In another order of batches padding differs, and with it the last digit: a resumed run keeps what it had.
        return {
            "keys": torch.tensor(list(self._known), dtype=torch.int64),
            "logprobs": torch.tensor(list(self._known.values()), dtype=torch.float64),
        }

    def _load_extra_checkpoint_state(self, state: dict[str, Any]) -> None:
        self._known = dict(zip(state["keys"].tolist(), state["logprobs"].tolist(), strict=True))

    def _get_extra_config_info(self) -> dict[str, Any]:
        return {"beta": self.config.beta, "label_smoothing": self.config.label_smoothing}


def _keys(batch: Batch, salt: bytes) -> list[int]:
    """Return a number for each sequence that tells it, prompt and answer, from others, however it is padded."""
    # Not the batch's example ids: those of training, validation and test sets may be the same.
    input_ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    lengths = (torch.arange(1, labels.size(1) + 1) * (labels != IGNORE_INDEX)).amax(dim=1).tolist()
    contents = [torch.stack(row)[:, :length] for *row, length in zip(input_ids, labels, lengths, strict=True)]
    digests = [hashlib.blake2b(content.numpy().tobytes(), digest_size=8, salt=salt).digest() for content in contents]
    return [int.from_bytes(digest, "little", signed=True) for digest in digests]
