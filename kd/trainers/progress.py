"""What a person sees while a model trains: a bar on a terminal, plain log lines elsewhere."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from kd.distributed import get_rank

log = logging.getLogger("kd")

T = TypeVar("T")
SECONDS = 30
"""Between log lines of what has no steps to count."""


def tracked(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    """Yield items, with a bar on a terminal, and elsewhere a log line every `SECONDS`; nothing if it is soon over."""
    hidden = None if get_rank() == 0 else True
    started = said = time.monotonic()
    bar = tqdm(items, desc=description, total=total, unit="batch", disable=hidden, leave=False, delay=1)
    for number, item in enumerate(bar):
        if (now := time.monotonic()) - said > SECONDS:
            left = "" if total is None else f", {_clock((now - started) / max(number, 1) * (total - number))} left"
            log.info("%s: %d of %s batches%s", description, number, total or "an unknown number of", left)
            said = now
        yield item


class Progress:
    """A progress bar over optimizer steps with loss, tokens/s and the remaining time."""

    def __init__(self, description: str, first_step: int, total_steps: int) -> None:
        self._total = total_steps
        self._started = time.monotonic()
        self._first_step = first_step
        # disable=None: no bar where stderr is not a terminal.
        hidden = None if get_rank() == 0 else True
        self._bar = tqdm(desc=description, initial=first_step, total=total_steps, unit="step", disable=hidden)
        self._redirect = logging_redirect_tqdm() if sys.stderr.isatty() else None

    def __enter__(self) -> "Progress":
        if self._redirect is not None:
            self._redirect.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._redirect is not None:
            self._redirect.__exit__(kind, error, trace)
        self._bar.close()

    def advance(self) -> None:
        """Count one optimizer step."""
        self._bar.update()

    def report(self, step: int, loss: float, tokens_per_second: float, extra: str) -> None:
        """Show the state at a log interval."""
        self._bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s")
        log.info(
            "step %d/%d  loss %.4f%s  %s tokens/s  %s left",
            step,
            self._total,
            loss,
            extra,
            f"{tokens_per_second:,.0f}",
            self._remaining(step),
        )

    def _remaining(self, step: int) -> str:
        done = max(step - self._first_step, 1)
        return _clock((time.monotonic() - self._started) / done * (self._total - step))


def _clock(seconds: float) -> str:
    minutes, whole = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{whole:02d}" if hours else f"{minutes}:{whole:02d}"
