"""The losses against an independent float64 computation, with the gradients written out by hand."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd.losses import (
    IGNORE_INDEX,
    causal_lm_loss,
    distillation_loss,
    token_agreement,
    token_kl,
    token_nll,
)

Array = npt.NDArray[np.float64]
BATCH, LENGTH, VOCAB = 3, 5, 11
MASKED_COUNTS = ((0, 0, 0), (1, 4, 2), (5, 0, 3), (5, 5, 4))
ALPHAS = (0.0, 0.3, 0.5, 1.0)
TEMPERATURES = (0.5, 1.0, 2.0, 4.0, 20.0)


def make_batch(masked: tuple[int, ...] = (1, 4, 2), scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return float64 student and teacher logits, and labels with `masked` ignored positions in each row."""
    generator = torch.Generator().manual_seed(sum(masked))
    shape = (len(masked), LENGTH, VOCAB)
    student, teacher = (scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, VOCAB, shape[:2], generator=generator)
    for row, count in enumerate(masked):
        labels[row, torch.randperm(LENGTH, generator=generator)[:count]] = IGNORE_INDEX
    return student, teacher, labels


def softmax(logits: Array) -> Array:
    """Return probabilities over the last axis."""
    powers: Array = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Array = powers / powers.sum(axis=-1, keepdims=True)
    return result


def by_hand(student: Array, teacher: Array, labels: npt.NDArray[np.int64], alpha: float, temperature: float) -> Array:
    """Return [kl, ce, total] and then the gradient of the total by the student's logits, flattened.

    With q = softmax(s), the gradient of the cross-entropy by s is q - onehot; that of T^2 KL(p_T || q_T) is
    T (q_T - p_T).
    """
    kl = ce = 0.0
    gradient = np.zeros_like(student)
    positions = np.argwhere(labels != IGNORE_INDEX)
    for row, column in positions:
        s, t, label = student[row, column], teacher[row, column], labels[row, column]
        p, q = softmax(t / temperature), softmax(s / temperature)
        kl += temperature**2 * sum(p[v] * (math.log(p[v]) - math.log(q[v])) for v in range(len(p)))
        ce -= math.log(softmax(s)[label])
        onehot = np.eye(len(s))[label]
        gradient[row, column] = alpha * temperature * (q - p) + (1 - alpha) * (softmax(s) - onehot)
    count = len(positions)
    values = np.array([kl, ce, alpha * kl + (1 - alpha) * ce])
    return np.concatenate([values, gradient.ravel()]) / count


@pytest.mark.parametrize("masked", MASKED_COUNTS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradient_equal_those_by_hand(
    alpha: float, temperature: float, masked: tuple[int, ...], dtype: torch.dtype
) -> None:
    student, teacher, labels = make_batch(masked)
    expected = by_hand(student.numpy(), teacher.numpy(), labels.numpy(), alpha, temperature)
    leaf = student.to(dtype).requires_grad_()
    total, parts = distillation_loss(leaf, teacher.to(dtype), labels, alpha, temperature)
    total.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    reported = [float(parts[name]) for name in ("kl_loss", "ce_loss", "total_loss")]
    np.testing.assert_allclose(reported, expected[:3], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(float(total.detach()), expected[2], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(leaf.grad.double().numpy().ravel(), expected[3:], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_gradcheck(alpha: float) -> None:
    student, teacher, labels = make_batch(scale=1.0)
    leaf = student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: distillation_loss(s, teacher, labels, alpha, 3.0)[0], (leaf,))


def test_values_are_detached_float32_scalars_that_add_up() -> None:
    student, teacher, labels = make_batch()
    _, parts = distillation_loss(student.requires_grad_(), teacher, labels, alpha=0.3, temperature=4.0)
    assert set(parts) == {"kl_loss", "ce_loss", "total_loss"}
    for value in parts.values():
        assert value.dtype == torch.float32
        assert value.shape == ()
        assert not value.requires_grad
    torch.testing.assert_close(parts["total_loss"], 0.3 * parts["kl_loss"] + 0.7 * parts["ce_loss"])


def test_defaults_are_half_and_two() -> None:
    student, teacher, labels = make_batch()
    assert distillation_loss(student, teacher, labels)[0] == distillation_loss(student, teacher, labels, 0.5, 2.0)[0]


def test_divergence_is_from_teacher_to_student() -> None:
    teacher = torch.tensor([0.75, 0.25]).log()
    student = torch.tensor([0.5, 0.5]).log()
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    backward = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert abs(forward - backward) > 0.01
    assert float(token_kl(student, teacher)) == pytest.approx(forward, rel=1e-5)


def test_kl_is_scaled_by_squared_temperature() -> None:
    student, teacher, _ = make_batch()
    labels = torch.zeros(student.shape[:2], dtype=torch.long)
    total, _ = distillation_loss(student, teacher, labels, alpha=1.0, temperature=4.0)
    torch.testing.assert_close(total, 16 * token_kl(student, teacher, 4.0).mean())


def test_kl_gradient_at_high_temperature_tends_to_that_of_squared_logit_differences() -> None:
    student, teacher, _ = make_batch((0,), scale=1.0)
    student, teacher = (logits - logits.mean(dim=-1, keepdim=True) for logits in (student, teacher))
    labels = torch.zeros(student.shape[:2], dtype=torch.long)
    leaf = student.requires_grad_()
    distillation_loss(leaf, teacher, labels, alpha=1.0, temperature=1e4)[0].backward()  # type: ignore[no-untyped-call]
    expected = (student.detach() - teacher) / VOCAB / LENGTH
    torch.testing.assert_close(leaf.grad, expected, atol=1e-5, rtol=1e-3)


def test_equal_models_have_no_divergence() -> None:
    student, _, labels = make_batch()
    leaf = student.float().requires_grad_()
    assert distillation_loss(student.float(), student.float(), labels, alpha=1.0)[0] == 0.0
    total, parts = distillation_loss(leaf, student.float() + 7.0, labels, alpha=1.0)
    total.backward()  # type: ignore[no-untyped-call]
    assert float(parts["kl_loss"]) == pytest.approx(0.0, abs=1e-5)
    assert leaf.grad is not None
    assert leaf.grad.abs().max() < 1e-6


@pytest.mark.parametrize("alpha", ALPHAS)
def test_batch_without_targets_gives_zero_and_zero_gradients(alpha: float) -> None:
    student, teacher, labels = make_batch((5, 5))
    leaf = student.float().requires_grad_()
    total, parts = distillation_loss(leaf, teacher.float(), labels, alpha)
    total.backward()  # type: ignore[no-untyped-call]
    assert [float(value) for value in parts.values()] == [0.0, 0.0, 0.0]
    assert leaf.grad is not None
    assert (leaf.grad == 0).all()


def test_causal_loss_without_targets_gives_zero_and_zero_gradients() -> None:
    logits = torch.randn(4, VOCAB, requires_grad=True)
    loss = causal_lm_loss(logits, torch.full((4,), IGNORE_INDEX))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0.0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_alpha_zero_is_plain_cross_entropy_whatever_the_teacher_says() -> None:
    student, teacher, labels = make_batch()
    ours, plain = (student.float().requires_grad_() for _ in range(2))
    total, parts = distillation_loss(ours, torch.full_like(teacher.float(), math.inf), labels, alpha=0.0)
    expected = F.cross_entropy(plain.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
    total.backward()  # type: ignore[no-untyped-call]
    expected.backward()  # type: ignore[no-untyped-call]
    assert torch.equal(total, expected)
    assert torch.equal(parts["total_loss"], expected.detach())
    assert ours.grad is not None
    assert plain.grad is not None
    assert torch.equal(ours.grad, plain.grad)


def test_alpha_one_takes_no_gradient_from_labels() -> None:
    student, teacher, labels = make_batch()
    others = torch.where(labels == IGNORE_INDEX, labels, (labels + 1) % VOCAB)
    gradients = []
    for targets in (labels, others):
        leaf = student.clone().requires_grad_()
        distillation_loss(leaf, teacher, targets, alpha=1.0)[0].backward()  # type: ignore[no-untyped-call]
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=0, rtol=0)


def test_alpha_one_does_not_care_for_impossible_labels() -> None:
    student, teacher, labels = make_batch()
    student[..., 0] = teacher[..., 0] = -math.inf
    total, parts = distillation_loss(student, teacher, torch.zeros_like(labels), alpha=1.0)
    assert total.isfinite()
    assert total > 0
    assert parts["ce_loss"] == math.inf


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher, labels = make_batch()
    teacher.requires_grad_()
    distillation_loss(student.requires_grad_(), teacher, labels)[0].backward()  # type: ignore[no-untyped-call]
    assert teacher.grad is None


def test_masked_positions_do_not_matter() -> None:
    student, teacher, labels = make_batch()
    ignored = labels == IGNORE_INDEX
    spoiled = student.clone()
    spoiled[ignored] += 100 * torch.randn_like(spoiled[ignored])
    broken = teacher.clone()
    broken[ignored] = math.nan
    results = []
    for s, t in ((student, teacher), (spoiled, broken)):
        leaf = s.clone().requires_grad_()
        total, _ = distillation_loss(leaf, t, labels)
        total.backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        results.append((total.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("who", ["teacher", "both"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_vocabulary_tail_of_minus_infinity(alpha: float, who: str) -> None:
    student, teacher, labels = make_batch((0, 2))
    labels = labels.clamp(max=7)
    teacher[..., 8:] = -math.inf
    if who == "both":
        student[..., 8:] = -math.inf
    leaf = student.float().requires_grad_()
    total, parts = distillation_loss(leaf, teacher.float(), labels, alpha)
    total.backward()  # type: ignore[no-untyped-call]
    assert all(value.isfinite() for value in parts.values())
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    if who == "both":
        short, _ = distillation_loss(student[..., :8].float(), teacher[..., :8].float(), labels, alpha)
        torch.testing.assert_close(total, short)
        assert (leaf.grad[..., 8:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher, labels = make_batch()
    student, teacher = student.to(dtype), teacher.to(dtype)
    total, _ = distillation_loss(student, teacher, labels, temperature=3.0)
    expected, _ = distillation_loss(student.float(), teacher.float(), labels, temperature=3.0)
    assert total.dtype == torch.float32
    assert torch.equal(total, expected)
    assert token_nll(student, labels).dtype == token_kl(student, teacher).dtype == torch.float32


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_huge_logits_stay_finite(temperature: float) -> None:
    student, teacher, labels = make_batch(scale=1e4)
    leaf = student.float().requires_grad_()
    total, parts = distillation_loss(leaf, teacher.float(), labels, 0.5, temperature)
    total.backward()  # type: ignore[no-untyped-call]
    assert all(value.isfinite() for value in parts.values())
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.floats(-30, 30, width=32), min_size=4, max_size=4),
            st.lists(st.floats(-30, 30, width=32), min_size=4, max_size=4),
            st.sampled_from([IGNORE_INDEX, 0, 1, 2, 3]),
        ),
        min_size=1,
        max_size=6,
    ),
    alpha=st.floats(0, 1),
    temperature=st.floats(0.25, 50),
    shift=st.floats(-100, 100),
)
def test_properties(
    rows: list[tuple[list[float], list[float], int]], alpha: float, temperature: float, shift: float
) -> None:
    student, teacher = (torch.tensor([[row[side] for row in rows]], dtype=torch.float64) for side in (0, 1))
    labels = torch.tensor([[row[2] for row in rows]])
    total, parts = distillation_loss(student, teacher, labels, alpha, temperature)
    assert parts["kl_loss"] >= -1e-9
    assert parts["ce_loss"] >= 0
    assert total.isfinite()
    # A constant added to all logits changes nothing; neither does the order of tokens of the vocabulary.
    shifted, _ = distillation_loss(student + shift, teacher - shift, labels, alpha, temperature)
    torch.testing.assert_close(shifted, total, atol=1e-8, rtol=1e-8)
    reverse, _ = distillation_loss(
        student.flip(-1), teacher.flip(-1), torch.where(labels < 0, labels, 3 - labels), alpha, temperature
    )
    torch.testing.assert_close(reverse, total, atol=1e-8, rtol=1e-8)
    # The mean over the valid positions is the loss of the batch without the others.
    valid = labels != IGNORE_INDEX
    if valid.any():
        kept, _ = distillation_loss(student[valid], teacher[valid], labels[valid], alpha, temperature)
        torch.testing.assert_close(kept, total, atol=1e-8, rtol=1e-8)


def test_token_helpers_average_to_the_losses() -> None:
    student, teacher, labels = make_batch()
    valid = labels != IGNORE_INDEX
    _, parts = distillation_loss(student, teacher, labels, temperature=1.0)
    nll = token_nll(student, labels)
    assert nll.shape == labels.shape
    assert (nll[~valid] == 0).all()
    torch.testing.assert_close((nll.sum() / valid.sum()).float(), parts["ce_loss"])
    torch.testing.assert_close(token_kl(student, teacher)[valid].mean().float(), parts["kl_loss"])
    torch.testing.assert_close(causal_lm_loss(student, labels).float(), parts["ce_loss"])


def test_labels_are_not_shifted() -> None:
    logits = torch.zeros(1, 3, 4)
    logits[0, torch.arange(3), torch.tensor([2, 0, 3])] = 100.0
    assert float(causal_lm_loss(logits, torch.tensor([[2, 0, 3]]))) == pytest.approx(0.0, abs=1e-6)
    assert float(causal_lm_loss(logits, torch.tensor([[0, 3, 2]]))) > 50


def test_agreement_compares_the_likeliest_tokens() -> None:
    student = torch.tensor([[0.0, 2.0, 1.0], [5.0, 2.0, 1.0]])
    teacher = torch.tensor([[-9.0, 0.1, 0.0], [0.0, 1.0, 0.0]])
    agreement = token_agreement(student, teacher)
    assert agreement.dtype == torch.bool
    assert agreement.tolist() == [True, False]


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, math.inf])
def test_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=f"alpha={alpha}"):
        distillation_loss(*make_batch(), alpha=alpha)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_temperature_out_of_range_is_refused(temperature: float, alpha: float) -> None:
    with pytest.raises(ValueError, match=f"temperature={temperature}"):
        distillation_loss(*make_batch(), alpha=alpha, temperature=temperature)


def test_shapes_that_differ_are_refused() -> None:
    student, teacher, labels = make_batch()
    with pytest.raises(ValueError, match=r"\(3, 5, 11\).*\(3, 5, 10\)"):
        distillation_loss(student, teacher[..., :-1], labels)
    with pytest.raises(ValueError, match=r"\(3, 5, 11\).*\(3, 5, 10\)"):
        token_kl(student, teacher[..., :-1])
    with pytest.raises(ValueError, match=r"\(3, 5, 11\).*\(1, 5, 11\)"):
        token_agreement(student, teacher[:1])
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(3, 5, 11\)"):
        distillation_loss(student, teacher, labels[:, 1:])
    with pytest.raises(ValueError, match=r"\(15,\).*\(3, 5, 11\)"):
        causal_lm_loss(student, labels.flatten())
