"""Loaders of encoded examples; their order is a function of seed and epoch, as that of packed blocks is."""

from typing import TypeVar

from kd.data.encoding import EncodedExamples
from kd.data.loaders import BatchOrder, PositionedLoader
from kd.errors import DataError

D = TypeVar("D", bound=EncodedExamples)


def example_train_loader(dataset: D, batch_size: int, seed: int, num_workers: int = 0) -> PositionedLoader[D]:
    """Return a loader that shuffles by seed and epoch and leaves out an incomplete last batch.

    Args:
        dataset: The training examples.
        batch_size: Examples per batch.
        seed: In [0, 2^32).
        num_workers: Loading processes; 0: this one.

    Raises:
        DataError: if there are fewer examples than one batch takes.
    """
    if len(dataset) < batch_size:
        raise DataError(
            f"There are {len(dataset)} training examples ({dataset.outcome.describe()}), and one batch takes "
            f"train.batch_size={batch_size}. Lower train.batch_size, or give more examples."
        )
    return PositionedLoader(dataset, BatchOrder(len(dataset), batch_size, seed), num_workers)


def example_eval_loader(dataset: D, batch_size: int, num_workers: int = 0) -> PositionedLoader[D]:
    """Return a loader that yields every example once, in order; the last batch may be smaller."""
    return PositionedLoader(dataset, BatchOrder(len(dataset), batch_size, None), num_workers)
