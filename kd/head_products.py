"""The products of a tile of a head's weight, by whichever of torch's libraries is fastest at them on a CPU.

Torch multiplies float32 matrices by MKL, which on AMD's processors makes no use of AVX-512. oneDNN does, and has
torch's convolutions. A convolution with a kernel of 1 x 1 is a matrix product: the rows of the weight are the
pixels, in images of one line each, and the hidden states of the tokens are the kernels; its two gradients are the
products of the backward pass. On Zen 5 that takes half of MKL's time, on Zen 4 0.7 to 1.0 of it.

Shape letters: K vocabulary entries of a tile, C tokens of a chunk, H width of a model.
"""

import platform
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGES = 16
"""So many images are a convolution that torch gives to oneDNN for any number of threads."""
LEAST_SUMMANDS = 128
"""Of an entry of a result. Below it, less is gained than it costs to move the result: a convolution cannot be told
where to put it, nor what to add it to."""


@dataclass(frozen=True)
class Sum:
    """A place where products are summed up, of the dtype of the sum."""

    total: Tensor
    is_empty: bool
    """Whether its memory holds nothing yet, and is overwritten."""

    def add(self, summand: Tensor) -> None:
        """Add a tensor, of any dtype."""
        if self.is_empty:
            self.total.copy_(summand)
        else:
            self.total.add_(summand)

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Add `left @ right`; in one go, if that has the dtype of the sum."""
        if self.total.dtype == left.dtype:
            self.total.addmm_(left, right, beta=0 if self.is_empty else 1)
        else:
            self.add(left @ right)


def project(weight: Tensor, hidden: Tensor, out: Tensor) -> None:
    """Write the logits `weight @ hidden.T`.

    Args:
        weight: (K, H).
        hidden: (C, H), of the same dtype.
        out: (K, C), of the same dtype, contiguous.
    """
    if _is_faster_as_convolution(weight, summands=weight.size(1)):
        out.copy_(_rows(F.conv2d(_images(weight), _kernels(hidden))))
    else:
        torch.mm(weight, hidden.T, out=out)


def add_gradients(
    gradient: Tensor, weight: Tensor, hidden: Tensor, by_weight: Sum | None, by_hidden: Sum | None
) -> None:
    """Add the gradients by weight and hidden states, `gradient @ hidden` and `gradient.T @ weight`.

    Args:
        gradient: (K, C) by the logits, contiguous.
        weight: (K, H), of the same dtype.
        hidden: (C, H), of the same dtype.
        by_weight: Gets the gradient by the weight, (K, H); None: that is not needed.
        by_hidden: Gets the gradient by the hidden states, (C, H); None: that is not needed.
    """
    if not _is_faster_as_convolution(weight, summands=len(hidden)):
        if by_weight is not None:
            by_weight.add_product(gradient, hidden)
        if by_hidden is not None:
            by_hidden.add_product(gradient.T, weight)
        return
    needed = [by_weight is not None, by_hidden is not None, False]
    images, kernels, _ = torch.ops.aten.convolution_backward(
        _images(gradient), _images(weight), _kernels(hidden), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, needed
    )
    if by_weight is not None:
        by_weight.add(_rows(images))
    if by_hidden is not None:
        by_hidden.add(kernels[:, :, 0, 0])


def _images(rows: Tensor) -> Tensor:
    """Return rows (K, channels) as images of one line each, channels last, as they lie in memory."""
    return rows.reshape(IMAGES, 1, -1, rows.size(1)).permute(0, 3, 1, 2)


def _rows(images: Tensor) -> Tensor:
    """Return such images as rows again."""
    return images.permute(0, 2, 3, 1).reshape(-1, images.size(1))


def _kernels(hidden: Tensor) -> Tensor:
    return hidden[:, :, None, None]


def _is_faster_as_convolution(weight: Tensor, summands: int) -> bool:
    """Return whether this is oneDNN's case: whole images of enough float32 on an x86 processor."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and len(weight) % IMAGES == 0
        and summands >= LEAST_SUMMANDS
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )
