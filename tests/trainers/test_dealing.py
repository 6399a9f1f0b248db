"""Batches dealt to processes: together they have what one process has, in its order, whoever reads them."""

from pathlib import Path

import pytest

from kd.data.blocks import PackedBlocks
from kd.data.loaders import train_loader
from kd.trainers import dealing
from kd.trainers.dealing import deal


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("position", [0, 4, 10])
def test_two_processes_are_dealt_what_one_would_read(
    store: Path, monkeypatch: pytest.MonkeyPatch, position: int, num_workers: int
) -> None:
    loader = train_loader(PackedBlocks(store, "train"), 2, seed=3, num_workers=num_workers)
    expected = [dealt.batch["block_id"].tolist() for dealt in deal(loader, 1, position)]
    assert len(expected) == 11 - position
    shares = []
    monkeypatch.setattr(dealing, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(dealing, "get_rank", lambda rank=rank: rank)
        shares.append([(dealt.batch["block_id"].tolist(), dealt.counts) for dealt in deal(loader, 1, position)])
    first, second = shares
    assert len(first) == len(second) == (len(expected) + 1) // 2
    taken = [ids for pair in zip(first, second, strict=True) for ids, counts in pair if counts]
    assert taken == expected
    assert second[-1] == (expected[-1], len(expected) % 2 == 0)
