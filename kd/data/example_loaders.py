"""Loaders of encoded examples; their order is a function of seed and epoch, as that of packed blocks is."""

import logging
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kd.data.encoding import EncodedExamples
from kd.data.loaders import BatchOrder, PositionedLoader
from kd.errors import DataError

log = logging.getLogger("kd")

D = TypeVar("D", bound=EncodedExamples)
Positions = npt.NDArray[np.int_]


WINDOW = 50
"""Batches among whose examples those of similar length are put together."""


class _ExampleOrder(BatchOrder):
    """The batches of an epoch over some examples of a data set, each batch of similar lengths if those are given."""

    def __init__(self, positions: Positions, batch_size: int, seed: int, unit: int, lengths: Positions | None) -> None:
        super().__init__(len(positions), batch_size, seed, unit)
        self._positions = positions
        self._lengths = lengths

    def _order(self) -> Positions:
        order = self._positions[super()._order()]
        return order if self._lengths is None else self._by_length(order, self._lengths)

    def _by_length(self, order: Positions, lengths: Positions) -> Positions:
        """Sort within windows of batches, unit by unit, and shuffle the batches: the epoch's short ones are spread."""
        size = self.batch_size
        whole = order[: len(self) * size]
        windows = [whole[start : start + WINDOW * size] for start in range(0, len(whole), WINDOW * size)]
        batches = np.concatenate([self._sorted(window, lengths) for window in windows]).reshape(-1, size)
        assert self.seed is not None
        return batches[np.random.RandomState([self.seed, self.epoch, 1]).permutation(len(batches))].ravel()

    def _sorted(self, window: Positions, lengths: Positions) -> Positions:
        units = window.reshape(-1, self.unit)
        longest = np.max(lengths[units], axis=1)
        return units[np.argsort(longest, kind="stable")].ravel()


def example_train_loader(
    dataset: D, batch_size: int, seed: int, num_workers: int = 0, *, unit: int = 1, by_length: bool = False
) -> PositionedLoader[D]:
    """Return a loader that shuffles by seed and epoch and leaves out an incomplete last batch.

    Args:
        dataset: The training examples.
        batch_size: Examples per batch.
        seed: In [0, 2^32).
        num_workers: Loading processes; 0: this one.
        unit: So many examples belong together and are shuffled as one: those with the ids 0 to unit - 1, the next ones,
            and so on. They are in one batch if `batch_size` is a multiple of `unit`, else at least in successive ones.
            Where one was left out when they were encoded, the others of its unit are not trained on either.
        by_length: Put examples of similar length into one batch, so that little of it is padding; only if `batch_size`
            is a multiple of `unit`, else it has no effect.

    Raises:
        DataError: if there are fewer examples than one batch takes.
    """
    positions = _whole_units(dataset.example_ids, unit)
    outcome = dataset.outcome.describe()
    if len(positions) < len(dataset):
        alone = f"{len(dataset) - len(positions)} of these are not trained on, as what belongs to them was left out"
        outcome += f"; {alone}"
        log.info("Train: %s", alone)
    if len(positions) < batch_size:
        raise DataError(
            f"There are {len(positions)} training examples ({outcome}), and one batch takes "
            f"train.batch_size={batch_size}. Lower train.batch_size, or give more examples."
        )
    lengths = dataset.lengths if by_length and batch_size % unit == 0 else None
    return PositionedLoader(dataset, _ExampleOrder(positions, batch_size, seed, unit, lengths), num_workers)


def _whole_units(example_ids: Positions, unit: int) -> Positions:
    """Return the positions of the examples of whose unit none is missing."""
    _, units, sizes = np.unique(example_ids // unit, return_inverse=True, return_counts=True)
    return np.flatnonzero(sizes[units] == unit)


def example_eval_loader(dataset: D, batch_size: int, num_workers: int = 0) -> PositionedLoader[D]:
    """Return a loader that yields every example once, in order; the last batch may be smaller."""
    return PositionedLoader(dataset, BatchOrder(len(dataset), batch_size, None), num_workers)
