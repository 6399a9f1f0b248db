"""A disk of a few kilobytes, mounted in memory: what is written to it ends with the system's own errors."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a disk of a size, as mount writes it, on a new folder; skip the test where that is not permitted."""
    folder.mkdir(parents=True)
    try:
        _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small disk cannot be mounted here: {getattr(error, 'stderr', error)}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # whatever a failed test still holds open


def enlarge(disk: Path, size: str) -> None:
    """Give a mounted disk another size."""
    _mount("-o", f"remount,size={size}", str(disk))


def fill(disk: Path) -> Path:
    """Take all the space that is left, but the rest of a page; return the file that takes it."""
    file = disk / "filling"
    with file.open("wb", buffering=0) as content:
        try:
            while content.write(bytes(4096)):
                pass
        except OSError:
            pass
    return file


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True)
