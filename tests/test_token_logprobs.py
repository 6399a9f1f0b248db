"""Log-probabilities and entropies against full logits, in value and in gradient."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kd.config import ModelConfig
from kd.losses import IGNORE_INDEX
from kd.model import StudentModel
from kd.token_logprobs import TokenLogprobs, linear_token_logprobs, token_logprobs

WIDTH, VOCAB = 6, 23
Problem = tuple[Tensor, Tensor, Tensor, Tensor]


def make_problem(
    shape: tuple[int, ...] = (3, 7), ignored: float = 0.4, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Problem:
    """Return hidden states, weight, bias and labels, of which a part is ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(VOCAB, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB, shape, generator=generator)
    return hidden, weight, bias, labels.masked_fill(torch.rand(shape, generator=generator) < ignored, IGNORE_INDEX)


def by_hand(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p(label) and the entropy from the definition of a softmax."""
    probabilities = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
    valid = labels != IGNORE_INDEX
    logprobs = probabilities.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1).log()
    entropy = -(probabilities * probabilities.log()).sum(dim=-1)
    return logprobs * valid, entropy * valid


def weighted(scores: TokenLogprobs, with_entropy: bool) -> Tensor:
    """Return a sum in which each token's scores have a weight of their own."""
    weights = torch.linspace(-1, 2, scores.logprobs.numel(), dtype=scores.logprobs.dtype).view(scores.logprobs.shape)
    total = (weights * scores.logprobs).sum()
    if with_entropy:
        assert scores.entropy is not None
        total = total + (weights.flip(0) * scores.entropy).sum()
    return total


def assert_paths_agree(problem: Problem, with_entropy: bool, chunk_tokens: int, rtol: float, atol: float) -> None:
    hidden, weight, bias, labels = problem
    plain = token_logprobs(F.linear(hidden, weight, bias), labels, with_entropy=with_entropy)
    fast = linear_token_logprobs(
        hidden, weight, labels, bias=bias, with_entropy=with_entropy, chunk_tokens=chunk_tokens
    )
    torch.testing.assert_close(fast.logprobs, plain.logprobs, rtol=rtol, atol=atol)
    if with_entropy:
        torch.testing.assert_close(fast.entropy, plain.entropy, rtol=rtol, atol=atol)
    leaves = (hidden, weight, bias)
    expected = torch.autograd.grad(weighted(plain, with_entropy), leaves)
    torch.testing.assert_close(
        torch.autograd.grad(weighted(fast, with_entropy), leaves), expected, rtol=rtol, atol=atol
    )


def test_plain_scores_are_those_of_the_definition() -> None:
    hidden, weight, bias, labels = make_problem()
    logits = F.linear(hidden, weight, bias)
    scores = token_logprobs(logits, labels, with_entropy=True)
    logprobs, entropy = by_hand(logits, labels)
    torch.testing.assert_close(scores.logprobs, logprobs)
    torch.testing.assert_close(scores.entropy, entropy)
    assert token_logprobs(logits, labels).entropy is None


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 999),
    shape=st.sampled_from([(1,), (5,), (3, 7), (2, 3, 4)]),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    chunk_tokens=st.integers(1, 30),
    with_entropy=st.booleans(),
)
def test_both_agree(seed: int, shape: tuple[int, ...], ignored: float, chunk_tokens: int, with_entropy: bool) -> None:
    assert_paths_agree(make_problem(shape, ignored, seed=seed), with_entropy, chunk_tokens, rtol=1e-10, atol=1e-12)


def test_both_agree_in_float32() -> None:
    for seed in range(20):
        assert_paths_agree(make_problem(dtype=torch.float32, seed=seed), True, 4, rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_gradients_are_those_of_finite_differences(with_entropy: bool) -> None:
    hidden, weight, bias, labels = make_problem((5,))

    def scores(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return weighted(
            linear_token_logprobs(hidden, weight, labels, bias=bias, with_entropy=with_entropy, chunk_tokens=2),
            with_entropy,
        )

    assert torch.autograd.gradcheck(scores, (hidden, weight, bias))


def test_gradient_of_the_entropy_alone() -> None:
    hidden, weight, bias, labels = make_problem()
    fast = linear_token_logprobs(hidden, weight, labels, bias=bias, with_entropy=True, chunk_tokens=4).entropy
    plain = token_logprobs(F.linear(hidden, weight, bias), labels, with_entropy=True).entropy
    assert fast is not None
    assert plain is not None
    found = torch.autograd.grad((fast**2).sum(), (hidden, weight, bias))
    torch.testing.assert_close(found, torch.autograd.grad((plain**2).sum(), (hidden, weight, bias)))


def test_only_the_gradients_that_are_needed() -> None:
    hidden, weight, bias, labels = make_problem()
    frozen = linear_token_logprobs(hidden, weight.detach(), labels, bias=bias.detach()).logprobs.sum()
    expected = linear_token_logprobs(hidden, weight, labels, bias=bias).logprobs.sum()
    torch.testing.assert_close(torch.autograd.grad(frozen, hidden), torch.autograd.grad(expected, hidden))
    with torch.no_grad():
        assert not linear_token_logprobs(hidden, weight, labels, bias=bias).logprobs.requires_grad


def test_large_logits_lose_nothing() -> None:
    """A log-sum-exp near 1000 is rounded by up to 3e-5; what is left of it must not inherit that."""
    hidden = torch.tensor([[1000.0, 1.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [1.0, -20.0], [0.0, 0.0]])
    scores = linear_token_logprobs(hidden, weight, torch.tensor([0]), with_entropy=True)
    rest = torch.tensor(-20.0, dtype=torch.float64).exp()
    assert scores.entropy is not None
    torch.testing.assert_close(scores.entropy.double(), (rest * (20 + 1)).view(1), rtol=0, atol=1e-8)
    (gradient,) = torch.autograd.grad(scores.logprobs.sum(), hidden)
    torch.testing.assert_close(gradient[0, 1].double(), 20 * rest, rtol=1e-5, atol=0)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_ignored_positions_may_hold_anything(with_entropy: bool) -> None:
    hidden, weight, bias, labels = make_problem()
    ignored = labels == IGNORE_INDEX
    with torch.no_grad():
        hidden[ignored] = torch.nan
    for scores in (
        linear_token_logprobs(hidden, weight, labels, bias=bias, with_entropy=with_entropy),
        token_logprobs(F.linear(hidden, weight, bias), labels, with_entropy=with_entropy),
    ):
        assert (scores.logprobs[ignored] == 0).all()
        assert (scores.logprobs[~ignored] < 0).all()
        (by_hidden,) = torch.autograd.grad(weighted(scores, with_entropy), hidden)
        assert (by_hidden[~ignored] != 0).all()
        assert torch.isfinite(by_hidden[~ignored]).all()
        assert (by_hidden[ignored] == 0).all()


def test_without_any_label_the_graph_is_live() -> None:
    hidden, weight, bias, labels = make_problem(ignored=1.0)
    scores = linear_token_logprobs(hidden, weight, labels, bias=bias, with_entropy=True)
    gradients = torch.autograd.grad(weighted(scores, True), (hidden, weight, bias))
    assert all((gradient == 0).all() for gradient in (scores.logprobs, *gradients))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_logits_only(dtype: torch.dtype) -> None:
    hidden, weight, bias, labels = make_problem(dtype=dtype)
    scores = linear_token_logprobs(hidden, weight, labels, bias=bias, with_entropy=True, chunk_tokens=4)
    expected = token_logprobs(F.linear(hidden, weight, bias), labels, with_entropy=True)
    assert scores.logprobs.dtype == torch.float32
    torch.testing.assert_close(scores.logprobs, expected.logprobs)
    torch.testing.assert_close(scores.entropy, expected.entropy)
    gradients = torch.autograd.grad(weighted(scores, True), (hidden, weight, bias))
    wanted = torch.autograd.grad(weighted(expected, True), (hidden, weight, bias))
    for gradient, target in zip(gradients, wanted, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, target, rtol=0.05, atol=0.05)


def test_autocast_decides_the_products_in_both_directions() -> None:
    """The gradients must fit weights in float32, and be the same whether backward runs under autocast or not."""
    hidden, weight, _, labels = make_problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_token_logprobs(hidden, weight, labels).logprobs.sum()
        found = torch.autograd.grad(inside, (hidden, weight), retain_graph=True)
    outside = torch.autograd.grad(inside, (hidden, weight))
    torch.testing.assert_close(found, outside, rtol=0, atol=0)
    half = linear_token_logprobs(hidden.bfloat16(), weight.bfloat16(), labels).logprobs.sum()
    assert inside == half
    assert found[1].dtype == torch.float32


def test_entries_without_probability_do_no_harm() -> None:
    hidden, weight, bias, labels = make_problem(ignored=0.0)
    with torch.no_grad():
        bias[3] = -torch.inf
    labels[labels == 3] = 4
    fast = linear_token_logprobs(hidden, weight, labels, bias=bias, with_entropy=True)
    plain = token_logprobs(F.linear(hidden, weight, bias), labels, with_entropy=True)
    torch.testing.assert_close(fast.entropy, plain.entropy)
    found = torch.autograd.grad(weighted(fast, True), (hidden, weight))
    torch.testing.assert_close(found, torch.autograd.grad(weighted(plain, True), (hidden, weight)))
    assert torch.isfinite(found[0]).all()


class LargestTensor(TorchDispatchMode):
    """Remembers the elements of the largest tensor that an operation returns."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.size = max(self.size, result.numel())
        return result


def test_no_more_than_a_chunk_of_logits_is_held() -> None:
    hidden, weight, bias, labels = make_problem((400,), ignored=0.0)
    with LargestTensor() as largest:
        scores = linear_token_logprobs(hidden, weight, labels, bias=bias, with_entropy=True, chunk_tokens=100)
        weighted(scores, True).backward()  # type: ignore[no-untyped-call]
    assert largest.size == max(100 * VOCAB, hidden.numel())


def test_gradient_of_a_tied_embedding() -> None:
    torch.manual_seed(0)
    model = StudentModel(ModelConfig(16, 1, 2, 1, 16, VOCAB, 8))
    tokens, labels = torch.randint(VOCAB, (2, 8)), torch.randint(VOCAB, (2, 8))
    fast = linear_token_logprobs(model.hidden_states(tokens), model.lm_head.weight, labels, chunk_tokens=5)
    plain = token_logprobs(model(tokens), labels)
    parameters = list(model.parameters())
    found = torch.autograd.grad(fast.logprobs.sum(), parameters)
    torch.testing.assert_close(found, torch.autograd.grad(plain.logprobs.sum(), parameters), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("label", [-1, VOCAB])
def test_a_label_outside_the_vocabulary_is_refused(label: int) -> None:
    hidden, weight, _, labels = make_problem(ignored=0.0)
    labels[0, 0] = label
    with pytest.raises(ValueError, match=f"labels reach from .*{label}.* the head has {VOCAB} rows"):
        linear_token_logprobs(hidden, weight, labels)


def test_what_does_not_fit_is_refused() -> None:
    hidden, weight, bias, labels = make_problem()
    with pytest.raises(ValueError, match="do not match hidden states"):
        linear_token_logprobs(hidden[:, 1:], weight, labels)
    with pytest.raises(ValueError, match="do not fit"):
        linear_token_logprobs(hidden, weight[:, 1:], labels)
    with pytest.raises(ValueError, match="do not fit"):
        linear_token_logprobs(hidden, weight, labels, bias=bias[1:])
    with pytest.raises(ValueError, match="chunk_tokens=0"):
        linear_token_logprobs(hidden, weight, labels, chunk_tokens=0)
    with pytest.raises(ValueError, match="do not match logits"):
        token_logprobs(F.linear(hidden, weight)[:, 1:], labels)
