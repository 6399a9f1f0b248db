"""DPO and ORPO against their formulas in float64, and where float32 comes to its end."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd.preference_losses import dpo_loss, orpo_odds_ratio_loss


def make_logprobs(seed: int = 0, pairs: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four sums of log-probabilities of some pairs; those of the policy are leaves."""
    generator = torch.Generator().manual_seed(seed)
    sums = [-30 * torch.rand(pairs, generator=generator, dtype=torch.float64) for _ in range(4)]
    return sums[0].requires_grad_(), sums[1].requires_grad_(), sums[2], sums[3]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo_is_its_formula(beta: float, label_smoothing: float) -> None:
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = sums = make_logprobs()
    terms = dpo_loss(*sums, beta, label_smoothing)
    right = 1 / (1 + (-beta * (policy_chosen - policy_rejected - reference_chosen + reference_rejected)).exp())
    expected = -(1 - label_smoothing) * right.log() - label_smoothing * (1 - right).log()
    torch.testing.assert_close(terms.losses, expected)
    torch.testing.assert_close(terms.chosen_rewards, beta * (policy_chosen - reference_chosen).detach())
    torch.testing.assert_close(terms.rejected_rewards, beta * (policy_rejected - reference_rejected).detach())
    found = torch.autograd.grad(terms.losses.sum(), sums[:2])
    torch.testing.assert_close(found[0], (beta * (right - 1 + label_smoothing)).detach())
    torch.testing.assert_close(found[1], -found[0])


def test_dpo_of_a_policy_that_is_its_reference() -> None:
    answers = (torch.tensor([-3.0, -900.0]), torch.tensor([-5.0, -0.5]))
    terms = dpo_loss(*answers, *answers, 0.1)
    torch.testing.assert_close(terms.losses, torch.full((2,), math.log(2)))
    assert (terms.chosen_rewards == 0).all()


def test_dpo_teaches_the_policy_only_and_reports_no_graph() -> None:
    sums = make_logprobs()
    for part in sums:
        part.requires_grad_()
    terms = dpo_loss(*sums, 0.1)
    assert not terms.chosen_rewards.requires_grad
    assert not terms.rejected_rewards.requires_grad
    found = torch.autograd.grad(terms.losses.sum(), sums, allow_unused=True)
    assert [gradient is None for gradient in found] == [False, False, True, True]


def test_dpo_of_equal_answers_moves_neither() -> None:
    policy, reference = torch.tensor([-4.0], requires_grad=True), torch.tensor([-7.0])
    (gradient,) = torch.autograd.grad(dpo_loss(policy, policy, reference, reference, 0.5).losses.sum(), policy)
    assert gradient == 0


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_dpo_is_finite_for_any_margin(label_smoothing: float) -> None:
    chosen = torch.tensor([0.0, -1e6], requires_grad=True)
    terms = dpo_loss(chosen, chosen.detach().flip(0), torch.zeros(2), torch.zeros(2), 1.0, label_smoothing)
    (gradient,) = torch.autograd.grad(terms.losses.sum(), chosen)
    assert torch.isfinite(terms.losses).all()
    torch.testing.assert_close(gradient, torch.tensor([label_smoothing, label_smoothing - 1]))


def test_dpo_keeps_the_small_difference_of_long_answers() -> None:
    """Four sums near 1e4 nats are exact to 1e-3 each; the policy's small steps must still be seen."""
    step = 2.0**-10
    reference_chosen, reference_rejected = torch.tensor([-10000.5]), torch.tensor([-3.3])
    terms = dpo_loss(
        reference_chosen + step, reference_rejected.clone(), reference_chosen, reference_rejected, beta=1.0
    )
    assert terms.chosen_rewards == step
    torch.testing.assert_close(terms.losses, torch.tensor([math.log1p(math.exp(-step))]))


def test_smoothed_dpo_is_smallest_where_the_odds_are_those_of_the_noise() -> None:
    best = torch.tensor([math.log(0.9 / 0.1)], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(dpo_loss(best, zero, zero, zero, 1.0, 0.1).losses.sum(), best)
    assert abs(float(gradient)) < 1e-12


@pytest.mark.parametrize(
    ("beta", "label_smoothing", "message"),
    [(0.0, 0.0, "beta=0.0"), (math.nan, 0.0, "beta=nan"), (0.1, 0.5, "label_smoothing=0.5"), (0.1, -0.1, "=-0.1")],
)
def test_dpo_refuses_numbers_out_of_range(beta: float, label_smoothing: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dpo_loss(*make_logprobs(), beta, label_smoothing)


@settings(deadline=None, max_examples=100)
@given(chosen=st.floats(-30, -1e-4), rejected=st.floats(-30, -1e-4))
def test_orpo_is_its_formula(chosen: float, rejected: float) -> None:
    """In float64, eq. 4 to 7 as they are written."""
    leaves = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (chosen, rejected)]
    loss = orpo_odds_ratio_loss(*leaves)
    odds = [leaf.exp() / (1 - leaf.exp()) for leaf in leaves]
    expected = -torch.sigmoid(torch.log(odds[0] / odds[1])).log()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-11)
    wanted = torch.autograd.grad(expected.sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), leaves), wanted, rtol=1e-6, atol=1e-9)


@settings(deadline=None, max_examples=100)
@given(chosen=st.floats(-60, -(2**-16), width=32), rejected=st.floats(-60, -(2**-16), width=32))
def test_orpo_in_float32_is_that_in_float64(chosen: float, rejected: float) -> None:
    single = [torch.tensor([value], requires_grad=True) for value in (chosen, rejected)]
    double = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (chosen, rejected)]
    loss, expected = orpo_odds_ratio_loss(*single), orpo_odds_ratio_loss(*double)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    wanted = torch.autograd.grad(expected.sum(), double)
    for found, gradient in zip(torch.autograd.grad(loss.sum(), single), wanted, strict=True):
        torch.testing.assert_close(found.double(), gradient, rtol=3e-5, atol=1e-6)


@pytest.mark.parametrize("rejected", [0.0, -1e-12, -1e-7, -0.7, -100.0, -1e30])
@pytest.mark.parametrize("chosen", [0.0, -1e-12, -1e-7, -0.7, -100.0, -1e30])
def test_orpo_is_finite_everywhere(chosen: float, rejected: float) -> None:
    leaves = [torch.tensor([value], requires_grad=True) for value in (chosen, rejected)]
    loss = orpo_odds_ratio_loss(*leaves)
    by_chosen, by_rejected = torch.autograd.grad(loss.sum(), leaves)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(by_chosen).all()
    assert torch.isfinite(by_rejected).all()
    assert by_chosen <= 0 <= by_rejected


def test_orpo_can_unlearn_an_answer_that_the_model_is_sure_of() -> None:
    rejected = torch.zeros(1, requires_grad=True)
    (gradient,) = torch.autograd.grad(orpo_odds_ratio_loss(torch.tensor([-2.0]), rejected).sum(), rejected)
    assert gradient > 1e6


def test_orpo_of_equal_answers_is_log_two() -> None:
    answers = torch.tensor([-0.01, -3.0])
    torch.testing.assert_close(orpo_odds_ratio_loss(answers, answers), torch.full((2,), math.log(2)))


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(5,\), \(5,\), \(5,\), \(1,\)"):
        dpo_loss(*(torch.zeros(5),) * 3, torch.zeros(1), 0.1)
    with pytest.raises(ValueError, match="one number for each pair"):
        orpo_odds_ratio_loss(torch.zeros(2, 3), torch.zeros(2, 3))
