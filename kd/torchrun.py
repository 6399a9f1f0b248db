"""This process's place among those that torchrun started, from its environment; no torch here."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kd.errors import ConfigError

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
MEETING = ("MASTER_ADDR", "MASTER_PORT")
WAY_OUT = (
    "Start the processes with torchrun, which sets all of "
    f"{', '.join((*PLACE, *MEETING))}; or, for one process, unset {' '.join(PLACE)}"
)
LARGEST_PORT = 65535
OTHER_GONE = "Another process of this run has ended or does not answer"
"""How the error of a process begins that cannot go on without another one."""


@dataclass(frozen=True)
class Place:
    """One of several processes that work on the same run."""

    rank: int
    """In [0, world_size)."""
    local_rank: int
    """Among the processes of the same machine, from 0 on."""
    world_size: int
    """All processes, on all machines."""
    node: str
    """Number of the machine."""


def find_place() -> Place | None:
    """Return this process's place, or None where torchrun has not started it.

    Raises:
        ConfigError: if only some of torchrun's variables are set, or their values do not fit together.
    """
    if not any(name in os.environ for name in PLACE):
        return None
    if missing := [name for name in (*PLACE, *MEETING) if not os.environ.get(name)]:
        given = next(name for name in PLACE if name in os.environ)
        raise ConfigError(f"{given}={os.environ[given]} is set, but {', '.join(missing)} is not. {WAY_OUT}.")
    rank, local_rank, world_size, port = (_number(name) for name in (*PLACE, "MASTER_PORT"))
    _require(world_size >= 1, "WORLD_SIZE", "there is at least one process")
    _require(0 <= rank < world_size, "RANK", f"it must be in [0, WORLD_SIZE), and WORLD_SIZE is {world_size}")
    here = _number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else world_size
    _require(0 <= local_rank < here, "LOCAL_RANK", f"it must be in [0, {here}), the processes of this machine")
    _require(0 < port <= LARGEST_PORT, "MASTER_PORT", f"it must be in [1, {LARGEST_PORT}]")
    return Place(rank, local_rank, world_size, os.environ.get("GROUP_RANK", "0"))


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise ConfigError(f"{name}={os.environ[name]!r} is not a whole number. {WAY_OUT}.") from None


def _require(condition: bool, name: str, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{name}={os.environ[name]} is not allowed: {allowed}. {WAY_OUT}.")


def num_processes() -> int:
    """Return how many processes work on the same run; 1 without torchrun."""
    place = find_place()
    return 1 if place is None else place.world_size


def is_first() -> bool:
    """Return whether this process is the one that speaks, writes and saves."""
    place = find_place()
    return place is None or place.rank == 0


@contextmanager
def one_voice() -> Iterator[None]:
    """Let only the first process log what is not an error, while the block runs."""
    logger = logging.getLogger("kd")
    before = logger.level
    if not is_first():
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
