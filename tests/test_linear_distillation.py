"""The loss without logits against `kd.losses` on logits in float64."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kd.config import ModelConfig
from kd.linear_distillation import linear_distillation_loss, linear_scores
from kd.losses import IGNORE_INDEX, distillation_loss, token_agreement, token_kl, token_nll
from kd.model import StudentModel
from kd.tiles import Tiling, squarings

HALF = (torch.bfloat16, torch.float16)
SMALL = Tiling(4, 10)
settings.register_profile("quiet", deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("quiet")


@dataclass
class Problem:
    """Leaves and labels of one loss; hidden states are (N, width)."""

    student: Tensor
    student_weight: Tensor
    teacher: Tensor
    teacher_weight: Tensor
    labels: Tensor

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.student, self.student_weight

    def loss(
        self, alpha: float, temperature: float, tiling: Tiling | None = SMALL, **biases: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return linear_distillation_loss(
            self.student,
            self.student_weight,
            self.teacher,
            self.teacher_weight,
            self.labels,
            alpha,
            temperature,
            tiling=tiling,
            **biases,
        )

    def logits(self) -> tuple[Tensor, Tensor]:
        return F.linear(self.student, self.student_weight), F.linear(self.teacher, self.teacher_weight)


def on_grid(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Return integers of at most 3: every product and sum of a few is exact in every dtype, whatever the order."""
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


def make_problem(
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    tokens: int = 21,
    vocab: int = 37,
    ignored: float = 0.3,
    student_gain: float = 0.25,
    teacher_gain: float = 0.25,
) -> Problem:
    """Return a problem with exact logits: integers up to 9 * width, times the gains (powers of two)."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = on_grid((tokens, 5), generator, dtype), on_grid((tokens, 6), generator, dtype)
    student_weight = on_grid((vocab, 5), generator, dtype) * student_gain
    teacher_weight = on_grid((vocab, 6), generator, dtype) * teacher_gain
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = IGNORE_INDEX
    return Problem(student.requires_grad_(), student_weight.requires_grad_(), teacher, teacher_weight, labels)


def in_float64(problem: Problem, alpha: float, temperature: float) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return the terms and gradients of `distillation_loss` in float64 on the same rounded logits."""
    student, teacher = (logits.detach().double() for logits in problem.logits())
    student.requires_grad_()
    total, terms = distillation_loss(student, teacher, problem.labels, alpha, temperature)
    (by_logits,) = torch.autograd.grad(total, student)
    by_hidden = by_logits @ problem.student_weight.detach().double()
    by_weight = by_logits.T @ problem.student.detach().double()
    return terms | {"total_loss": total.detach()}, [by_hidden, by_weight]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.0, 16.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tiling", [Tiling(1, 1), SMALL, Tiling(16, 37), None])
def test_value_and_gradients_equal_those_from_logits(alpha: float, temperature: float, tiling: Tiling | None) -> None:
    problem = make_problem()
    bias, teacher_bias = torch.linspace(-1, 1, 37).double().requires_grad_(), torch.linspace(2, -1, 37).double()
    total, terms = problem.loss(alpha, temperature, tiling, student_bias=bias, teacher_bias=teacher_bias)
    student, teacher = problem.logits()
    expected, expected_terms = distillation_loss(
        student + bias, teacher + teacher_bias, problem.labels, alpha, temperature
    )
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(terms, expected_terms)
    leaves = (*problem.leaves(), bias)
    # Scaled, as accumulation and GradScaler do it.
    torch.testing.assert_close(torch.autograd.grad(3 * total, leaves), torch.autograd.grad(3 * expected, leaves))


@settings(max_examples=200)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 20),
    vocab=st.integers(1, 50),
    tiling=st.builds(Tiling, st.integers(1, 25), st.integers(1, 60)),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    alpha=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)),
    temperature=st.one_of(st.sampled_from([1.0, 2.0, 4.0, 8.0, 16.0]), st.floats(0.05, 20)),
    gains=st.tuples(st.integers(-6, 8), st.integers(-6, 8)),
)
def test_any_problem_is_finite_and_equals_float64(
    dtype: torch.dtype,
    seed: int,
    tokens: int,
    vocab: int,
    tiling: Tiling,
    ignored: float,
    alpha: float,
    temperature: float,
    gains: tuple[int, int],
) -> None:
    problem = make_problem(dtype, seed, tokens, vocab, ignored, 2.0 ** gains[0], 2.0 ** gains[1])
    total, terms = problem.loss(alpha, temperature, tiling)
    gradients = torch.autograd.grad(total, problem.leaves())
    assert all(bool(value.isfinite().all()) for value in (total, *terms.values(), *gradients))
    expected_terms, expected = in_float64(problem, alpha, temperature)
    # Logits / T are as large as the largest |logit| / T, so rounding them once costs eps of that; the KL is a sum of
    # three such terms (the mean gap, up to twice as large, and two log-sum-exps) and carries T^2. That vanishes with
    # the logits; what the sums of exponentials are rounded by does not. The contract beyond eps * |logit| / T * T^2 is
    # therefore 2 eps (1 + sqrt V) T^2: each exponential is off by eps of itself, and a sum of V of them by V - 1
    # roundings, independent ones, which grow as their root (Higham and Mary 2019, SIAM J. Sci. Comput. 41, A2815). A
    # relative error of a sum is an error of its logarithm, and the KL has two of these, as float32's log_softmax has.
    # The cross-entropy is two terms at T = 1. Means do not grow. The scalars are reported in float32, whatever the
    # dtype of the logits.
    largest = max(float(logits.detach().abs().max()) for logits in problem.logits())
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    sums = 2 * eps * (1 + math.sqrt(vocab))
    allowed = {"kl_loss": 8 * eps * largest * temperature + sums * temperature**2, "ce_loss": 4 * eps * largest}
    allowed["total_loss"] = alpha * allowed["kl_loss"] + (1 - alpha) * allowed["ce_loss"]
    for name, value in terms.items():
        torch.testing.assert_close(
            value.double(), expected_terms[name].double(), rtol=1e-4, atol=allowed[name] + 1e-6, msg=name
        )
    # In a gradient that rounding is an error in the exponent, so a relative error of each probability. The weights of
    # the probabilities, (alpha * T, 1 - alpha) / N, add up to this in each product's sum over tokens or entries.
    weight = 2 * (alpha * temperature + 1 - alpha)
    exponent = 8 * eps * (largest / min(temperature, 1.0) + 1)
    product = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(dtype, 1e-6)
    factors = (problem.student_weight, problem.student)
    for gradient, reference, factor in zip(gradients, expected, factors, strict=True):
        scale = weight * max(1.0, float(factor.detach().abs().max()))
        torch.testing.assert_close(
            gradient.double(), reference, rtol=max(1e-4, product), atol=scale * (exponent + product)
        )


@pytest.mark.parametrize("temperature", [16.0, 20.0])
@pytest.mark.parametrize("std", [0.1, 3.0])
def test_a_small_kl_over_a_large_vocabulary_at_a_high_temperature(std: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20_000, 16, generator=generator) * std / 4
    hidden = torch.randn(32, 16, generator=generator)
    teacher = hidden + 0.3 * torch.randn(32, 16, generator=generator)
    labels = torch.randint(len(weight), (32,), generator=generator)
    problem = Problem(hidden, weight, teacher, weight, labels)
    _, terms = problem.loss(0.5, temperature, None)
    expected, _ = in_float64(problem, 0.5, temperature)
    # Rounding the log-sum-exps, about log V, to float32 would cost more.
    allowed = 0.2 * torch.finfo(torch.float32).eps * temperature**2
    torch.testing.assert_close(terms["kl_loss"].double(), expected["kl_loss"].double(), rtol=1e-5, atol=allowed)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 2.0, 16.0, 20.0])
def test_logits_of_ten_thousand_are_finite(dtype: torch.dtype, temperature: float) -> None:
    problem = make_problem(dtype, student_gain=512.0, teacher_gain=512.0)
    assert 9_000 < float(problem.logits()[0].detach().abs().max()) < 13_000
    total, terms = problem.loss(0.5, temperature)
    assert all(bool(x.isfinite().all()) for x in (*terms.values(), *torch.autograd.grad(total, problem.leaves())))


def test_small_float16_gradients_survive() -> None:
    # Each entry's probability is about 1e-4, and divided by the tokens far below float16's smallest number.
    problem = make_problem(torch.float16, tokens=64, vocab=8192, student_gain=2.0**-10, teacher_gain=2.0**-10)
    total, _ = problem.loss(0.0, 1.0, Tiling(16, 1000))
    scale = 2.0**16
    _, by_weight = torch.autograd.grad(total * scale, problem.leaves())
    _, (_, expected) = in_float64(problem, 0.0, 1.0)
    torch.testing.assert_close(by_weight.double(), expected * scale, rtol=2e-3, atol=1e-3)


def test_ignored_positions_never_matter() -> None:
    problem = make_problem()
    reference = problem.loss(0.5, 2.0)[0]
    ignored = problem.labels == IGNORE_INDEX
    assert 0 < int(ignored.sum()) < len(ignored)
    expected = torch.autograd.grad(reference, problem.leaves())
    with torch.no_grad():
        problem.student[ignored] = math.nan
        problem.teacher[ignored] = math.inf
    total = problem.loss(0.5, 2.0)[0]
    torch.testing.assert_close(total, reference)
    torch.testing.assert_close(torch.autograd.grad(total, problem.leaves()), expected)
    assert bool((expected[0][ignored] == 0).all())


def test_all_masked_is_zero_with_a_live_graph() -> None:
    problem = make_problem(ignored=2.0)
    total, terms = problem.loss(0.5, 2.0)
    assert {name: float(value) for name, value in terms.items()} == {"kl_loss": 0, "ce_loss": 0, "total_loss": 0}
    for gradient, leaf in zip(torch.autograd.grad(total, problem.leaves()), problem.leaves(), strict=True):
        torch.testing.assert_close(gradient, torch.zeros_like(leaf))


def test_without_a_teacher_alpha_zero_is_cross_entropy() -> None:
    problem = make_problem()
    total, terms = linear_distillation_loss(*problem.leaves(), None, None, problem.labels, 0.0, 7.0, tiling=SMALL)
    expected = F.cross_entropy(problem.logits()[0], problem.labels)
    assert set(terms) == {"ce_loss", "total_loss"}
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(
        torch.autograd.grad(total, problem.leaves()), torch.autograd.grad(expected, problem.leaves())
    )


def test_alpha_one_has_no_gradient_of_the_label() -> None:
    problem = make_problem()
    before = torch.autograd.grad(problem.loss(1.0, 2.0)[0], problem.leaves())
    problem.labels = torch.where(problem.labels == IGNORE_INDEX, problem.labels, (problem.labels + 1) % 37)
    torch.testing.assert_close(torch.autograd.grad(problem.loss(1.0, 2.0)[0], problem.leaves()), before, rtol=0, atol=0)


def test_teacher_entries_of_minus_infinity_have_no_part() -> None:
    problem = make_problem()
    bias = torch.zeros(37, dtype=torch.float64)
    bias[::3] = -math.inf
    total, _ = problem.loss(0.5, 2.0, teacher_bias=bias)
    student, teacher = problem.logits()
    expected, _ = distillation_loss(student, teacher + bias, problem.labels, 0.5, 2.0)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(
        torch.autograd.grad(total, problem.leaves()), torch.autograd.grad(expected, problem.leaves())
    )


def test_a_frozen_weight_gets_no_gradient_and_the_hidden_states_theirs() -> None:
    problem = make_problem()
    problem.student_weight.requires_grad_(False)
    total, _ = problem.loss(0.5, 2.0)
    total.backward()  # type: ignore[no-untyped-call]
    assert problem.student_weight.grad is None
    torch.testing.assert_close(problem.student.grad, in_float64(problem, 0.5, 2.0)[1][0])


def test_a_second_backward_is_refused() -> None:
    total, _ = make_problem().loss(0.5, 2.0)
    total.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="already differentiated"):
        total.backward()  # type: ignore[no-untyped-call]


def test_gradients_of_a_tied_head_add_up() -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=24, vocab_size=37, max_seq_len=8
    )
    model = StudentModel(config).double()
    tokens, labels = torch.randint(37, (2, 3, 8))
    labels[0, :3] = IGNORE_INDEX
    teacher, teacher_weight = torch.randn(3, 8, 6).double(), torch.randn(37, 6).double()
    total, _ = linear_distillation_loss(
        model.hidden_states(tokens), model.lm_head.weight, teacher, teacher_weight, labels, 0.5, 2.0, tiling=SMALL
    )
    expected, _ = distillation_loss(model(tokens), teacher @ teacher_weight.T, labels, 0.5, 2.0)
    parameters = list(model.parameters())
    assert any(parameter is model.lm_head.weight for parameter in parameters)
    torch.testing.assert_close(torch.autograd.grad(total, parameters), torch.autograd.grad(expected, parameters))


def test_autocast_rounds_the_students_products_and_nothing_else() -> None:
    problem = make_problem(torch.float32, seed=1)
    with torch.no_grad():  # no longer exact in bfloat16
        problem.student.add_(0.37).mul_(1 / 3)
        problem.teacher.add_(0.37).mul_(1 / 3)
    _, teacher = problem.logits()  # a teacher computes in its own dtype
    with torch.autocast("cpu", torch.bfloat16):
        total, terms = problem.loss(0.5, 2.0)
        student, _ = problem.logits()
        assert student.dtype == torch.bfloat16
        expected, expected_terms = distillation_loss(student, teacher, problem.labels, 0.5, 2.0)
    assert total.dtype == torch.float32
    torch.testing.assert_close(terms, expected_terms, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(total, problem.leaves())
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 2
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, problem.leaves()), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0.02, atol=0.02 * float(reference.abs().max()))


def test_small_gradients_survive_autocast_to_float16() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(4000, 4, requires_grad=True), torch.randn(500, 4, requires_grad=True)
    labels = torch.randint(500, (4000,))
    # A gradient by a logit is about 1 / 4,000 / 500: below float16's smallest normal number.
    with torch.autocast("cpu", torch.float16):
        total, _ = linear_distillation_loss(hidden, weight, None, None, labels, 0.0)
    found = torch.autograd.grad(total, (hidden, weight))
    expected = torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight), labels), (hidden, weight))
    for gradient, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0.01, atol=0.005 * float(reference.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tiling", [Tiling(1, 1), SMALL, None])
def test_scores_equal_those_from_logits(dtype: torch.dtype, tiling: Tiling | None) -> None:
    problem = make_problem(dtype)
    labels = problem.labels.view(3, 7)
    hidden, teacher_hidden = problem.student.view(3, 7, 5), problem.teacher.view(3, 7, 6)
    scores = linear_scores(
        hidden, problem.student_weight, teacher_hidden, problem.teacher_weight, labels, tiling=tiling
    )
    student, teacher = (logits.detach().view(3, 7, 37) for logits in problem.logits())
    valid = labels != IGNORE_INDEX
    assert scores.kl is not None
    assert scores.agreement is not None
    assert scores.teacher_nll is not None
    assert not scores.nll.requires_grad
    close: Callable[..., None] = lambda got, want: torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # noqa: E731
    close(scores.nll, token_nll(student, labels))
    close(scores.teacher_nll, token_nll(teacher, labels))
    close(scores.kl, token_kl(student, teacher).masked_fill(~valid, 0.0))
    # Logits on a grid tie often, and then the first counts.
    assert torch.equal(scores.agreement, token_agreement(student, teacher) & valid)
    assert scores.agreement.any()


def test_scores_without_teacher_and_without_labels() -> None:
    problem = make_problem(ignored=2.0)
    scores = linear_scores(*problem.leaves(), None, None, problem.labels)
    assert scores.kl is scores.agreement is scores.teacher_nll is None
    torch.testing.assert_close(scores.nll, torch.zeros(21, dtype=torch.float64))


def test_evaluation_without_gradients_gives_the_same_value() -> None:
    problem = make_problem()
    with torch.no_grad():
        total, terms = problem.loss(0.3, 2.0)
    assert not total.requires_grad
    torch.testing.assert_close(terms, problem.loss(0.3, 2.0)[1])


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the number of elements of the largest tensors that operators return."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.sizes.extend(tensors_of(result))
        return result


def tensors_of(result: Any) -> Iterator[int]:
    for item in result if isinstance(result, (tuple, list)) else [result]:
        if isinstance(item, Tensor):
            yield item.untyped_storage().nbytes() // item.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_tokens_by_vocabulary_exists(dtype: torch.dtype) -> None:
    tokens, vocab, chunk, tile = 256, 1000, 16, 100
    problem = make_problem(dtype, tokens=tokens, vocab=vocab, ignored=0.0)
    with Largest() as seen:
        problem.loss(0.5, 2.0, Tiling(chunk, tile))[0].backward()  # type: ignore[no-untyped-call]
    # The chunk's logits; the head's gradient is smaller here.
    assert max(seen.sizes) == chunk * vocab
    with Largest() as plain:
        distillation_loss(*problem.logits(), problem.labels)
    assert max(plain.sizes) >= tokens * vocab


def test_evaluation_holds_no_more_than_tiles() -> None:
    problem = make_problem(torch.float32, tokens=64, vocab=4000, ignored=0.0)
    with Largest() as seen:
        linear_scores(
            *problem.leaves(), problem.teacher, problem.teacher_weight, problem.labels, tiling=Tiling(32, 1000)
        )
    assert max(seen.sizes) <= 2 * 32 * 1000


def test_what_does_not_fit_is_refused() -> None:
    problem = make_problem()
    h, w, th, tw, labels = *problem.leaves(), problem.teacher, problem.teacher_weight, problem.labels
    with pytest.raises(ValueError, match=r"alpha=1\.5"):
        linear_distillation_loss(h, w, th, tw, labels, 1.5, 2.0)
    with pytest.raises(ValueError, match=r"temperature=0\.0"):
        linear_distillation_loss(h, w, th, tw, labels, 0.5, 0.0)
    with pytest.raises(ValueError, match="needs a teacher"):
        linear_distillation_loss(h, w, None, None, labels, 0.5, 2.0)
    with pytest.raises(ValueError, match="only one was given"):
        linear_distillation_loss(h, w, th, None, labels, 0.5, 2.0)
    with pytest.raises(ValueError, match="same vocabulary"):
        linear_distillation_loss(h, w, th, tw[:-1], labels, 0.5, 2.0)
    with pytest.raises(ValueError, match="one next-token"):
        linear_distillation_loss(h, w, th, tw, labels[1:], 0.5, 2.0)
    with pytest.raises(ValueError, match="do not fit"):
        linear_distillation_loss(h, w[:, :-1], th, tw, labels, 0.5, 2.0)
    with pytest.raises(ValueError, match="in the vocabulary"):
        linear_distillation_loss(h, w, th, tw, labels + 37, 0.5, 2.0)
    with pytest.raises(ValueError, match=r"Tiling\.tokens=0"):
        Tiling(0, 5)


@given(st.one_of(st.sampled_from([0.5, 1.0, 2.0, 4.0, 16.0, 32.0]), st.floats(0.05, 40)))
def test_squarings_are_those_that_undo_the_temperature(temperature: float) -> None:
    count = squarings(temperature)
    if count is not None:
        assert 2.0**count == temperature
    else:
        assert temperature not in (1.0, 2.0, 4.0, 8.0, 16.0)
