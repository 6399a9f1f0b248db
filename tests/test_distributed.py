"""One process without a group, and two with one."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from kd.distributed import get_rank, get_world_size, is_distributed, reduce_tensor, seed_everything

WORLD_SIZE = 2


def reduce_in_group(rank: int, folder: str) -> None:
    """Join a group of two and save what this process sees; runs in a process of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE)
    x = torch.tensor([1.0, 10.0]) * (rank + 1)
    seen = {
        "place": torch.tensor([is_distributed(), get_rank(), get_world_size()]),
        "mean": reduce_tensor(x),
        "sum": reduce_tensor(x, op="sum"),
        "count": reduce_tensor(torch.tensor(rank + 3), op="sum"),
        "untouched": x,
    }
    torch.save(seen, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_reduce_together(tmp_path: Path) -> None:
    spawn(reduce_in_group, args=(str(tmp_path),), nprocs=WORLD_SIZE)  # type: ignore[no-untyped-call]
    for rank in range(WORLD_SIZE):
        seen = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert seen["place"].tolist() == [1, rank, WORLD_SIZE]
        assert seen["mean"].tolist() == [1.5, 15.0]
        assert seen["sum"].tolist() == [3.0, 30.0]
        assert seen["count"].tolist() == 7
        assert seen["untouched"].tolist() == [1.0 * (rank + 1), 10.0 * (rank + 1)]


def test_one_process_needs_no_group() -> None:
    x = torch.randn(3)
    assert (is_distributed(), get_rank(), get_world_size()) == (False, 0, 1)
    assert torch.equal(reduce_tensor(x), x)
    assert torch.equal(reduce_tensor(x, op="sum"), x)


def test_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match=r"op=max.*mean or sum"):
        reduce_tensor(torch.zeros(1), op="max")


def test_a_seed_fixes_all_random_numbers() -> None:
    def draw(seed: int) -> tuple[float, float, float]:
        seed_everything(seed)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw(5) == draw(5)
    assert all(one != other for one, other in zip(draw(5), draw(6), strict=True))
