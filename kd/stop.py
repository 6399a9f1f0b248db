"""A polite end: a signal asks, the training loop answers at the next point where everything is whole."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from kd.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)
STOP_CODES = (*(128 + number for number in SIGNALS), *(-number for number in SIGNALS))
"""How a process ends that one of these signals ended; as `subprocess` tells it."""

STOPPED = "Stopped. The same command goes on from what is saved."


@contextmanager
def signals_to(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let a handler have SIGTERM and SIGINT while the block runs; only in the main thread."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class StopSignal:
    """Remembers that the process was asked to stop. One object serves all trainers of a process."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._requested = False
        self._listeners = 0

    def request(self, signum: int, frame: FrameType | None = None) -> None:  # noqa: ARG002 - a handler's signature
        """Ask for a stop; a signal handler.

        A second SIGTERM changes nothing, since supervisors send several for one stop: what was begun is saved first.

        Raises:
            Interrupted: at once, if nothing listens, or if a second Ctrl-C says that a person will not wait.
        """
        # Not whether signum is set: of several processes, the first to be asked tells the others.
        again, self._requested = self._requested, True
        self.signum = signum
        if not self._listeners:
            raise Interrupted(STOPPED, signum)
        if again and signum == signal.SIGINT:
            raise Interrupted(
                "Stopped at once, as asked a second time: what came after the last checkpoint is lost. The same "
                "command goes on from there.",
                signum,
            )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the block runs, a first request waits for the block to notice `signum`."""
        self._listeners += 1
        try:
            yield
        finally:
            self._listeners -= 1
