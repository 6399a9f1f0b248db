"""The products of a tile are the same from either library, and so is the loss."""

import pytest
import torch

import kd.head_products
from kd.head_products import IMAGES, LEAST_SUMMANDS, Sum, add_gradients, project
from kd.linear_distillation import linear_distillation_loss
from kd.tiles import Tiling

HAS_ONEDNN = kd.head_products._is_faster_as_convolution(torch.empty(IMAGES, 1), LEAST_SUMMANDS)


@pytest.fixture
def convolutions(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of all convolutions' results."""
    shapes: list[torch.Size] = []
    conv2d = torch.nn.functional.conv2d

    def noted(pictures: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        result = conv2d(pictures, kernels)
        shapes.append(result.shape)
        return result

    monkeypatch.setattr(kd.head_products.F, "conv2d", noted)
    return shapes


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [LEAST_SUMMANDS - 1, LEAST_SUMMANDS, LEAST_SUMMANDS + 3])
@pytest.mark.parametrize("tokens", [1, 5, 32])
@pytest.mark.parametrize("entries", [1, IMAGES - 1, IMAGES, IMAGES * 5, IMAGES * 5 + 1])
def test_equals_the_product_in_float64(
    threads: int, width: int, tokens: int, entries: int, convolutions: list[torch.Size]
) -> None:
    generator = torch.Generator().manual_seed(entries)
    weight = torch.randn(entries + 3, width, generator=generator)[3:]
    hidden = torch.randn(tokens + 2, width, generator=generator)[2:]
    out = torch.full((entries, tokens), float("nan"))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    project(weight, hidden, out)
    torch.set_num_threads(before)
    torch.testing.assert_close(out.double(), weight.double() @ hidden.double().T, rtol=0, atol=1e-4)
    if HAS_ONEDNN:
        assert bool(convolutions) == (width >= LEAST_SUMMANDS and entries % IMAGES == 0)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [1, 24, 160])
@pytest.mark.parametrize("tokens", [1, LEAST_SUMMANDS - 1, LEAST_SUMMANDS, LEAST_SUMMANDS + 3])
@pytest.mark.parametrize("entries", [1, IMAGES, IMAGES * 5, IMAGES * 5 + 1])
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_gradients_equal_the_products_in_float64(
    threads: int, width: int, tokens: int, entries: int, needed: tuple[bool, bool]
) -> None:
    generator = torch.Generator().manual_seed(entries)
    weight = torch.randn(entries + 3, width, generator=generator)[3:]
    hidden = torch.randn(tokens + 2, width, generator=generator)[2:]
    gradient = torch.randn(entries, tokens, generator=generator)
    products = (gradient.double() @ hidden.double(), gradient.double().T @ weight.double())
    nowhere = [torch.full(product.shape, float("nan")) for product in products]
    sums = [Sum(total, is_empty=True) if is_needed else None for total, is_needed in zip(nowhere, needed, strict=True)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    add_gradients(gradient, weight, hidden, *sums)
    add_gradients(
        gradient, weight, hidden, *(None if once is None else Sum(once.total, is_empty=False) for once in sums)
    )
    torch.set_num_threads(before)
    for product, total, is_needed in zip(products, nowhere, needed, strict=True):
        if is_needed:
            torch.testing.assert_close(total.double(), 2 * product, rtol=0, atol=4e-4)
        else:
            assert total.isnan().all()


@pytest.mark.skipif(not HAS_ONEDNN, reason="torch has no oneDNN here, or the processor is another one")
def test_gradients_are_the_same_bit_for_bit_each_time() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, hidden, gradient = (
        torch.randn(*shape, generator=generator) for shape in ((IMAGES * 64, 256), (256, 256), (IMAGES * 64, 256))
    )

    def sums() -> tuple[torch.Tensor, torch.Tensor]:
        by_weight, by_hidden = torch.empty_like(weight), torch.empty_like(hidden)
        add_gradients(gradient, weight, hidden, Sum(by_weight, is_empty=True), Sum(by_hidden, is_empty=True))
        return by_weight, by_hidden

    first = sums()
    for _ in range(20):
        assert all(map(torch.equal, first, sums()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_weight_that_lies_in_columns(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-2, 3, (LEAST_SUMMANDS, IMAGES * 2), generator=generator).to(dtype).T
    hidden = torch.zeros(3, LEAST_SUMMANDS, dtype=dtype)
    hidden[0, 5], hidden[1, 0], hidden[2, -1] = 1, 2, -1
    out = torch.empty(IMAGES * 2, 3, dtype=dtype)
    project(weight, hidden, out)
    assert torch.equal(out, weight @ hidden.T)


def test_infinite_and_missing_values_stay_in_their_rows() -> None:
    weight = torch.ones(IMAGES * 2, LEAST_SUMMANDS)
    weight[3, 1], weight[IMAGES, 0] = float("inf"), float("nan")
    out = torch.empty(IMAGES * 2, 2)
    project(weight, torch.ones(2, LEAST_SUMMANDS), out)
    assert torch.equal(torch.isfinite(out).all(dim=1).logical_not().nonzero().flatten(), torch.tensor([3, IMAGES]))
    assert out[3, 0] == float("inf")


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_the_loss_and_its_gradients_are_the_same(
    temperature: float, monkeypatch: pytest.MonkeyPatch, convolutions: list[torch.Size]
) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = LEAST_SUMMANDS * 2 + 37
    hidden, teacher_hidden = (
        torch.randn(tokens, width, generator=generator) for width in (LEAST_SUMMANDS, LEAST_SUMMANDS + 16)
    )
    weight, teacher_weight = (
        torch.randn(IMAGES * 11 + 5, width, generator=generator) * 0.1
        for width in (LEAST_SUMMANDS, LEAST_SUMMANDS + 16)
    )
    labels = torch.randint(len(weight), (tokens,), generator=generator)
    hidden.requires_grad_()
    weight.requires_grad_()

    def loss_and_gradients() -> list[torch.Tensor]:
        tiling = Tiling(tokens=LEAST_SUMMANDS + 16, vocabulary=IMAGES * 3)
        loss, _ = linear_distillation_loss(
            hidden, weight, teacher_hidden, teacher_weight, labels, 0.5, temperature, tiling=tiling
        )
        return [loss, *torch.autograd.grad(loss, (hidden, weight))]

    fast = loss_and_gradients()
    if HAS_ONEDNN:
        assert len(convolutions) == 3 * 3 * 2  # chunks, whole tiles, models
    monkeypatch.setattr(kd.head_products, "LEAST_SUMMANDS", 2**31)
    torch.testing.assert_close(fast, loss_and_gradients(), rtol=1e-5, atol=1e-7)
