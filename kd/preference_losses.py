"""Losses on pairs of answers, one preferred to the other, as pure functions of their log-probabilities."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class DPOTerms:
    """What DPO computes for each pair, (B,) each."""

    losses: Tensor
    """With a graph, >= 0."""
    chosen_rewards: Tensor
    """beta * log(policy / reference) of the chosen answer; detached."""
    rejected_rewards: Tensor
    """The same of the rejected one; detached. A pair is ranked right where the chosen reward is larger."""


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> DPOTerms:
    """Return -log sigmoid(z) of each pair, z = beta * ((policy - reference of chosen) - (the same of rejected)).

    With label smoothing s it is -(1 - s) log sigmoid(z) - s log sigmoid(-z): the preference is wrong with probability
    s, and z grows no further than log((1 - s) / s). No gradient reaches the reference.

    Args:
        policy_chosen: (B,) log-probabilities of the chosen answers, summed over their tokens, in nats.
        policy_rejected: (B,), of the rejected answers.
        reference_chosen: (B,), by the reference model.
        reference_rejected: (B,), by the reference model.
        beta: how strongly the policy is held to the reference, finite and > 0.
        label_smoothing: s, in [0, 0.5).

    Raises:
        ValueError: if shapes differ, or if beta or label_smoothing is out of range.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; label smoothing: Mitchell 2023, "A note on DPO with noisy
        preferences & relationship to IPO".
    """
    _check_shapes(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta={beta} is not allowed: it must be a finite number greater than 0.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing={label_smoothing} is not allowed: it must be in [0, 0.5); from 0.5 on, the preferences "
            "would count as no better than chance."
        )
    # Policy and reference are close, and their difference is nearly exact; that of two long answers is not.
    chosen_rewards = beta * (policy_chosen - reference_chosen.detach())
    rejected_rewards = beta * (policy_rejected - reference_rejected.detach())
    margin = chosen_rewards - rejected_rewards
    losses = -F.logsigmoid(margin)
    if label_smoothing > 0:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-margin)
    return DPOTerms(losses, chosen_rewards.detach(), rejected_rewards.detach())


def orpo_odds_ratio_loss(chosen_mean_logprob: Tensor, rejected_mean_logprob: Tensor) -> Tensor:
    """Return -log sigmoid(log(odds of chosen / odds of rejected)) of each pair, (B,), > 0.

    The odds are p / (1 - p), where p is the geometric mean of an answer's token probabilities. ORPO adds this, times
    a weight, to the cross-entropy of the chosen answer. Value and gradient are finite for all finite inputs: a p that
    the dtype cannot tell from 1 counts as the largest below 1, with the gradient that it has there.

    Args:
        chosen_mean_logprob: (B,) log-probabilities of the chosen answers, averaged over their tokens, in nats, <= 0.
        rejected_mean_logprob: (B,), of the rejected answers.

    Raises:
        ValueError: if shapes differ.

    Source: Hong et al. 2024, arXiv:2403.07691, eq. 4 to 7.
    """
    _check_shapes(chosen_mean_logprob, rejected_mean_logprob)
    return -F.logsigmoid(_log_odds(chosen_mean_logprob) - _log_odds(rejected_mean_logprob))


def _log_odds(logprob: Tensor) -> Tensor:
    """Return log(p / (1 - p)) from log p, for p < 1."""
    logprob = logprob.to(torch.promote_types(logprob.dtype, torch.float32))
    bound = -torch.finfo(logprob.dtype).eps
    # Not clamp: its gradient is 0, and an answer that the model is sure of could never be unlearned.
    logprob = torch.where(logprob > bound, logprob - (logprob - bound).detach(), logprob)
    # Near 0, expm1 keeps all digits of 1 - p; far below, log(1 - p) is off by eps at most, next to a log p above 0.69.
    return logprob - torch.log(-torch.expm1(logprob))


def _check_shapes(first: Tensor, *others: Tensor) -> None:
    """Refuse log-probabilities that do not stand one for one pair."""
    shapes = [tuple(tensor.shape) for tensor in (first, *others)]
    if first.ndim != 1 or len(set(shapes)) > 1:
        raise ValueError(f"The log-probabilities have shapes {shapes}: give one number for each pair, (B,) everywhere.")
