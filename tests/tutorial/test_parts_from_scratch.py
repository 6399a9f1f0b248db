"""The parts of the tutorial's step, each against torch's own."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.optim import create_schedule
from kd.tutorial.parts_from_scratch import (
    LossScaler,
    clip_by_global_norm,
    count_targets,
    gradient_norm,
    no_scaling,
    perplexity,
    rng_state,
    set_rng_state,
    summed_cross_entropy,
    warmup_cosine,
)


def logits_and_labels(scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(4, 5, 7, generator=generator)
    labels = torch.randint(0, 7, (4, 5), generator=generator)
    labels[1, 2:] = labels[3] = -100
    return logits.requires_grad_(), labels


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_cross_entropy_is_torchs_in_value_and_gradient(scale: float) -> None:
    ours, labels = logits_and_labels(scale)
    theirs = ours.detach().clone().requires_grad_()
    found = summed_cross_entropy(ours, labels)
    expected = F.cross_entropy(theirs.flatten(0, 1), labels.flatten(), reduction="sum")
    found.backward()  # type: ignore[no-untyped-call]
    expected.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert count_targets(labels) == 12


def test_cross_entropy_of_half_precision_is_summed_in_float32() -> None:
    logits = torch.zeros(1, 1000, 200, dtype=torch.float16)
    total = summed_cross_entropy(logits, torch.zeros(1, 1000, dtype=torch.int64))
    assert total.item() == pytest.approx(1000 * math.log(200), rel=1e-5)


def test_no_target_is_a_loss_of_0_with_gradients_of_0() -> None:
    logits, labels = logits_and_labels()
    loss = summed_cross_entropy(logits, torch.full_like(labels, -100))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_perplexity_of_a_uniform_guess_is_the_number_of_choices() -> None:
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e4) == math.inf


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 1e6])
def test_clipping_is_torchs(max_norm: float) -> None:
    ours = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    ours[1].bias.requires_grad_(False)  # has no gradient
    theirs = copy.deepcopy(ours)
    for model in (ours, theirs):
        model(torch.ones(5, 3)).square().sum().backward()
    norm = gradient_norm(ours.parameters())
    factor = clip_by_global_norm(ours.parameters(), norm, max_norm)
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    assert norm == pytest.approx(expected.item())
    assert factor == pytest.approx(min(1.0, max_norm / norm), rel=1e-4)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_norm_of_nothing_is_0() -> None:
    assert gradient_norm(nn.Linear(2, 2).parameters()) == 0


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (10, 10), (20, 10)])
def test_the_schedule_is_that_of_the_real_trainers(warmup: int, total: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = create_schedule("cosine", optimizer, warmup, total)
    for step in range(total):
        assert warmup_cosine(step, warmup, total) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_the_loss_scale_moves_as_torchs_and_leaves_the_true_gradient() -> None:
    first, second = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.SGD([second], lr=0.0)
    theirs = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4)
    ours = LossScaler(scale=1024.0, growth_interval=4)
    generator = torch.Generator().manual_seed(0)
    scales = set()
    for _ in range(200):
        overflowed = bool(torch.rand((), generator=generator) < 0.15)
        slope = math.inf if overflowed else 3.0
        first.grad = second.grad = None
        (ours.scale * slope * first.sum()).backward()  # type: ignore[no-untyped-call]
        theirs.scale(slope * second.sum()).backward()  # type: ignore[no-untyped-call]
        ours.unscale([first])
        theirs.unscale_(optimizer)
        torch.testing.assert_close(first.grad, second.grad)
        theirs.step(optimizer)
        theirs.update()
        ours.adapt(overflowed)
        assert ours.scale == theirs.get_scale()
        scales.add(ours.scale)
    assert len(scales) > 4


def test_without_scaling_the_factor_stays_1() -> None:
    scaler = no_scaling()
    for _ in range(5000):
        scaler.adapt(overflowed=False)
    assert scaler.scale == 1


def test_random_numbers_are_drawn_again() -> None:
    state = rng_state()
    first = torch.rand(3)
    torch.rand(5)
    set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
