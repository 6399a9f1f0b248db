"""A job of a sweep that is several processes: its launcher starts as many tasks, and here they meet. No torch here.

All they share is the sweep's folder. The first task calls the others, who each start a child when it does; what ended
one child is noted for all, since the children cannot go on without it.
"""

import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from kd.errors import IntegrityError, KDError
from kd.files import read_json, write_json
from kd.stop import STOP_CODES
from kd.torchrun import OTHER_GONE

log = logging.getLogger("kd")

WAIT_SECONDS = 0.5
BEAT_SECONDS = 10.0
"""How often the first task shows that it lives."""
GONE_SECONDS = 300.0
"""So long after its last sign of life the first task counts as gone; a shared disk may show files a minute late."""
CAUSE_SECONDS = 5.0
"""How long to wait for the word of the process that ended first, where another one's end is all that is known."""
SIGNS_OF_OTHERS = (OTHER_GONE, "torch.distributed.Dist")
"""In the errors of processes that could not go on without another one."""
PORTS = (10_000, 32_768)
"""Where servers are found: from the end on, systems give ports to whoever connects somewhere."""


@dataclass(frozen=True)
class GroupSize:
    """How many processes a job is."""

    nodes: int = 1
    """Machines."""
    tasks_per_node: int = 1

    @property
    def num_processes(self) -> int:
        """Return the processes on all machines together."""
        return self.nodes * self.tasks_per_node


@dataclass(frozen=True)
class Member:
    """A task's place in its job."""

    rank: int
    """In [0, num_processes)."""
    local_rank: int
    """Among the tasks of the same machine, from 0 on."""
    node: int
    """Number of the machine."""
    life: str
    """Names the job and how often it was put back into the queue: what is left of an earlier life is not for it."""


def find_member(size: GroupSize) -> Member:
    """Return the place of the task of submitit's that this process is.

    Raises:
        KDError: if it is one of more or fewer tasks than were asked for.
    """
    import submitit  # here, because it comes with an extra

    job = submitit.JobEnvironment()
    if (job.num_nodes, job.num_tasks) != (size.nodes, size.num_processes):
        raise KDError(
            f"The job has {job.num_tasks} tasks on {job.num_nodes} machines, not the {size.num_processes} on "
            f"{size.nodes} of hydra.launcher.tasks_per_node={size.tasks_per_node} and hydra.launcher.nodes="
            f"{size.nodes}: set the number of tasks by these two alone."
        )
    life = f"{job.job_id}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    return Member(job.global_rank, job.local_rank, job.node, life)


@dataclass(frozen=True)
class Call:
    """The first task's word that all are to start a child."""

    attempt: int
    """Counts the calls from 1 on; 0: there was none yet."""
    address: str
    """Where the first child waits for the others."""
    port: int
    place: int | None
    """Of the job among the machine's places; see `kd.sweep_share`."""


@dataclass(frozen=True)
class End:
    """How a child ended."""

    rank: int
    code: int
    """Of its process; minus the signal's number if one killed it."""
    error: str
    """In a line."""

    @property
    def was_stopped(self) -> bool:
        """Return whether it was asked to end."""
        return self.code in STOP_CODES

    @property
    def explains_nothing(self) -> bool:
        """Return whether all that is known is that another process was gone."""
        return not self.was_stopped and any(sign in self.error for sign in SIGNS_OF_OTHERS)


@dataclass(frozen=True)
class Seat:
    """What a child needs to know of the others."""

    rank: int
    environment: dict[str, str]
    """As torchrun would set it."""
    is_lost: Callable[[], bool]
    """Whether the child cannot go on, because another one has ended."""
    poll_seconds: float
    """How often to ask."""


class Meeting:
    """Where the tasks of one job meet.

    Args:
        folder: Of the sweep.
        run: Name of the job's run.
        size: How many they are.
        member: This task.
    """

    def __init__(self, folder: Path, run: str, size: GroupSize, member: Member) -> None:
        self.size, self.member = size, member
        self._stem = folder / f"{run}-{member.life}"
        self._path = self._file("meeting")
        self._call = Call(0, "", 0, None)
        self._beat: int | None = None
        self._heard = time.monotonic()

    def _file(self, ending: str) -> Path:
        return self._stem.with_name(f"{self._stem.name}.{ending}")

    # --- the first task ------------------------------------------------------------------------------------------

    @contextmanager
    def held(self) -> Iterator[None]:
        """Have the others wait for calls while the block runs, and let them go when it ends."""
        for left in self._path.parent.glob(f"{self._stem.name}.*.end"):
            left.unlink()
        write_json(self._path, asdict(self._call))
        ended = threading.Event()
        beat = threading.Thread(target=self._show_life, args=(ended,), daemon=True)
        beat.start()
        requeued = False
        try:
            yield
        except SystemExit:
            requeued = True
            raise
        finally:
            ended.set()
            beat.join()
            if requeued:
                # Only SLURM counts lives: the next one must not take this one's end for its own.
                self._path.unlink()
            else:
                write_json(self._path, None)

    def _show_life(self, ended: threading.Event) -> None:
        while not ended.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(self._path)

    def call(self, place: int | None) -> Call:
        """Call all to start a child each, in a place of their machine; return the call."""
        address = "127.0.0.1" if self.size.nodes == 1 else socket.gethostname()
        self._call = Call(self._call.attempt + 1, address, free_port(), place)
        write_json(self._path, asdict(self._call))
        return self._call

    def cause(self, call: Call, own: End) -> End:
        """Return what ended the children of a call, given how the first task's ended."""
        self.note(call.attempt, own)
        until = time.monotonic() + CAUSE_SECONDS
        while (end := self.noted(call.attempt) or own).explains_nothing and time.monotonic() < until:
            time.sleep(WAIT_SECONDS)
        return end

    # --- the others ----------------------------------------------------------------------------------------------

    def next_call(self, after: int, give_up: Callable[[], bool]) -> Call | None:
        """Wait for a call with a higher number; None if there will be none, or waiting was given up."""
        while not give_up():
            call = self._hear()
            if call is None or call.attempt > after:
                return call
            time.sleep(WAIT_SECONDS)
        return None

    def _hear(self) -> Call | None:
        """Return the first task's last call, or None if it has ended."""
        with suppress(OSError, IntegrityError):  # it has not come yet; or a shared disk is late
            beat = self._path.stat().st_mtime_ns
            values = read_json(self._path)
            if values is None:
                return None
            self._call = Call(**values)
            if beat != self._beat:
                self._beat, self._heard = beat, time.monotonic()
        if time.monotonic() - self._heard > GONE_SECONDS:
            log.warning("The first task of this job has not shown life for %.0f s", GONE_SECONDS)
            return None
        return self._call

    # --- all -----------------------------------------------------------------------------------------------------

    def seat(self, call: Call) -> Seat:
        """Return what this task's child needs to know for a call."""
        member = self.member
        environment = {
            "RANK": str(member.rank),
            "LOCAL_RANK": str(member.local_rank),
            "WORLD_SIZE": str(self.size.num_processes),
            "LOCAL_WORLD_SIZE": str(self.size.tasks_per_node),
            "GROUP_RANK": str(member.node),
            "MASTER_ADDR": call.address,
            "MASTER_PORT": str(call.port),
        }
        return Seat(member.rank, environment, lambda: self._is_lost(call), WAIT_SECONDS)

    def _is_lost(self, call: Call) -> bool:
        if self.noted(call.attempt) is not None:
            return True
        return self.member.rank > 0 and self._hear() != call

    def note(self, attempt: int, end: End) -> None:
        """Tell all how a child of an attempt ended, unless they know a better reason."""
        known = self.noted(attempt)
        if known is None or (known.explains_nothing and not end.explains_nothing):
            write_json(self._file(f"{attempt}.end"), asdict(end))

    def noted(self, attempt: int) -> End | None:
        """Return what `note` told of an attempt."""
        try:
            return End(**read_json(self._file(f"{attempt}.end")))
        except IntegrityError:
            return None


def free_port() -> int:
    """Return a port of this machine on which nobody listens."""
    while True:
        port = random.randrange(*PORTS)
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("", port))
            return port
