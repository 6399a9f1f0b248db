"""Loaders: the order of blocks, returning to a position, and leaving the global generator alone."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kd.data import BlockLoader, PackedBlocks, build_blocks, eval_loader, train_loader
from kd.data.loaders import BatchOrder
from kd.errors import DataError

from .conftest import MakeCorpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def blocks(byte_tokenizer: "PreTrainedTokenizerFast", make_corpus: MakeCorpus) -> PackedBlocks:
    corpus = make_corpus({"train": [f"document {i} " * 5 for i in range(20)]})
    store: Path = build_blocks(corpus, byte_tokenizer, "bytes", 16)
    return PackedBlocks(store, "train", max_blocks=50)


def _ids(loader: BlockLoader) -> list[list[int]]:
    return [batch["block_id"].tolist() for batch in loader]


WORKERS = pytest.mark.parametrize("num_workers", [0, 2])


def _epoch(blocks: PackedBlocks, seed: int, epoch: int) -> list[list[int]]:
    loader = train_loader(blocks, 8, seed)
    loader.set_position(epoch)
    return _ids(loader)


def test_an_epoch_is_a_shuffle_without_repetition(blocks: PackedBlocks) -> None:
    batches = _epoch(blocks, 0, 0)
    flat = [block for batch in batches for block in batch]
    assert [len(batch) for batch in batches] == [8] * 6
    assert len(train_loader(blocks, 8, 0)) == 6
    assert len(set(flat)) == 48
    assert set(flat) <= set(blocks.block_ids.tolist())
    assert flat != sorted(flat)


def test_the_order_depends_on_seed_and_epoch_alone(blocks: PackedBlocks) -> None:
    torch.manual_seed(1)
    first = _epoch(blocks, 3, 2)
    torch.manual_seed(2)
    assert _epoch(blocks, 3, 2) == first
    orders = [_epoch(blocks, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


@WORKERS
def test_a_position_gives_the_remaining_batches_and_is_then_forgotten(num_workers: int, blocks: PackedBlocks) -> None:
    whole = _epoch(blocks, 0, 1)
    loader = train_loader(blocks, 8, 0, num_workers)
    loader.set_position(1, 4)
    assert _ids(loader) == whole[4:]
    assert _ids(loader) == whole
    loader.set_position(1, 6)
    assert _ids(loader) == []


@WORKERS
def test_chosen_batches_come_in_the_order_of_their_choice(num_workers: int, blocks: PackedBlocks) -> None:
    whole = _epoch(blocks, 0, 1)
    loader = train_loader(blocks, 8, 0, num_workers)
    loader.choose(1, [1, 3, 5, 5])
    assert _ids(loader) == [whole[number] for number in (1, 3, 5, 5)]
    assert _ids(loader) == whole


@WORKERS
def test_iterators_alive_at_once_know_nothing_of_each_other(num_workers: int, blocks: PackedBlocks) -> None:
    """A training that pauses for an evaluation, an epoch that was left in its midst: each keeps what it began with."""
    loader = train_loader(blocks, 8, 0, num_workers)
    loader.set_position(1, 2)
    first = iter(loader)
    assert next(first)["block_id"].tolist() == _epoch(blocks, 0, 1)[2]
    loader.set_position(2, 3)
    second = iter(loader)
    third = iter(loader)
    assert [batch["block_id"].tolist() for batch in second] == _epoch(blocks, 0, 2)[3:]
    assert [batch["block_id"].tolist() for batch in first] == _epoch(blocks, 0, 1)[3:]
    assert [batch["block_id"].tolist() for batch in third] == _epoch(blocks, 0, 2)


def test_batches_carry_blocks(blocks: PackedBlocks) -> None:
    batch: dict[str, Tensor] = next(iter(train_loader(blocks, 8, 0)))
    position = {block: index for index, block in enumerate(blocks.block_ids.tolist())}
    expected = blocks[[position[block] for block in batch["block_id"].tolist()]]
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert batch["labels"].shape == (8, 16)


def test_evaluation_takes_every_block_in_order(blocks: PackedBlocks) -> None:
    loader = eval_loader(blocks, 8)
    batches = _ids(loader)
    assert [len(batch) for batch in batches] == [8] * 6 + [2]
    assert len(loader) == 7
    assert [block for batch in batches for block in batch] == blocks.block_ids.tolist()


@WORKERS
def test_iterating_leaves_the_global_generator_alone(num_workers: int, blocks: PackedBlocks) -> None:
    before = torch.get_rng_state()
    trained, evaluated = train_loader(blocks, 8, 0, num_workers), eval_loader(blocks, 8, num_workers)
    assert _ids(trained) == _epoch(blocks, 0, 0)
    assert len(_ids(evaluated)) == 7
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("have_begun", [True, False])
def test_a_signal_to_all_processes_leaves_those_that_load_at_work(have_begun: bool, blocks: PackedBlocks) -> None:
    loader = train_loader(blocks, 8, 0, num_workers=2)
    begin = loader.worker_init_fn
    assert begin is not None
    loader.worker_init_fn = lambda worker: (time.sleep(0 if have_begun else 0.3), begin(worker))[0]
    iterator = iter(loader)
    ids = [next(iterator)["block_id"].tolist()] if have_begun else []
    for worker in multiprocessing.active_children():
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(worker.pid or 0, number)
    assert ids + [batch["block_id"].tolist() for batch in iterator] == _epoch(blocks, 0, 0)


def test_less_than_one_batch_is_refused(blocks: PackedBlocks) -> None:
    with pytest.raises(DataError, match=r"50 training blocks.*train\.batch_size=51"):
        train_loader(blocks, 51, 0)


@pytest.mark.parametrize(("epoch", "batch"), [(-1, 0), (0, -1), (0, 7)])
def test_an_impossible_position_is_refused(epoch: int, batch: int, blocks: PackedBlocks) -> None:
    with pytest.raises(ValueError, match="6 batches"):
        train_loader(blocks, 8, 0).set_position(epoch, batch)


# --- units -------------------------------------------------------------------------------------------------------


@given(length=st.integers(1, 40), unit=st.integers(1, 6), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 3))
def test_units_are_shuffled_whole(length: int, unit: int, seed: int, epoch: int) -> None:
    order = BatchOrder(length, length, seed, unit)
    order.epoch = epoch
    (batch,) = order
    units = [list(range(start, min(start + unit, length))) for start in range(0, length, unit)]
    assert sorted(batch) == list(range(length))
    places = [batch.index(members[0]) for members in units]
    assert all(batch[place : place + len(members)] == members for place, members in zip(places, units, strict=True))


@given(length=st.integers(1, 40), batch_size=st.integers(1, 8), seed=st.integers(0, 2**32 - 1))
def test_units_of_one_leave_the_order_as_it_is(length: int, batch_size: int, seed: int) -> None:
    expected = np.random.RandomState([seed, 0]).permutation(length).tolist()
    batches = list(BatchOrder(length, batch_size, seed))
    assert batches == [expected[i * batch_size : (i + 1) * batch_size] for i in range(length // batch_size)]


def test_units_are_in_one_batch_and_in_another_order_each_epoch() -> None:
    order = BatchOrder(60, 6, 0, unit=3)
    epochs = []
    for epoch in range(3):
        order.epoch = epoch
        epochs.append(list(order))
        assert all(len({item // 3 for item in batch}) == 2 for batch in epochs[-1])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_position_among_units_gives_the_remaining_batches() -> None:
    for batch_size in (4, 5):
        whole = list(BatchOrder(22, batch_size, 7, unit=2))
        for first in range(len(whole) + 1):
            order = BatchOrder(22, batch_size, 7, unit=2)
            order.batches = range(first, len(order))
            assert list(order) == whole[first:]
