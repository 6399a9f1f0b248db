"""Large tensors on the CPU in pages of 2 MiB, where Linux has them: a page of 4 KiB costs a fault at its first touch.

Torch can do so for all its tensors (the environment variable THP_MEM_ALLOC_ENABLE); here it is asked for where memory
is taken anew at every step.
"""

import math
import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

LARGE_BYTES = 2**25
"""From here on it pays; what is smaller, malloc mostly has from before."""


def new_empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor of a shape and dtype, contiguous, on the device of another one.

    Raises:
        MemoryError: if there is too little memory.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if like.device.type != "cpu" or sys.platform != "linux" or size < LARGE_BYTES:
        return like.new_empty(shape, dtype=dtype)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size} bytes for a tensor of {tuple(shape)}: {error}") from error
    with suppress(OSError):  # a kernel without them; then these are pages like any others
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)  # holds the memory as long as it lives
