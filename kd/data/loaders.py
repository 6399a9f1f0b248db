"""Loaders of packed blocks whose order is a function of seed and epoch, so that any position can be returned to."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from kd.data.blocks import PackedBlocks
from kd.errors import DataError
from kd.stop import SIGNALS

if TYPE_CHECKING:
    from torch.utils.data.dataloader import _BaseDataLoaderIter

D = TypeVar("D", bound=Dataset[dict[str, Tensor]])
WORKER_SECONDS = 60
"""How long a worker process goes on after a SIGTERM, unless its parent ends it."""


class BatchOrder(Sampler[list[int]]):
    """The batches of one epoch as lists of indexes into a data set."""

    def __init__(self, num_blocks: int, batch_size: int, seed: int | None, unit: int = 1) -> None:
        """Set up the order.

        Args:
            num_blocks: Length of the data set.
            batch_size: Blocks per batch. Where it is no multiple of `unit`, a batch may end within a unit, with whose
                rest the next one begins.
            seed: Shuffles, and leaves out an incomplete last batch; None: in order, and keeps it.
            unit: So many blocks that lie next to each other in the data set are shuffled as one; those left over at its
                end are a smaller unit.
        """
        self.num_blocks = num_blocks
        self.batch_size = batch_size
        self.seed = seed
        self.unit = unit
        self.epoch = 0
        self.batches: Sequence[int] | None = None
        """Numbers of the batches that iterations yield which begin now; None: all."""

    def __len__(self) -> int:
        """Return the batches of a whole epoch."""
        if self.seed is None:
            return -(-self.num_blocks // self.batch_size)
        return self.num_blocks // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        # Changes nothing: with worker processes torch calls it twice for one iteration, and keeps the second.
        order, size = self._order(), self.batch_size
        numbers = range(len(self)) if self.batches is None else self.batches
        return (order[number * size : (number + 1) * size].tolist() for number in numbers)

    def _order(self) -> "np.ndarray[tuple[int], np.dtype[np.int_]]":
        if self.seed is None:
            return np.arange(self.num_blocks)
        # RandomState's stream is frozen for good: a run can be resumed under another version of numpy or torch.
        units = np.random.RandomState([self.seed, self.epoch]).permutation(-(-self.num_blocks // self.unit))
        order = (units[:, None] * self.unit + np.arange(self.unit)).ravel()
        return order[order < self.num_blocks]


class PositionedLoader(DataLoader[dict[str, Tensor]], Generic[D]):
    """A DataLoader that can begin anywhere; its batches are those of the data set's class, by lists of indexes.

    `len()` counts the batches of a whole epoch. `batch_size` is None, as torch has it where the sampler makes the
    batches.
    """

    dataset: D

    def __init__(self, dataset: D, order: BatchOrder, num_workers: int) -> None:
        self.order = order
        # A generator of its own: torch draws a seed per iteration, by default from the global one, and then
        # looking at data would change dropout.
        super().__init__(
            dataset,
            batch_size=None,
            sampler=order,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=_outlive_signals,
            generator=torch.Generator().manual_seed(0),
        )

    def __iter__(self) -> "_BaseDataLoaderIter":
        with _signals_held() if self.num_workers else nullcontext():
            iterator = super().__iter__()
        self.order.batches = None  # the choice was for this iteration, which has taken it in
        return iterator

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """Make the next iteration yield the batches of `epoch` from `batch` on; the one after it starts at 0.

        Raises:
            ValueError: if a number is negative, or `batch` is beyond the end of the epoch.
        """
        if epoch < 0 or not 0 <= batch <= len(self):
            raise ValueError(f"epoch {epoch}, batch {batch}: an epoch has {len(self)} batches.")
        self.choose(epoch, range(batch, len(self)))

    def choose(self, epoch: int, batches: Sequence[int]) -> None:
        """Make the next iteration yield these batches of `epoch`, by their numbers; the one after it yields all."""
        self.order.epoch = epoch
        self.order.batches = batches


class BlockLoader(PositionedLoader[PackedBlocks]):
    """A loader of packed blocks; made by `train_loader` and `eval_loader`.

    Batches are `{"input_ids": (B, L), "labels": (B, L), "block_id": (B,)}`, int64.
    """


def _as_it_is(batch: Any) -> Any:
    return batch


@contextmanager
def _signals_held() -> Iterator[None]:
    """Hold back signals while worker processes start: each takes them only when it has `_outlive_signals`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _outlive_signals(worker: int) -> None:  # noqa: ARG001 - torch's signature
    """Let a worker process wait for its parent's word when a signal asks all processes of a job to stop.

    A worker that ends by a signal is an error to torch, raised amid whatever the parent does; and then no checkpoint
    is saved. A parent that is gone torch's workers notice themselves.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_SECONDS))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def train_loader(dataset: PackedBlocks, batch_size: int, seed: int, num_workers: int = 0) -> BlockLoader:
    """Return a loader that shuffles by seed and epoch and leaves out an incomplete last batch.

    Args:
        dataset: The training blocks.
        batch_size: Blocks per batch.
        seed: In [0, 2^32).
        num_workers: Loading processes; 0: this one.

    Raises:
        DataError: if there are fewer blocks than one batch takes.
    """
    if len(dataset) < batch_size:
        raise DataError(
            f"There are {len(dataset)} training blocks, and one batch takes train.batch_size={batch_size}. Lower "
            "train.batch_size or data.seq_len, or give more text (data.sample_size, data.max_train_blocks)."
        )
    return BlockLoader(dataset, BatchOrder(len(dataset), batch_size, seed), num_workers)


def eval_loader(dataset: PackedBlocks, batch_size: int, num_workers: int = 0) -> BlockLoader:
    """Return a loader that yields every block once, in order; the last batch may be smaller."""
    return BlockLoader(dataset, BatchOrder(len(dataset), batch_size, None), num_workers)
