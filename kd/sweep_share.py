"""Sharing one machine out among the parallel jobs of a sweep: places, CPU threads, GPUs. No torch here."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

POLL_SECONDS = 0.1
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Share:
    """What each job of a sweep may use."""

    places: int | None
    """Jobs at a time on one machine; None: a cluster sees to that."""
    threads: int | None
    """CPU threads of each process; None: as torch chooses."""
    gpus: tuple[str, ...]
    """CUDA devices that jobs take by turns, as many at a time as a job has processes ("0,1"); empty: leave it to each
    job, or to a cluster."""

    @contextmanager
    def place(self, folder: Path, give_up: Callable[[], bool]) -> Iterator[int | None]:
        """Wait for one of the places and hold it while the block runs.

        Args:
            folder: Where the places' lock files are; a killed job's place is free again.
            give_up: Asked while waiting.

        Yields:
            The number of the place; None where there are none, or if it was given up.
        """
        if self.places is None:
            yield None
            return
        while not give_up():
            for number in range(self.places):
                lock = FileLock(folder / f"place-{number}.lock")
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    continue
                try:
                    yield number
                finally:
                    lock.release()
                return
            time.sleep(POLL_SECONDS)
        yield None

    def environment(self, place: int | None, by_turns: bool) -> dict[str, str]:
        """Return the environment variables of the job in a place.

        Args:
            place: As `place` gave it.
            by_turns: Whether each of its processes takes a single GPU, whichever; else it sees all of them.
        """
        if not self.gpus:
            return {}
        # All are named, too: submitit hides them from jobs that it was not told of.
        if place is None or not by_turns:
            return {VISIBLE_DEVICES: ",".join(self.gpus)}
        return {VISIBLE_DEVICES: self.gpus[place % len(self.gpus)]}


def share_out(jobs: int, processes: int = 1) -> Share:
    """Return what each of several parallel jobs, of so many processes each, on this machine may use."""
    together = jobs * processes
    threads = None if together == 1 else max(1, num_cores() // together)
    return Share(jobs, threads, _turns(visible_gpus(), processes))


def _turns(gpus: tuple[str, ...], processes: int) -> tuple[str, ...]:
    """Return the GPUs that a job takes at each turn: one a process, or all, which it refuses, where there are fewer."""
    whole = max(1, len(gpus) // processes)
    turns = (gpus[number * processes : (number + 1) * processes] for number in range(whole))
    return tuple(",".join(turn) for turn in turns if turn)


def num_cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def visible_gpus() -> tuple[str, ...]:
    """Return the CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if VISIBLE_DEVICES in os.environ:
        return tuple(name for name in os.environ[VISIBLE_DEVICES].split(",") if name.strip() not in ("", "-1"))
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    answer = subprocess.run([program, "--list-gpus"], capture_output=True, text=True, check=False)
    lines = answer.stdout.splitlines() if answer.returncode == 0 else []
    return tuple(str(number) for number in range(sum(line.startswith("GPU ") for line in lines)))
