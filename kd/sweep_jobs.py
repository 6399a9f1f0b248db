"""One run of a sweep in a process of its own, so that whatever happens to it costs only itself.

Every launcher calls `SweepTask` somewhere: in the sweep's process, in a worker, on another machine. It starts the
run as a child, watches it, and records a failure in the run's directory. Where the job is several processes it is
called in each: the first call does all that, the others start and watch a child of theirs when it does; see
`kd.sweep_group`.
"""

import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from kd.errors import IntegrityError, Interrupted, KDError, RunHeldError
from kd.outcome import headline, objective
from kd.runs import Failure, RunState, forget_failure, holder_of, read_result, run_state, write_failure
from kd.stop import signals_to
from kd.sweep_group import WAIT_SECONDS, End, GroupSize, Meeting, Seat, find_member
from kd.sweep_share import POLL_SECONDS, Share

log = logging.getLogger("kd")

CHILD = "kd.sweep_child"
PREFIX = re.compile(r"kd-train( \(rank \d+\))?: ")
"""How the command line begins a line that says what went wrong."""
LINES_SEARCHED = 20
GRACE_SECONDS = 30.0
"""How long a child may take to end, when asked to because another of its run has ended; as torchrun has it."""
NOT_FOR_CHILDREN = ("HYDRA_FULL_ERROR", "TORCHELASTIC_")
"""Beginnings of environment variables that the command line, or a torchrun around it, sets for its own process."""
ALONE = Seat(0, {}, lambda: False, POLL_SECONDS)


class StopFile:
    """A request to stop that reaches every job of a sweep, in whatever process it is watched."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def request(self, signum: int, frame: FrameType | None = None) -> None:  # noqa: ARG002 - a handler's signature
        """Ask all jobs to save and stop; a signal handler. The second request waits for nothing."""
        if self.signum() is not None:
            raise KeyboardInterrupt
        self.path.write_text(str(signum))

    def signum(self) -> int | None:
        """Return the signal that asked for the stop, or None."""
        try:
            return int(self.path.read_text() or signal.SIGTERM)  # empty for the instant in which it is written
        except FileNotFoundError:
            return None


class _Worker:
    """Whether this worker was asked to stop, alone or with the whole sweep."""

    def __init__(self, stop: StopFile) -> None:
        self._stop = stop
        self._own: int | None = None

    def request(self, signum: int, frame: FrameType | None = None) -> None:  # noqa: ARG002 - a handler's signature
        self._own = signum

    def signum(self) -> int | None:
        return self._stop.signum() if self._own is None else self._own

    def stopping(self) -> bool:
        return self.signum() is not None

    def check(self) -> None:
        signum = self.signum()
        if signum is not None:
            raise Interrupted("Stopped. The same command goes on from what is saved.", signum)


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    directory: Path
    """Of the run, relative to the working directory."""
    arguments: tuple[str, ...]
    """Of the command that does it."""
    overwrite: bool
    """Do it again if it is done."""
    shares_threads: bool
    """It takes its share of the CPU threads; else the configuration says how many."""
    shares_gpus: bool
    """It takes its turn of the GPUs; else the configuration says which."""


@dataclass(frozen=True)
class SweepTask:
    """What launchers call, by number, for each run of a sweep. It is pickled by reference, so it lives here."""

    jobs: tuple[Job, ...]
    share: Share
    scratch: Path
    """The sweep's own folder: logs, places, the request to stop."""
    stop: StopFile
    pid: int
    """Process of the sweep, which handles signals itself."""
    group: GroupSize = field(default_factory=GroupSize)
    """How many processes each job is; the launcher calls in all of them."""

    def log_of(self, job: Job, rank: int = 0) -> Path:
        """Return the file with all that a job prints, in the process of a rank."""
        return self.scratch / f"{job.directory.name}{f'-rank{rank}' if rank else ''}.log"

    def run(self, number: int) -> float:
        """Do a run, unless it is done; wait for it if a live process elsewhere does it.

        Returns:
            The number to be minimised (see `kd.outcome.objective`); NaN in all but the first process of a job, whatever
            happens.

        Raises:
            Interrupted: if a signal stopped it or the sweep.
            KDError: if it failed; the failure is recorded in its directory.
        """
        worker = _Worker(self.stop)
        with nullcontext() if self.pid == os.getpid() else signals_to(worker.request):
            if self.group.num_processes == 1:
                return self._run(self.jobs[number], worker, None)
            return self._run_in_group(self.jobs[number], worker)

    def _run_in_group(self, job: Job, worker: _Worker) -> float:
        meeting = Meeting(self.scratch, job.directory.name, self.group, find_member(self.group))
        if meeting.member.rank > 0:
            self._follow(job, worker, meeting)
            return math.nan
        with meeting.held():
            return self._run(job, worker, meeting)

    def _follow(self, job: Job, worker: _Worker, meeting: Meeting) -> None:
        """Start a child whenever the first task does, until that ends."""
        attempt = 0
        while (call := meeting.next_call(attempt, worker.stopping)) is not None:
            attempt = call.attempt
            end = self._in_child(job, call.place, worker, meeting.seat(call))
            if end.code:
                meeting.note(attempt, end)
        if worker.stopping():  # a later attempt must not wait for a child of this task
            meeting.note(attempt + 1, End(meeting.member.rank, 128 + signal.SIGTERM, "it was asked to stop"))

    def _run(self, job: Job, worker: _Worker, meeting: Meeting | None) -> float:
        held = RunHeldError.exit_code
        end = End(0, held, "")
        while end.code == held:  # somebody else was quicker
            _wait_while_held(job.directory, worker)
            with self.share.place(self.scratch, worker.stopping) as place:
                worker.check()
                # Asked here, since the wait for a place may have been long.
                result = None if job.overwrite else read_result(job.directory)
                if result is not None:
                    return objective(result)
                end = self._attempt(job, place, worker, meeting)
        return self._outcome(job, end, worker)

    def _attempt(self, job: Job, place: int | None, worker: _Worker, meeting: Meeting | None) -> End:
        if meeting is None:
            return self._in_child(job, place, worker, ALONE)
        call = meeting.call(place)
        end = self._in_child(job, place, worker, meeting.seat(call))
        return meeting.cause(call, end) if end.code else end

    def _in_child(self, job: Job, place: int | None, worker: _Worker, seat: Seat) -> End:
        """Run a job's command to its end."""
        arguments = list(job.arguments)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(NOT_FOR_CHILDREN)}
        if job.shares_threads and self.share.threads is not None:
            arguments.append(f"threads={self.share.threads}")
        environment |= self.share.environment(place, job.shares_gpus) | seat.environment
        if seat.rank == 0:
            forget_failure(job.directory)
            log.info("Started %s", job.directory.name)
        log_file = self.log_of(job, seat.rank)
        with log_file.open("wb") as output:
            child = subprocess.Popen(
                [sys.executable, "-m", CHILD, *arguments],
                env=environment,
                stdin=subprocess.PIPE,  # closed, it asks the child to stop; see kd.sweep_child
                stdout=output,
                stderr=subprocess.STDOUT,
                # A terminal's Ctrl-C goes to a whole group. The child must hear of it from here alone: a second
                # request to stop makes it drop everything.
                process_group=0,
            )
            try:
                code = _watch(child, worker, seat)
            finally:
                _end(child)
        return End(seat.rank, code, describe_end(code, log_file))

    def _outcome(self, job: Job, end: End, worker: _Worker) -> float:
        # A result that was not there before counts, however its process ended after writing it.
        result = _readable_result(job.directory) if end.code == 0 or not job.overwrite else None
        if result is not None:
            log.info("Finished %s: %s", job.directory.name, headline(result))
            return objective(result)
        if end.was_stopped or end.explains_nothing:
            worker.check()
        if end.was_stopped:
            raise Interrupted(f"{job.directory} was stopped. The same command goes on from what is saved.")
        error = self._in_words(job, end)
        write_failure(job.directory, Failure(error, end.code, str(self.log_of(job, end.rank))))
        log.warning("Failed %s: %s", job.directory.name, error)
        raise KDError(f"{job.directory.name}: {error}")

    def _in_words(self, job: Job, end: End) -> str:
        if self.group.num_processes == 1:
            return end.error
        if end.explains_nothing:
            return f"{end.error} Its log is one of {self.scratch / job.directory.name}-rank*.log"
        return f"process {end.rank} of {self.group.num_processes}: {end.error}"


def _wait_while_held(directory: Path, worker: _Worker) -> None:
    said = False
    while run_state(directory) is RunState.RUNNING:
        if not said:
            log.info("Waiting for %s, which %s works on", directory.name, holder_of(directory))
            said = True
        worker.check()
        time.sleep(WAIT_SECONDS)
    worker.check()


def _watch(child: "subprocess.Popen[bytes]", worker: _Worker, seat: Seat) -> int:
    """Wait for a child's end and return its exit code, or minus the number of the signal that ended it."""
    lost_since: float | None = None
    while True:
        with suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=seat.poll_seconds)
        if lost_since is None and seat.is_lost():
            lost_since = time.monotonic()
        if lost_since is not None or worker.stopping():
            _ask_to_stop(child)
        if lost_since is not None and time.monotonic() - lost_since > GRACE_SECONDS:
            child.kill()  # it may be where it hears no request, waiting for processes that will never come


def _ask_to_stop(child: "subprocess.Popen[bytes]") -> None:
    """Ask for a checkpoint and an end. The child hears the same if this process is killed, and never twice."""
    assert child.stdin is not None
    child.stdin.close()


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End a child that an exception left unwatched: a second Ctrl-C, or the end that a cluster sets to a worker."""
    assert child.stdin is not None
    if child.stdin.closed and child.poll() is None:
        child.send_signal(signal.SIGINT)  # as a second Ctrl-C: it drops what it does
    _ask_to_stop(child)
    child.wait()


def _readable_result(directory: Path) -> dict[str, Any] | None:
    try:
        return read_result(directory)
    except IntegrityError:
        return None


def describe_end(code: int, log_file: Path) -> str:
    """Return in a line why a child process ended without a result."""
    if code == -signal.SIGKILL:
        return "it was killed by SIGKILL; often the machine had too little memory for it"
    if code < 0:
        return f"it was killed by {signal.Signals(-code).name}"
    lines = last_lines(log_file, LINES_SEARCHED) or ["it printed nothing"]
    said = [line for line in lines if PREFIX.match(line)]
    last = PREFIX.sub("", said[-1], count=1) if said else lines[-1]
    return last if code else f"it ended without a result; its last line: {last}"


def last_lines(log_file: Path, count: int) -> list[str]:
    """Return the last lines of a log that are not empty; none if it cannot be read."""
    try:
        text = log_file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-count:]
