"""Several processes as one: who am I, and what do all of us have together. One process needs no group.

In the collectives of the group nobody waits for more than a minute: whoever is that late is gone. Where one process may
work alone for long, making a cache or saving a checkpoint, the others wait without a limit, but notice its end.
"""

import gc
import itertools
import json
import logging
import os
import random
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from kd.errors import ConfigError, ResourceError
from kd.torchrun import OTHER_GONE, Place, find_place, one_voice

log = logging.getLogger("kd")

COLLECTIVE_SECONDS = 60.0
"""How long a collective waits for the other processes."""
START_SECONDS = 300.0
"""How long processes wait for each other's start."""
NO_LIMIT = timedelta(days=365)
LONGEST_PAUSE = 0.2
"""Seconds between two looks whether the others are there."""
SIGNS_OF_LOSS = ("gloo", "nccl", "connection", "timed out", "broken pipe", "socket")
"""What is in the text of errors that torch raises where another process is gone."""

_alone: ContextVar[bool] = ContextVar("alone", default=False)
_patient: ContextVar[dist.ProcessGroup | None] = ContextVar("patient", default=None)
"""The group in which processes wait without a limit."""


def is_distributed() -> bool:
    """Return whether this process belongs to an initialised process group, and does not work `alone`."""
    return not _alone.get() and dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Return this process's rank; 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


@contextmanager
def alone() -> Iterator[None]:
    """Let this process train by itself while the block runs, whatever started it."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def require_group() -> None:
    """Check that a process which torchrun started beside others has joined them.

    Raises:
        ConfigError: if it has not. Each process would train a model of its own, and all would write the same files.
    """
    place = find_place()
    if place is not None and place.world_size > 1 and not dist.is_initialized() and not _alone.get():
        raise ConfigError(
            f"torchrun started {place.world_size} processes, and this one has not joined the others: put all that "
            "makes and uses the trainer into `with kd.distributed.process_group() as device:`."
        )


# --- the group ---------------------------------------------------------------------------------------------------


@contextmanager
def process_group(
    device: torch.device | str | None = None, *, timeout_seconds: float = COLLECTIVE_SECONDS
) -> Iterator[torch.device]:
    """Join the processes that torchrun started, until the block ends; without torchrun there are none to join.

    They talk through gloo on the CPU, and through NCCL about what is on a GPU.

    Args:
        device: Where this process trains; None: see `own_device`.
        timeout_seconds: How long a collective waits for the others, who may be slower or gone.

    Yields:
        The device.

    Raises:
        ConfigError: if torchrun's variables do not fit together, or there are too few GPUs.
        ResourceError: if another process is gone, or does not answer.
    """
    place = find_place()
    device = own_device() if device is None else torch.device(device)
    if place is None:
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with one_voice(), _losses_named():
        store = _store(place)
        wait_for_all()  # so that the group, which waits for a minute only, finds everybody ready
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("group", store),
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
        token = _patient.set(dist.new_group(timeout=NO_LIMIT, backend="gloo"))
        try:
            yield device
            dist.barrier()  # whoever holds the store leaves after all who may still look at it
        except BaseException as error:
            _release(error)
            raise
        finally:
            _patient.reset(token)
            dist.destroy_process_group()


def _release(error: BaseException) -> None:
    """Let go of the trainers that an error's frames still hold, and with them of the group.

    Only then do gloo's threads end. One that frees a tensor while Python ends aborts the process (with code -6 instead
    of its own).
    """
    traceback.clear_frames(error.__traceback__)
    gc.collect()


def own_device(name: str = "auto") -> torch.device:
    """Return where this process trains: `cuda:LOCAL_RANK`, or the CPU.

    Args:
        name: "auto" (a GPU where there are any), "cpu", "cuda", or "cuda:N" (without other processes).

    Raises:
        ConfigError: if there is no such GPU, or several processes would share one.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    place = find_place()
    index = torch.device("cuda" if name == "auto" else name).index
    if place is not None:
        if index is not None and place.world_size > 1:
            raise ConfigError(
                f"device={name} with {place.world_size} processes, which would share that GPU: set device=cuda."
            )
        index = place.local_rank if index is None else index
        if index >= count:
            raise ConfigError(
                f"LOCAL_RANK={place.local_rank}, but {count} CUDA devices are visible: start as many processes a "
                "machine (--nproc-per-node) as it has GPUs, or set device=cpu."
            )
    if (index or 0) >= count:
        raise ConfigError(f"device={name}, but {count} CUDA devices are visible: set device=cpu.")
    return torch.device("cuda", index) if index is not None else torch.device("cuda")


@contextmanager
def _losses_named() -> Iterator[None]:
    """Say in words that another process is gone."""
    try:
        yield
    except RuntimeError as error:  # torch has a class of its own for some of these only
        text = str(error).strip()
        if not isinstance(error, dist.DistError) and not any(sign in text.lower() for sign in SIGNS_OF_LOSS):
            raise
        raise ResourceError(
            f"{OTHER_GONE} ({text.splitlines()[0][:200]}). What it printed says why. The same command goes on from the "
            "last checkpoint."
        ) from error


# --- waiting without a limit ---------------------------------------------------------------------------------------

_turns = itertools.count()


@cache
def _store(place: Place) -> Store:
    """Return the store of torchrun's agent, or where there is none, one that the first process holds."""
    timeout = timedelta(seconds=START_SECONDS)
    (store, _, _) = next(iter(rendezvous("env://", place.rank, place.world_size, timeout=timeout)))
    return PrefixStore(f"kd/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _wait_until(is_so: Callable[[], bool]) -> None:
    # Not torch's own ways to wait: they would keep this process's signals waiting too.
    pause = 0.001
    while not is_so():
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def wait_for_all() -> None:
    """Wait until all processes are here, however long that takes. Nothing to wait for in one process.

    Raises:
        RuntimeError: if one of them has ended.
    """
    place, patient = find_place(), _patient.get()
    if _alone.get():
        return
    if patient is not None:
        work = dist.barrier(patient, async_op=True)
        assert work is not None
        _wait_until(work.is_completed)
        work.wait()
    elif is_distributed():  # a group that somebody else has opened
        dist.barrier()
    elif place is not None:
        store, key = _store(place), f"turn/{next(_turns)}"
        store.add(key, 1)
        _wait_until(lambda: store.add(key, 0) >= place.world_size)


def told_by_first(value: Any) -> Any:
    """Return the first process's `value` (of JSON) in all processes, which wait for it however long that takes."""
    place = find_place()
    if place is None:
        return value
    store, key = _store(place), f"turn/{next(_turns)}"
    if place.rank == 0:
        store.set(key, json.dumps(value))
        return value
    _wait_until(lambda: store.check([key]))
    return json.loads(store.get(key))


@contextmanager
def first_of_node_first() -> Iterator[None]:
    """Let the first process of each machine finish the block, which makes what the others then only open."""
    place = find_place()
    if place is None or place.world_size == 1:
        yield
        return
    store, key = _store(place), f"turn/{next(_turns)}/{place.node}"
    if place.local_rank > 0:
        _wait_until(lambda: store.check([key]))
    yield
    if place.local_rank == 0:
        store.set(key, "done")


# --- sums, and what else all have together -----------------------------------------------------------------------


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


def sum_of_all(number: int) -> int:
    """Return the sum of a number over all processes."""
    return int(reduce_tensor(torch.tensor(number), op="sum"))


def largest_of_all(number: int) -> int:
    """Return the largest of a number over all processes."""
    if not is_distributed():
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def gather_objects(value: Any) -> list[Any]:
    """Return every process's value, by rank. Without a process group: this one's."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def seed_everything(seed: int) -> None:
    """Seed the global random numbers of Python, numpy and torch (all devices).

    Args:
        seed: in [0, 2^32), which is numpy's range.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
