"""Groups of rewarded responses as a batch to learn from: whole sequences, and how good each is within its group."""

import torch
from torch import Tensor

from kd.errors import DataError, NumericError
from kd.losses import IGNORE_INDEX
from kd.policy_losses import GRPOTerms, group_advantages
from kd.trainers.answers import join_answers
from kd.trainers.state import Batch


def join_rollout(rollout: Batch, group_size: int) -> Batch:
    """Return rewarded responses behind their prompts: `input_ids`, `labels` (B, L), `rewards`, `advantages` (B,).

    `old_logprobs` (B, R) of responses, if there are any, become (B, L): each stands where its token is the label.

    Raises:
        DataError: if the responses are no whole groups.
        NumericError: if a reward is not finite.
    """
    answer_mask, rewards = mask_of(rollout, "responses"), rollout["rewards"].float()
    input_ids, labels = join_answers(rollout["prompts"], mask_of(rollout, "prompts"), rollout["responses"], answer_mask)
    joined = {"input_ids": input_ids, "labels": labels, "rewards": rewards}
    joined["advantages"] = _advantages(rewards, group_size)
    if "old_logprobs" in rollout:
        joined["old_logprobs"] = _placed(rollout["old_logprobs"], answer_mask, labels)
    return joined


def mask_of(batch: Batch, name: str) -> Tensor:
    """Return the mask of a batch's `prompts` or `responses`, ones if it has none."""
    mask = f"{name.removesuffix('s')}_attention_mask"
    return batch[mask] if mask in batch else torch.ones_like(batch[name])


def log_terms(found: GRPOTerms, rewards: Tensor, group_size: int) -> dict[str, Tensor]:
    """Return the loss's terms, the mean reward, and the share of groups of equal rewards, which teach nothing."""
    groups = rewards.view(-1, group_size)
    terms = {
        "reward": groups.mean(),
        "policy_loss": found.policy_loss,
        "kl": found.kl,
        "entropy": found.entropy,
        "clip_fraction": found.clip_fraction,
        "constant_groups": (groups.amax(dim=1) == groups.amin(dim=1)).float().mean(),
    }
    return {name: value for name, value in terms.items() if value is not None}


def _advantages(rewards: Tensor, group_size: int) -> Tensor:
    if len(rewards) % group_size:
        raise DataError(
            f"A batch holds {len(rewards)} responses, which are no whole groups of train.group_size={group_size}: "
            "give as many responses to each prompt."
        )
    try:
        return group_advantages(rewards, group_size)
    except ValueError as error:
        raise NumericError(str(error)) from error


def _placed(values: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Return values of responses (B, R) where their tokens are targets in whole sequences, (B, L); 0 elsewhere."""
    placed = torch.zeros_like(labels, dtype=values.dtype)
    placed[labels != IGNORE_INDEX] = values[mask.bool()]
    return placed
