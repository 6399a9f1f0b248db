"""The product of a tile of a head's weight and hidden states, by whichever of torch's libraries is fastest at it."""

import platform

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGES = 16
"""So many images are a convolution that torch gives to oneDNN for any number of threads."""
LEAST_WIDTH = 512
"""Below it, less is gained than it costs to copy the result: a convolution cannot be told where to put it."""


def project(weight: Tensor, hidden: Tensor, out: Tensor) -> None:
    """Write `weight @ hidden.T`, (K, C).

    Torch multiplies float32 matrices on a CPU by MKL, which on AMD's Zen 4 takes 1.1 to 1.4 times as long as
    oneDNN; that one has torch's convolutions. A convolution with a kernel of 1 x 1 is a matrix product: the rows of the
    weight are the pixels, in images of one line each, and the hidden states of the tokens are the kernels.

    Args:
        weight: (K, H).
        hidden: (C, H), of the same dtype.
        out: (K, C), of the same dtype, contiguous.
    """
    if not _is_faster_as_convolution(weight):
        torch.mm(weight, hidden.T, out=out)
        return
    images = weight.reshape(IMAGES, 1, -1, weight.size(1)).permute(0, 3, 1, 2)  # channels last, as they lie in memory
    pixels = F.conv2d(images, hidden[:, :, None, None]).permute(0, 2, 3, 1)
    out.copy_(pixels.reshape(out.shape))


def _is_faster_as_convolution(weight: Tensor) -> bool:
    """Return whether this is oneDNN's case: whole images of enough float32 on an x86 processor."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and len(weight) % IMAGES == 0
        and weight.size(1) >= LEAST_WIDTH
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )
