"""GRPO's advantages and loss against its formulas, token by token."""

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd.policy_losses import GRPOTerms, group_advantages, grpo_loss

LENGTHS = (4, 1, 6, 2)
CLIP, KL, ENTROPY = 0.2, 0.3, 0.05


class Batch:
    """Ragged responses whose padding is NaN in everything but the mask; the policy's tensors are leaves."""

    def __init__(self, lengths: tuple[int, ...] = LENGTHS, seed: int = 0, rows: slice = slice(None)) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (len(lengths), max(lengths))
        mask = torch.arange(shape[1]) < torch.tensor(lengths).unsqueeze(1)

        def draw(scale: float) -> Tensor:
            return (scale * torch.randn(shape, generator=generator).double()).masked_fill(~mask, math.nan)

        old = -draw(1.0).abs()
        self.old, self.mask = old[rows], mask[rows]
        self.logprobs = (old + draw(0.3))[rows].requires_grad_()
        self.reference = (old + draw(0.3))[rows]
        self.entropy = draw(1.0).abs()[rows].requires_grad_()
        self.advantages = torch.randn(shape[0], generator=generator).double()[rows]

    def loss(self, **changes: Any) -> GRPOTerms:
        arguments: dict[str, Any] = {
            "logprobs": self.logprobs,
            "old_logprobs": self.old,
            "advantages": self.advantages,
            "mask": self.mask,
            "clip_range": CLIP,
            "kl_coef": KL,
            "reference_logprobs": self.reference,
            "entropy": self.entropy,
            "entropy_coef": ENTROPY,
        }
        return grpo_loss(**(arguments | changes))


def by_hand(batch: Batch) -> tuple[dict[str, float], np.ndarray[Any, Any]]:
    """Return the terms, and the gradient by log-probabilities, with a loop over tokens."""
    policy, kl, entropy, clipped, count = 0.0, 0.0, 0.0, 0, int(batch.mask.sum())
    gradient = np.zeros(batch.mask.shape)
    for row, column in batch.mask.nonzero().tolist():
        new, old, reference = (float(x.detach()[row, column]) for x in (batch.logprobs, batch.old, batch.reference))
        advantage = float(batch.advantages[row])
        ratio, q = math.exp(new - old), math.exp(reference - new)
        bounded = min(max(ratio, 1 - CLIP), 1 + CLIP)
        policy -= min(ratio * advantage, bounded * advantage) / count
        kl += (q - math.log(q) - 1) / count
        entropy += float(batch.entropy.detach()[row, column]) / count
        is_clipped = bounded * advantage < ratio * advantage
        clipped += is_clipped
        gradient[row, column] = (-ratio * advantage * (not is_clipped) + KL * (1 - q)) / count
    loss = policy + KL * kl - ENTROPY * entropy
    terms = {"loss": loss, "policy_loss": policy, "kl": kl, "entropy": entropy, "clip_fraction": clipped / count}
    return terms, gradient


def as_numbers(terms: GRPOTerms) -> dict[str, float]:
    values = {field.name: getattr(terms, field.name) for field in fields(terms)}
    return {name: float(value.detach()) for name, value in values.items() if value is not None}


@pytest.mark.parametrize("seed", range(5))
def test_loss_and_gradient_are_those_of_the_formula(seed: int) -> None:
    batch = Batch(seed=seed)
    terms = batch.loss()
    expected, by_logprobs = by_hand(batch)
    assert 0 < expected["clip_fraction"] < 1
    assert as_numbers(terms) == pytest.approx(expected, rel=1e-12)
    found = torch.autograd.grad(terms.loss, (batch.logprobs, batch.entropy))
    np.testing.assert_allclose(found[0].numpy(), by_logprobs, rtol=1e-12)
    np.testing.assert_allclose(found[1].numpy(), -ENTROPY / sum(LENGTHS) * batch.mask.numpy(), rtol=1e-12)


def test_only_the_loss_has_a_graph() -> None:
    terms = Batch().loss()
    assert terms.loss.requires_grad
    for value in (terms.policy_loss, terms.kl, terms.entropy, terms.clip_fraction):
        assert value is not None
        assert not value.requires_grad
        assert value.ndim == 0


def test_a_step_over_unequal_batches_is_that_over_the_whole() -> None:
    whole, parts = Batch(), [Batch(rows=slice(0, 1)), Batch(rows=slice(1, 4))]
    expected = whole.loss().loss
    total = sum((part.loss().loss * part.mask.sum() for part in parts), torch.tensor(0.0)) / whole.mask.sum()
    torch.testing.assert_close(total, expected)
    found = torch.cat(torch.autograd.grad(total, [part.logprobs for part in parts]))
    torch.testing.assert_close(found, *torch.autograd.grad(expected, whole.logprobs))


def test_on_policy_the_gradient_is_that_of_the_policy_gradient() -> None:
    batch = Batch()
    batch.old = batch.logprobs.detach().clone()
    terms = batch.loss(kl_coef=0.0, entropy_coef=0.0)
    assert terms.clip_fraction == 0
    found = torch.autograd.grad(terms.loss, batch.logprobs)[0]
    weighted = (batch.advantages.unsqueeze(1) * batch.logprobs).masked_fill(~batch.mask, 0.0).sum()
    torch.testing.assert_close(found, torch.autograd.grad(-weighted / sum(LENGTHS), batch.logprobs)[0])


def test_terms_without_weight_are_reported_and_change_nothing() -> None:
    batch = Batch()
    reported = batch.loss(kl_coef=0.0, entropy_coef=0.0)
    absent = batch.loss(kl_coef=0.0, entropy_coef=0.0, reference_logprobs=None, entropy=None)
    assert (absent.kl, absent.entropy) == (None, None)
    assert reported.kl is not None
    assert reported.kl > 0
    assert replace(reported, kl=None, entropy=None) == absent
    assert absent.loss == absent.policy_loss


def test_the_gradient_reaches_the_policy_only() -> None:
    batch = Batch()
    constants = [part.requires_grad_() for part in (batch.old, batch.reference, batch.advantages)]
    found = torch.autograd.grad(batch.loss().loss, constants, allow_unused=True)
    assert all(gradient is None for gradient in found)


def test_kl_near_the_reference_keeps_its_digits() -> None:
    """It is half the square of the difference, far below the rounding of 1."""
    logprobs = torch.full((1, 3), -1.0)
    reference = logprobs + 2.0**-14
    kl = grpo_loss(logprobs, logprobs, torch.zeros(1), torch.ones(1, 3), CLIP, KL, reference).kl
    assert float(kl or 0) == pytest.approx(2.0**-29, rel=1e-2)


def test_without_any_response_token_the_loss_is_zero_with_a_graph() -> None:
    batch = Batch()
    terms = batch.loss(mask=torch.zeros_like(batch.mask))
    assert set(as_numbers(terms).values()) == {0.0}
    assert (torch.autograd.grad(terms.loss, batch.logprobs)[0] == 0).all()


@pytest.mark.parametrize("kind", [torch.float32, torch.long, torch.bool])
def test_a_mask_may_be_of_any_kind(kind: torch.dtype) -> None:
    batch = Batch()
    assert as_numbers(batch.loss(mask=batch.mask.to(kind))) == as_numbers(batch.loss())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_range": 0.0}, "clip_range=0.0"),
        ({"clip_range": math.inf}, "clip_range=inf"),
        ({"kl_coef": -0.1}, "kl_coef=-0.1"),
        ({"entropy_coef": math.nan}, "entropy_coef=nan"),
        ({"reference_logprobs": None}, "kl_coef=0.3 needs reference_logprobs"),
        ({"entropy": None}, "entropy_coef=0.05 needs the entropy"),
        ({"advantages": torch.zeros(1)}, r"advantages have shape \(1,\), expected \(4,\)"),
        ({"old_logprobs": torch.zeros(4, 1)}, r"must all be \(B, R\)"),
        ({"mask": torch.ones(6)}, r"must all be \(B, R\)"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batch().loss(**changes)


# --- advantages ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(rewards=st.lists(st.lists(st.floats(-50, 50, width=32), min_size=3, max_size=3), min_size=1, max_size=4))
def test_advantages_are_standardised_within_groups(rewards: list[list[float]]) -> None:
    groups = np.array(rewards, dtype=np.float64)
    found = group_advantages(torch.tensor(groups).view(-1), 3, eps=1e-4).view(-1, 3).numpy()
    expected = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(found[np.ptp(groups, axis=1) == 0], 0.0)


def test_constant_rewards_give_exactly_nothing() -> None:
    """0.1 summed three times and divided by three is not 0.1: without care the rest would be scaled up by 1 / eps."""
    advantages = group_advantages(torch.tensor([0.1, 0.1, 0.1, 1.0, 0.0, 0.0]), 3, eps=0.0)
    assert advantages[:3].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(advantages[3:], torch.tensor([2.0, -1.0, -1.0]) / 3**0.5)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float16])
def test_rewards_may_be_of_any_kind(kind: torch.dtype) -> None:
    advantages = group_advantages(torch.tensor([1, 0, 0, 1]).to(kind), 2, eps=0.0)
    torch.testing.assert_close(advantages, torch.tensor([1.0, -1.0, -1.0, 1.0]) / 2**0.5)


def test_the_row_of_a_reward_that_is_no_number_is_named() -> None:
    rewards = torch.tensor([1.0, math.nan, 0.0, math.inf])
    with pytest.raises(ValueError, match="got nan in row 1, inf in row 3: have the reward function"):
        group_advantages(rewards, 2)
    with pytest.raises(ValueError, match="in row 3 and more"):
        group_advantages(torch.full((6,), math.nan), 2)


@pytest.mark.parametrize(
    ("shape", "group_size", "eps", "message"),
    [
        ((4,), 1, 0.1, "group_size=1"),
        ((5,), 2, 0.1, "a multiple of group_size=2"),
        ((2, 2), 2, 0.1, r"\(2, 2\)"),
        ((4,), 2, -0.1, "eps=-0.1"),
    ],
)
def test_groups_that_cannot_be_compared_are_refused(
    shape: tuple[int, ...], group_size: int, eps: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.ones(shape), group_size, eps)
