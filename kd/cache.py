"""A folder of things that are expensive to make: built once, by one process, and then only read.

An entry is a directory `<root>/<kind>/<key>` whose key is a hash of everything that determines its content.
It is filled under another name, sealed with a manifest, and renamed, so that it is either whole or absent.
"""

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from filelock import FileLock, Timeout

from kd.errors import ConfigError, DataError, ResourceError
from kd.files import check_directory, seal_directory, sync_path

logger = logging.getLogger(__name__)

LOCK_TIMEOUT_SECONDS = 24 * 3600.0
"""The hidden states of a large corpus take hours; the lock of a builder that died is free at once."""
POLL_SECONDS = 0.2

_made: ContextVar[list[Path] | None] = ContextVar("made", default=None)
"""Entries built inside `all_or_nothing`."""

RESOURCE_ERRNOS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
)


def cache_root() -> Path:
    """Return the cache folder: the environment's KD_CACHE, else outputs/.cache under the current directory."""
    return Path(os.environ.get("KD_CACHE") or "outputs/.cache").expanduser().absolute()


def cached_directory(kind: str, key: str, build: Callable[[Path], None], describe: str) -> Path:
    """Return a published cache entry, building it first if there is none.

    Args:
        kind: Folder of the entry, like `blocks`.
        key: Hash of everything that determines the content.
        build: Fills the directory it is given. That directory survives an interruption, so it may already hold
            what an earlier call finished; `build` decides what of that it keeps.
        describe: What is built, for messages: "the packed blocks of ...".

    Raises:
        IntegrityError: if the published entry lacks a file or a file has another size. It is not rebuilt
            silently: something outside changed it.
        DataError: if another process has been building it for longer than a day.
        ResourceError: if disk space or a permission is missing.
    """
    target = cache_root() / kind / key
    with _resource_errors(target, describe):
        if _is_published(target):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with _build_lock(target, describe):
            # Whoever held the lock before may have finished it.
            if not _is_published(target):
                _build(target, build, describe)
    return target


def is_cached(kind: str, key: str) -> bool:
    """Return whether an entry is published, without a look at its files."""
    return (cache_root() / kind / key).is_dir()


@contextmanager
def all_or_nothing() -> Iterator[None]:
    """Remove again what was built inside the block, if a ConfigError or DataError of the user's ends it."""
    made: list[Path] = []
    token = _made.set(made)
    try:
        yield
    except (ConfigError, DataError):
        for target in made:
            _forget(target)
        raise
    finally:
        _made.reset(token)


def _forget(target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.rmtree(target.with_name(f"{target.name}.partial"), ignore_errors=True)
    target.with_name(f"{target.name}.lock").unlink(missing_ok=True)
    folders = [target.parent, cache_root()]
    if not os.environ.get("KD_CACHE"):
        folders.append(cache_root().parent)  # outputs/; the parent of a folder of one's own choice is not ours
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _is_published(target: Path) -> bool:
    if not target.exists():
        return False
    check_directory(target)
    return True


def _build(target: Path, build: Callable[[Path], None], describe: str) -> None:
    """Fill, seal and rename the work directory; the caller holds the lock."""
    work = target.with_name(f"{target.name}.partial")
    if (made := _made.get()) is not None:
        made.append(target)
    logger.info("%s %s", "Continuing to build" if work.exists() else "Building", describe)
    work.mkdir(exist_ok=True)
    # A killed builder leaves half-written temporary files; the seal would publish them.
    for stale in sorted(work.rglob(".*.tmp")):
        stale.unlink()
    build(work)
    seal_directory(work)
    os.replace(work, target)
    sync_path(target.parent)


@contextmanager
def _build_lock(target: Path, describe: str) -> Iterator[None]:
    """Hold the entry's lock; the operating system frees it when the holder dies."""
    lock = FileLock(target.with_name(f"{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("process %d waits for another process that is building %s", os.getpid(), describe)
        _wait_for(lock, target, describe)
    try:
        yield
    finally:
        lock.release()


def _wait_for(lock: FileLock, target: Path, describe: str) -> None:
    try:
        lock.acquire(timeout=LOCK_TIMEOUT_SECONDS, poll_interval=POLL_SECONDS)
    except Timeout as error:
        raise DataError(
            f"Another process has been building {describe} for more than {LOCK_TIMEOUT_SECONDS / 60:.0f} minutes "
            f"({lock.lock_file} is held). Wait for it or stop it, then start again: what it finished is kept in "
            f"{target}.partial."
        ) from error


@contextmanager
def _resource_errors(target: Path, describe: str) -> Iterator[None]:
    """Turn a missing permission or disk space into ResourceError."""
    try:
        yield
    except OSError as error:
        if error.errno not in RESOURCE_ERRNOS:
            raise
        raise ResourceError(
            f"{describe} cannot be kept in {target}: {error}. Free the space or the permission, or set the "
            "environment variable KD_CACHE to another folder."
        ) from error
