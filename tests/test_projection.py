"""The product of a tile is the same from either library."""

import pytest
import torch

from kd.projection import IMAGES, project


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [1, 7, 64])
@pytest.mark.parametrize("tokens", [1, 5, 32])
@pytest.mark.parametrize("entries", [1, IMAGES - 1, IMAGES, IMAGES * 5, IMAGES * 5 + 1])
def test_equals_the_product_in_float64(threads: int, width: int, tokens: int, entries: int) -> None:
    generator = torch.Generator().manual_seed(entries)
    weight = torch.randn(entries + 3, width, generator=generator)[3:]
    hidden = torch.randn(tokens + 2, width, generator=generator)[2:]
    out = torch.full((entries, tokens), float("nan"))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    project(weight, hidden, out)
    torch.set_num_threads(before)
    torch.testing.assert_close(out.double(), weight.double() @ hidden.double().T, rtol=0, atol=1e-6 * width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_weight_that_lies_in_columns(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-4, 5, (8, IMAGES * 2), generator=generator).to(dtype).T
    hidden = torch.randint(-4, 5, (3, 8), generator=generator).to(dtype)
    out = torch.empty(IMAGES * 2, 3, dtype=dtype)
    project(weight, hidden, out)
    assert torch.equal(out, weight @ hidden.T)


def test_infinite_and_missing_values_stay_in_their_rows() -> None:
    weight = torch.ones(IMAGES * 2, 4)
    weight[3, 1], weight[IMAGES, 0] = float("inf"), float("nan")
    out = torch.empty(IMAGES * 2, 2)
    project(weight, torch.ones(2, 4), out)
    assert torch.equal(torch.isfinite(out).all(dim=1).logical_not().nonzero().flatten(), torch.tensor([3, IMAGES]))
    assert out[3, 0] == float("inf")
