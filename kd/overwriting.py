"""overwrite=true: a finished run is done again, and an attempt at that which was stopped goes on like any other."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kd.errors import IntegrityError
from kd.files import digest_of, write_text
from kd.runs import RESULT, Run

log = logging.getLogger("kd")

MARKER = ".overwriting"
"""File of a run's directory: what lies beside it is of an attempt that overwrite=true began, and that is not over."""


def needless_because(run: Run, *, overwrite: bool) -> dict[str, Any] | None:
    """Return the result that makes an attempt needless, or None.

    With `overwrite` that is only one of the attempt which it began, stopped before it could remove its mark.

    Raises:
        IntegrityError: without `overwrite`, if there is a result that cannot be read.
    """
    if not overwrite:
        return run.result()
    if not (run.directory / MARKER).is_file():
        return None
    try:
        return run.result()
    except IntegrityError:
        return None


def begin_afresh(run: Run) -> None:
    """Remove what an earlier attempt left, unless it began here itself; the caller holds the run."""
    marker = run.directory / MARKER
    if marker.is_file() and not run.result_file.exists():
        log.info("Going on with what overwrite=true began; to begin afresh, remove %s", run.directory)
        return
    run.clear()
    write_text(marker, "overwrite=true removed what was here before.\n")


def end(run: Run) -> None:
    """Forget that a run was begun afresh, since it is done: overwrite=true then begins afresh again."""
    (run.directory / MARKER).unlink(missing_ok=True)


class SweepOverwriting:
    """A sweep with overwrite=true: what it has done again stays, if it was stopped and is started once more.

    Args:
        directories: Of the sweep's runs.
    """

    def __init__(self, directories: Iterable[Path]) -> None:
        paths = sorted(directories)
        self._marker = paths[0].parent / f"{MARKER}-{digest_of([str(path) for path in paths])[:8]}"

    def has_done(self, directory: Path) -> bool:
        """Return whether a finished run was finished since the sweep began to do its runs again."""
        if not self._marker.is_file():
            return False
        return (directory / RESULT).stat().st_mtime_ns >= self._marker.stat().st_mtime_ns

    def begin(self) -> None:
        """Remember when the sweep began, unless it is going on."""
        if self._marker.is_file():
            log.info("Going on with what overwrite=true began; to do all runs again, remove %s", self._marker)
            return
        self._marker.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._marker, "overwrite=true does the runs of a sweep again that were finished before this.\n")

    def end(self) -> None:
        """Forget that the sweep began, since all its runs are done."""
        self._marker.unlink(missing_ok=True)
