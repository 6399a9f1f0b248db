"""Group-relative policy optimisation: answers of a group are judged against each other.

Source: Shao et al. 2024 (DeepSeekMath), arXiv:2402.03300.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kd.config import GRPOConfig
from kd.generation import GenerationConfig, TextGenerator
from kd.losses import IGNORE_INDEX
from kd.policy_losses import GRPOTerms, grpo_loss
from kd.token_logprobs import TokenLogprobs
from kd.trainers.answers import AnswerScorer, AnswerTrainer, reference_scorer
from kd.trainers.base import Terms
from kd.trainers.evaluation import ExampleScores
from kd.trainers.groups import join_rollout, log_terms
from kd.trainers.rollouts import RewardFunction, Rollouts, in_eval_mode
from kd.trainers.state import Batch


class _Outputs(NamedTuple):
    policy: TokenLogprobs
    reference: Tensor | None


class GRPOTrainer(AnswerTrainer[GRPOConfig]):
    """Train a policy on rewards. Batches: see `Rollouts`.

    The ratio is that to the policy that drew the responses, which has no dropout: with dropout it differs from 1 even
    in the first of several optimization epochs. With a single epoch, and no `old_logprobs`, it is 1, dropout or not.

    Args:
        ref_model: The reference of the KL penalty, put into eval mode and frozen; if None a copy of the model as it is
            now or, where adapters train, the weights beside them. With `kl_coef=0` there is none.
        reward_fn: Rewards responses.
        generator: Samples responses with the trained model, and with no other.
        model, optimizer, train_loader, val_loader, lr_scheduler, config, device, run_dir: As for `BaseTrainer`.
    """

    config_class = GRPOConfig
    loss_terms: tuple[str, ...] = ("reward", "policy_loss", "kl", "entropy", "clip_fraction", "constant_groups")
    units_of_terms = {"policy_loss": 0, "kl": 0, "entropy": 0, "clip_fraction": 0}  # noqa: RUF012 - never changed

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        train_loader: Iterable[Batch] | None = None,
        val_loader: Iterable[Batch] | None = None,
        *,
        ref_model: nn.Module | None = None,
        reward_fn: RewardFunction | None = None,
        generator: TextGenerator | None = None,
        lr_scheduler: LRScheduler | None = None,
        config: GRPOConfig | None = None,
        device: torch.device | str | None = None,
        run_dir: Path | None = None,
    ) -> None:
        config = config or GRPOConfig()
        without = {"kl": config.kl_coef == 0, "entropy": config.entropy_coef == 0}
        self.loss_terms = tuple(name for name in self.loss_terms if not without.get(name, False))
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
        self.rollouts = Rollouts(model, generator, reward_fn)
        self._reference: AnswerScorer | None = None
        if config.kl_coef > 0:
            self._reference = reference_scorer(model, ref_model, self.device)

    @property
    def optimization_epochs(self) -> int:
        """Optimizer steps on each window of rollouts."""
        return self.config.optimization_epochs

    def _prepare_batch(self, batch: Batch) -> Batch:
        rollout = self.rollouts.complete(batch, self.config)
        moved = {name: value.to(self.device, non_blocking=True) for name, value in rollout.items()}
        prepared = join_rollout(moved, self.config.group_size)
        if "old_logprobs" not in prepared and self.optimization_epochs > 1:
            with in_eval_mode(self.model), torch.no_grad(), self.precision.autocast():
                prepared["old_logprobs"] = self.scorer(prepared["input_ids"], prepared["labels"]).logprobs
        return prepared

    def _forward(self, batch: Batch) -> _Outputs:
        arguments = batch["input_ids"], batch["labels"]
        policy = self.module(*arguments, with_entropy=self.config.entropy_coef > 0)
        if self._reference is None:
            return _Outputs(policy, None)
        with torch.no_grad():
            return _Outputs(policy, self._reference(*arguments).logprobs)

    def _compute_loss(self, outputs: _Outputs, batch: Batch) -> tuple[Tensor, Terms]:
        found = _losses(outputs, batch, self.config)
        terms = log_terms(found, batch["rewards"], self.config.group_size)
        # The second unit, responses, is there for the log alone: rewards are means over responses, not over tokens.
        return torch.stack([found.loss, torch.zeros_like(found.loss)]), terms

    def _count_units(self, batch: Batch) -> Tensor:
        tokens = (batch["labels"] != IGNORE_INDEX).sum()
        return torch.stack([tokens, torch.full_like(tokens, len(batch["labels"]))])

    def _prepare_for_scoring(self, batch: Batch) -> Batch:
        return batch  # responses are new ones, of the model as it is

    def _score_batch(self, batch: Batch, with_teacher: bool) -> ExampleScores:  # noqa: ARG002 - there is none
        """Score the greedy response to each prompt: the loss is the negative reward."""
        answered = self.rollouts.respond(batch, GenerationConfig("greedy", self.config.max_new_tokens))
        rewards = self.rollouts.rewards(answered).double()
        return ExampleScores({"loss": -rewards, "reward": rewards})

    def _get_extra_config_info(self) -> dict[str, Any]:
        names = ("group_size", "clip_range", "kl_coef", "entropy_coef", "optimization_epochs", "max_new_tokens")
        return {name: getattr(self.config, name) for name in names}


def _losses(outputs: _Outputs, batch: Batch, config: GRPOConfig) -> GRPOTerms:
    logprobs = outputs.policy.logprobs
    return grpo_loss(
        logprobs,
        batch.get("old_logprobs", logprobs.detach()),
        batch["advantages"],
        batch["labels"] != IGNORE_INDEX,
        config.clip_range,
        config.kl_coef,
        outputs.reference,
        outputs.policy.entropy,
        config.entropy_coef,
    )
