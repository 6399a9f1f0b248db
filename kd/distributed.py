"""Several processes as one: who am I, and what do all of us have together. One process needs no group."""

import random

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Return whether this process belongs to an initialised process group."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Return this process's rank; 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def reduce_tensor(x: Tensor, op: str = "mean") -> Tensor:
    """Return the mean or sum of x over all processes, on each of them; x itself is not changed.

    Every process must call this with the same shape. Without a process group it returns x.

    Args:
        x: any shape, on the device that the group's backend communicates from.
        op: "mean" or "sum".

    Raises:
        ValueError: if op is neither.
    """
    if op not in ("mean", "sum"):
        raise ValueError(f"op={op} is unknown: use mean or sum.")
    if not is_distributed():
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / get_world_size() if op == "mean" else total


def seed_everything(seed: int) -> None:
    """Seed the global random numbers of Python, numpy and torch (all devices).

    Args:
        seed: in [0, 2^32), which is numpy's range.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
