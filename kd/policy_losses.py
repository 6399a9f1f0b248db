"""Group-relative policy optimisation (GRPO), as pure functions of rewards and log-probabilities.

Shape letters: B responses (all of a group stand next to each other), R tokens of the longest one.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GRPOTerms:
    """GRPO's loss and what it is made of: means over the response tokens of a batch, 0-d, 0 if there is none.

    loss = policy_loss + kl_coef * kl - entropy_coef * entropy. Each is a mean, so that the loss of an optimizer step is
    the sum of `loss * mask.sum()` over its batches, divided by the sum of `mask.sum()`.
    """

    loss: Tensor
    """With a graph."""
    policy_loss: Tensor
    """Of the clipped ratio; detached, as all that follow."""
    kl: Tensor | None
    """Estimate of KL(policy || reference), in nats, >= 0; None without a reference."""
    entropy: Tensor | None
    """Of the policy, in nats; None if it was not given."""
    clip_fraction: Tensor
    """Share of tokens whose ratio was clipped, and which therefore have no policy gradient; in [0, 1]."""


def group_advantages(rewards: Tensor, group_size: int, eps: float = 1e-4) -> Tensor:
    """Return (reward - mean) / (std + eps) of each response, within its group; (B,) float32 (float64 for float64).

    The standard deviation is the unbiased one, which divides by group_size - 1, as in TRL. A group whose rewards are
    all equal has nothing to learn from: its advantages are 0, exactly.

    Args:
        rewards: (B,), any number type; each run of `group_size` rows answers one prompt.
        group_size: responses for each prompt, at least 2.
        eps: >= 0; keeps the advantages of nearly equal rewards small.

    Raises:
        ValueError: if group_size is below 2 or does not divide B, if eps is negative, or if a reward is not finite.

    Source: Shao et al. 2024 (DeepSeekMath), arXiv:2402.03300, section 4.1.2.
    """
    if group_size < 2:
        raise ValueError(f"group_size={group_size} is not allowed: a response is compared with others, so at least 2.")
    if rewards.ndim != 1 or len(rewards) % group_size:
        raise ValueError(
            f"rewards have shape {tuple(rewards.shape)}, expected (B,) with B a multiple of group_size={group_size}."
        )
    if not eps >= 0:
        raise ValueError(f"eps={eps} is not allowed: it must be at least 0.")
    _check_finite(rewards)
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    groups = rewards.to(dtype).view(-1, group_size)
    advantages = (groups - groups.mean(dim=1, keepdim=True)) / (groups.std(dim=1, keepdim=True) + eps)
    is_constant = groups.amax(dim=1, keepdim=True) == groups.amin(dim=1, keepdim=True)
    return advantages.masked_fill(is_constant, 0.0).view(-1)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
    kl_coef: float,
    reference_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
) -> GRPOTerms:
    """Return the mean over response tokens of -min(r A, clip(r) A) + kl_coef * KL - entropy_coef * entropy.

    r = exp(logprobs - old_logprobs) is each token's ratio, clipped to [1 - clip_range, 1 + clip_range], and A its
    response's advantage. The KL is estimated from each token alone as q - log q - 1, with
    q = exp(reference_logprobs - logprobs): never negative, and unbiased for tokens drawn from the policy. All tokens
    of a batch weigh the same, long responses therefore more (the paper's eq. 3 averages within each response first).

    Args:
        logprobs: (B, R) of the policy, with a graph, in nats.
        old_logprobs: (B, R) of the policy that drew the responses.
        advantages: (B,), from `group_advantages`.
        mask: (B, R), non-zero at response tokens. Elsewhere all other arguments may be anything, NaN too.
        clip_range: finite, > 0.
        kl_coef: weight of the KL, finite, >= 0.
        reference_logprobs: (B, R) of the reference. With kl_coef 0 it may be None; if it is given, the KL is reported.
        entropy: (B, R) of the policy's distributions, with a graph, in nats. May be None if entropy_coef is 0.
        entropy_coef: weight of the entropy, finite, >= 0.

    Raises:
        ValueError: if shapes differ, if a number is out of range, or if a weighted term's tensor is missing.

    Source: Shao et al. 2024 (DeepSeekMath), arXiv:2402.03300, eq. 3, and eq. 4 for the KL, which is k3 of Schulman
        2020, "Approximating KL divergence"; the clipped ratio: Schulman et al. 2017, arXiv:1707.06347, eq. 7, and the
        entropy there: eq. 9. Mean over tokens: Yu et al. 2025 (DAPO), arXiv:2503.14476, section 3.3.
    """
    _check_numbers(clip_range, kl_coef, entropy_coef)
    _check_terms(logprobs, old_logprobs, advantages, mask, reference_logprobs, entropy)
    if kl_coef > 0 and reference_logprobs is None:
        raise ValueError(f"kl_coef={kl_coef} needs reference_logprobs: give them, or set kl_coef=0.")
    if entropy_coef > 0 and entropy is None:
        raise ValueError(f"entropy_coef={entropy_coef} needs the entropy: give it, or set entropy_coef=0.")
    mask = mask.bool()
    policy_loss, clip_fraction = _policy_loss(logprobs, old_logprobs.detach(), advantages.detach(), mask, clip_range)
    kl = None if reference_logprobs is None else _kl(logprobs, reference_logprobs.detach(), mask)
    mean_entropy = None if entropy is None else _mean(entropy, mask)
    loss = policy_loss
    if kl is not None and kl_coef > 0:
        loss = loss + kl_coef * kl
    if mean_entropy is not None and entropy_coef > 0:
        loss = loss - entropy_coef * mean_entropy
    return GRPOTerms(
        loss,
        policy_loss.detach(),
        None if kl is None else kl.detach(),
        None if mean_entropy is None else mean_entropy.detach(),
        clip_fraction,
    )


def _policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """Return the mean clipped policy loss, with a graph, and the share of clipped tokens."""
    # Masked before exp: exp of padding may be inf, and inf times the mask's gradient of 0 is NaN.
    ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0).exp()
    advantage = advantages.unsqueeze(1)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    losses = -torch.minimum(ratio * advantage, clipped * advantage)
    is_low = (ratio < 1 - clip_range) & (advantage < 0)
    is_high = (ratio > 1 + clip_range) & (advantage > 0)
    return _mean(losses, mask), _mean((is_low | is_high).to(losses.dtype), mask).detach()


def _kl(logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of q - log q - 1, with a graph."""
    log_ratio = (reference_logprobs - logprobs).masked_fill(~mask, 0.0)
    # expm1 and not exp - 1: near the reference the result is the square of what exp rounds away.
    return _mean(torch.expm1(log_ratio) - log_ratio, mask)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of values (B, R) where the mask is True; 0, with a graph, if it is nowhere."""
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp_min(1)


def _check_finite(rewards: Tensor) -> None:
    """Refuse rewards that would make their whole group NaN."""
    wrong = (~torch.isfinite(rewards)).nonzero().flatten().tolist()
    if wrong:
        found = ", ".join(f"{float(rewards[row])} in row {row}" for row in wrong[:4])
        raise ValueError(
            f"rewards must be finite, got {found}{' and more' if len(wrong) > 4 else ''}: have the reward function "
            "return a number for every response."
        )


def _check_numbers(clip_range: float, kl_coef: float, entropy_coef: float) -> None:
    """Refuse numbers out of range."""
    if not (math.isfinite(clip_range) and clip_range > 0):
        raise ValueError(f"clip_range={clip_range} is not allowed: it must be a finite number greater than 0.")
    for name, value in (("kl_coef", kl_coef), ("entropy_coef", entropy_coef)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value} is not allowed: it must be a finite number, at least 0.")


def _check_terms(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *optional: Tensor | None) -> None:
    """Refuse shapes that broadcasting would bring together, wrongly."""
    shapes = [tuple(tensor.shape) for tensor in (logprobs, old, mask, *optional) if tensor is not None]
    if logprobs.ndim != 2 or len(set(shapes)) > 1:
        raise ValueError(f"Per-token tensors have shapes {shapes}: they must all be (B, R), responses by tokens.")
    if advantages.shape != logprobs.shape[:1]:
        raise ValueError(
            f"advantages have shape {tuple(advantages.shape)}, expected {tuple(logprobs.shape[:1])}: one a response."
        )
