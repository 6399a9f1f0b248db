"""Which process takes which batch: as cards are dealt, in the order that one process alone would have.

So W processes with A micro-batches each to an optimizer step see in each step what one process sees that accumulates
A * W, and a position in that order means the same to both.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import NamedTuple

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from kd.data import PositionedLoader
from kd.distributed import gather_objects, get_rank, get_world_size
from kd.errors import DataError

Batch = dict[str, Tensor]


class Dealt(NamedTuple):
    """A batch for this process."""

    batch: Batch
    counts: bool
    """False where nothing is left for this process. The batch is the order's last one then, so that this process can
    take part in what all do together; it weighs nothing."""


def num_batches(loader: Iterable[Batch]) -> int:
    """Return the batches of an epoch, of all processes together.

    Raises:
        ValueError: if the loader has no length.
    """
    if not isinstance(loader, Sized):
        raise ValueError(f"the train_loader ({type(loader).__name__}) has no length; give one with __len__")
    return len(loader) * (get_world_size() if _deals_itself(loader) else 1)


def check_dealing(train_loader: Iterable[Batch] | None, val_loader: Iterable[Batch] | None) -> None:
    """Check that loaders can be dealt to several processes, and are the same in all of them.

    Raises:
        ValueError: if a loader's order may differ from process to process, or gives all of them the same.
        DataError: if the processes have different numbers of batches.
    """
    for name, loader in (("train_loader", train_loader), ("val_loader", val_loader)):
        if loader is None:
            continue
        deals_itself = _deals_itself(loader)
        if not (_has_one_order(loader) or (deals_itself and name == "train_loader")):
            raise ValueError(_cannot_deal(name, loader))
        lengths = gather_objects(num_batches(loader))
        if len(set(lengths)) > 1:
            raise DataError(
                f"The processes have different numbers of batches in their {name}, by rank: "
                f"{', '.join(map(str, lengths))}. Give all of them the same loader; it is dealt to them."
            )


def _cannot_deal(name: str, loader: Iterable[Batch]) -> str:
    ways = "a loader of kd.data, a list of batches, or a DataLoader without shuffling"
    own = f" or with DistributedSampler(dataset, {get_world_size()}, rank)" if name == "train_loader" else ""
    return (
        f"The {name} ({type(loader).__name__}) cannot be dealt to {get_world_size()} processes: they might all read "
        f"the same batches, or some never. Give each of them {ways}{own}."
    )


def _has_one_order(loader: Iterable[Batch]) -> bool:
    """Return whether a loader gives the same batches in the same order in every process."""
    if isinstance(loader, PositionedLoader | Sequence):
        return True
    if not isinstance(loader, DataLoader):
        return False
    return isinstance(loader.sampler, SequentialSampler) and type(loader.batch_sampler) in (BatchSampler, type(None))


def _deals_itself(loader: Iterable[Batch]) -> bool:
    """Return whether a loader gives each of several processes its own batches."""
    if get_world_size() == 1 or not isinstance(loader, DataLoader):
        return False
    sampler = loader.sampler
    if not isinstance(sampler, DistributedSampler):
        return False
    return (sampler.num_replicas, sampler.rank) == (get_world_size(), get_rank())


def deal(loader: Iterable[Batch], epoch: int = 0, position: int = 0) -> Iterator[Dealt]:
    """Yield this process's batches of an epoch, as many as every other process gets.

    Args:
        loader: Of all processes alike, unless it deals itself.
        epoch: From 0 on; chooses the order.
        position: Batches of the epoch that all processes together have had.
    """
    num_ranks = get_world_size()
    if num_ranks == 1:
        batches = _from(loader, epoch, position)
    elif _deals_itself(loader):
        assert isinstance(loader, DataLoader)
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        batches = itertools.islice(loader, position // num_ranks, None)
    else:
        return _share(loader, epoch, position)
    return (Dealt(batch, True) for batch in batches)


def position_after(loader: Iterable[Batch], position: int, taken: int) -> int:
    """Return the position in an epoch after every process has taken so many of what `deal` gives."""
    if get_world_size() == 1:  # where a loader may give more than its length says
        return position + taken
    return min(position + taken * get_world_size(), num_batches(loader))


def _from(loader: Iterable[Batch], epoch: int, position: int) -> Iterator[Batch]:
    if isinstance(loader, PositionedLoader):
        loader.set_position(epoch, position)
        return iter(loader)
    return itertools.islice(loader, position, None)


def _share(loader: Iterable[Batch], epoch: int, position: int) -> Iterator[Dealt]:
    """Yield every W-th batch, from this process's first on."""
    last = num_batches(loader) - 1
    numbers = [number + get_rank() for number in range(position, last + 1, get_world_size())]
    existing = [min(number, last) for number in numbers]
    batches: Iterable[Batch]
    if isinstance(loader, PositionedLoader):
        loader.choose(epoch, existing)
        batches = loader
    elif isinstance(loader, Sequence):
        batches = (loader[number] for number in existing)
    else:
        wanted = set(existing)
        batches = (batch for number, batch in enumerate(loader) if number in wanted)
    for number, batch in zip(numbers, batches, strict=True):
        yield Dealt(batch, number <= last)
