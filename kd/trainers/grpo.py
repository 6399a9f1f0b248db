"""Group-relative policy optimisation: answers of a group are judged against each other.

Source: Shao et al. 2024 (DeepSeekMath), arXiv:2402.03300.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kd.config import GRPOConfig
from kd.errors import DataError, NumericError
from kd.generation import GenerationConfig, TextGenerator
from kd.losses import IGNORE_INDEX
from kd.policy_losses import group_advantages, grpo_loss
from kd.token_logprobs import TokenLogprobs
from kd.trainers.answers import AnswerScorer, frozen_reference, join_answers
from kd.trainers.base import BaseTrainer, Terms
from kd.trainers.evaluation import ExampleScores
from kd.trainers.state import Batch

RewardFunction = Callable[[list[str], Batch], Sequence[float]]
"""Takes the texts of responses, and a batch with a row for each (`prompts`, `example_id`, ...); larger is better."""


class _Outputs(NamedTuple):
    policy: TokenLogprobs
    reference: Tensor | None


class GRPOTrainer(BaseTrainer[GRPOConfig]):
    """Train a policy on rewards.

    Batches hold `prompts` and `prompt_attention_mask` (B, L), padded on the left. The trainer samples
    `config.group_size` responses to each and rewards them. Or rollouts are supplied: batches then hold, a row a
    response and those of one prompt next to each other, also `responses`, `response_attention_mask` and, unless there
    is a reward function, `rewards` (B,); and optionally `old_logprobs` (B, R), of the policy that drew the responses.
    Masks may be left out where nothing is padded.

    Args:
        ref_model: The reference of the KL penalty, put into eval mode and frozen; a copy of the model as it is now if
            None. With `kl_coef=0` there is none.
        reward_fn: Rewards responses.
        generator: Samples responses with the trained model.
        model, optimizer, train_loader, val_loader, lr_scheduler, config, device, run_dir: As for `BaseTrainer`.
    """

    config_class = GRPOConfig
    can_shard = False  # the reference is a copy of the whole model, and responses are sampled with all of its weights
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
        self.reward_fn, self.generator = reward_fn, generator
        self._reference: AnswerScorer | None = None
        if self.config.kl_coef > 0:
            self._reference = AnswerScorer(frozen_reference(model, ref_model).to(self.device))

    @cached_property
    def scorer(self) -> AnswerScorer:
        """The trained model and its log-probabilities."""
        return AnswerScorer(self.model)

    def _trained_module(self) -> nn.Module:
        return self.scorer

    @property
    def optimization_epochs(self) -> int:
        """Optimizer steps on each window of rollouts."""
        return self.config.optimization_epochs

    # --- rollouts ------------------------------------------------------------------------------------------------

    def _prepare_batch(self, batch: Batch) -> Batch:
        rollout = batch if "responses" in batch else self._sample(batch)
        rewards = rollout["rewards"].float() if "rewards" in rollout else self._rewards(rollout)
        moved = {name: value.to(self.device, non_blocking=True) for name, value in rollout.items()}
        answer_mask = _mask_of(moved, "responses", "response_attention_mask")
        input_ids, labels = join_answers(
            moved["prompts"], _mask_of(moved, "prompts", "prompt_attention_mask"), moved["responses"], answer_mask
        )
        prepared = {"input_ids": input_ids, "labels": labels, "rewards": rewards.to(self.device)}
        prepared["advantages"] = self._advantages(rewards).to(self.device)
        if "old_logprobs" in moved:
            prepared["old_logprobs"] = _placed(moved["old_logprobs"], answer_mask, labels)
        elif self.optimization_epochs > 1:
            with torch.no_grad(), self.precision.autocast():
                prepared["old_logprobs"] = self.scorer(input_ids, labels).logprobs
        return prepared

    def _sample(self, batch: Batch) -> Batch:
        """Return the batch with a group of responses to each prompt."""
        # From the global random numbers, which a checkpoint keeps.
        seed = int(torch.randint(2**31, ()))
        config = GenerationConfig("sample", self.config.max_new_tokens, self.config.sampling_temperature, seed=seed)
        repeated = {name: value.repeat_interleave(self.config.group_size, dim=0) for name, value in batch.items()}
        return self._respond(repeated, config)

    def _respond(self, batch: Batch, config: GenerationConfig) -> Batch:
        """Return the batch with a response to each prompt; the model stays in its mode."""
        if self.generator is None:
            raise ValueError("GRPOTrainer needs a generator to sample responses, or batches that hold `responses`.")
        training = self.model.training
        rollout = self.generator.rollout(batch["prompts"], _mask_of(batch, "prompts", "prompt_attention_mask"), config)
        self.model.train(training)
        return {**batch, "responses": rollout.responses.cpu(), "response_attention_mask": rollout.mask.cpu().long()}

    def _rewards(self, rollout: Batch) -> Tensor:
        """Return the reward of each response, (B,) float32."""
        if self.reward_fn is None or self.generator is None:
            raise ValueError(
                "GRPOTrainer needs a reward_fn and a generator (to decode), or batches that hold `rewards`."
            )
        end = self.generator.tokenizer.eos_token_id
        mask = _mask_of(rollout, "responses", "response_attention_mask")
        rows = zip(rollout["responses"].tolist(), mask.tolist(), strict=True)
        kept = [[token for token, real in zip(*row, strict=True) if real and token != end] for row in rows]
        texts = [self.generator.decode(tokens) for tokens in kept]
        try:
            rewards = torch.tensor(list(self.reward_fn(texts, rollout)), dtype=torch.float32)
        except Exception as error:
            raise DataError(
                f"The reward function failed: {type(error).__name__}: {error}. The batch begins with "
                f"the response {texts[0][:80]!r}."
            ) from error
        if rewards.shape != (len(texts),):
            raise DataError(f"The reward function gave {len(rewards)} rewards for {len(texts)} responses.")
        wrong = (~torch.isfinite(rewards)).nonzero().flatten().tolist()
        if wrong:
            raise NumericError(
                f"The reward of the response {texts[wrong[0]][:80]!r} is {float(rewards[wrong[0]])}: it must be a "
                "finite number."
            )
        return rewards

    def _advantages(self, rewards: Tensor) -> Tensor:
        if len(rewards) % self.config.group_size:
            raise DataError(
                f"A batch holds {len(rewards)} responses, which are no whole groups of "
                f"train.group_size={self.config.group_size}: give as many responses to each prompt."
            )
        try:
            return group_advantages(rewards, self.config.group_size)
        except ValueError as error:
            raise NumericError(str(error)) from error

    # --- the loss --------------------------------------------------------------------------------------------------

    def _forward(self, batch: Batch) -> _Outputs:
        arguments = batch["input_ids"], batch["labels"]
        policy = self.module(*arguments, with_entropy=self.config.entropy_coef > 0)
        if self._reference is None:
            return _Outputs(policy, None)
        with torch.no_grad():
            return _Outputs(policy, self._reference(*arguments).logprobs)

    def _compute_loss(self, outputs: _Outputs, batch: Batch) -> tuple[Tensor, Terms]:
        logprobs = outputs.policy.logprobs
        terms = grpo_loss(
            logprobs,
            batch.get("old_logprobs", logprobs.detach()),
            batch["advantages"],
            batch["labels"] != IGNORE_INDEX,
            self.config.clip_range,
            self.config.kl_coef,
            outputs.reference,
            outputs.policy.entropy,
            self.config.entropy_coef,
        )
        groups = batch["rewards"].view(-1, self.config.group_size)
        values = {
            "reward": groups.mean(),
            "policy_loss": terms.policy_loss,
            "kl": terms.kl,
            "entropy": terms.entropy,
            "clip_fraction": terms.clip_fraction,
            "constant_groups": (groups.amax(dim=1) == groups.amin(dim=1)).float().mean(),
        }
        # The second unit, responses, is there for the log alone: rewards are means over responses, not over tokens.
        return torch.stack([terms.loss, torch.zeros_like(terms.loss)]), {
            name: value for name, value in values.items() if value is not None and name in self.loss_terms
        }

    def _count_units(self, batch: Batch) -> Tensor:
        tokens = (batch["labels"] != IGNORE_INDEX).sum()
        return torch.stack([tokens, torch.full_like(tokens, len(batch["labels"]))])

    # --- evaluation ------------------------------------------------------------------------------------------------

    def _prepare_for_scoring(self, batch: Batch) -> Batch:
        return batch  # responses are new ones, of the model as it is

    def _score_batch(self, batch: Batch, with_teacher: bool) -> ExampleScores:  # noqa: ARG002 - there is none
        """Score the greedy response to each prompt: the loss is the negative reward."""
        rewards = self._rewards(self._respond(batch, GenerationConfig("greedy", self.config.max_new_tokens))).double()
        return ExampleScores({"loss": -rewards, "reward": rewards})

    def _get_extra_config_info(self) -> dict[str, Any]:
        names = ("group_size", "clip_range", "kl_coef", "entropy_coef", "optimization_epochs", "max_new_tokens")
        return {name: getattr(self.config, name) for name in names}


def _mask_of(batch: Batch, tokens: str, mask: str) -> Tensor:
    """Return a batch's mask, ones if it has none."""
    return batch[mask] if mask in batch else torch.ones_like(batch[tokens])


def _placed(values: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Return values of responses (B, R) where their tokens are targets in whole sequences, (B, L); 0 elsewhere."""
    placed = torch.zeros_like(labels, dtype=values.dtype)
    placed[labels != IGNORE_INDEX] = values[mask.bool()]
    return placed
