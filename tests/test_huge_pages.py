"""Large tensors are tensors like any others."""

import gc

import pytest
import torch

from kd import huge_pages
from kd.huge_pages import new_empty
from kd.linear_distillation import linear_distillation_loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_large_one_keeps_what_is_written(dtype: torch.dtype) -> None:
    shape = (3, huge_pages.LARGE_BYTES // dtype.itemsize // 2)
    tensor = new_empty(torch.empty(0), shape, dtype)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    view = tensor.fill_(2)[1:, ::1000]
    del tensor
    gc.collect()
    new_empty(torch.empty(0), shape, dtype).fill_(3)  # would fall into the place of memory that was given back
    assert bool((view == 2).all())


def test_the_loss_is_the_same_from_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def result() -> tuple[float, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        hidden, weight, teacher, teacher_weight = (
            torch.randn(shape, generator=generator) for shape in ((20, 8), (50, 8), (20, 12), (50, 12))
        )
        labels = torch.arange(20)
        hidden.requires_grad_()
        weight.requires_grad_()
        loss, _ = linear_distillation_loss(hidden, weight, teacher, teacher_weight, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        assert hidden.grad is not None
        assert weight.grad is not None
        return float(loss.detach()), hidden.grad, weight.grad

    usual = result()
    monkeypatch.setattr(huge_pages, "LARGE_BYTES", 1)
    large = result()
    assert usual[0] == large[0]
    assert torch.equal(usual[1], large[1])
    assert torch.equal(usual[2], large[2])


def test_too_much_is_said_as_pythons_own_error() -> None:
    with pytest.raises(MemoryError, match="bytes for a tensor of"):
        new_empty(torch.empty(0), (2**50,), torch.float32)
