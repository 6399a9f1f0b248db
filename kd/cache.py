"""A folder of things that are expensive to make: built once, by one process, and then only read.

An entry is a directory `<root>/<kind>/<key>` whose key is a hash of everything that determines its content.
It is filled under another name, sealed with a manifest, and renamed, so that it is either whole or absent.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from kd.errors import DataError, KDError, ResourceError
from kd.files import check_directory, is_lack_of_resource, is_whole, seal_directory, settle_leftovers, sync_path

logger = logging.getLogger(__name__)

LOCK_TIMEOUT_SECONDS = 24 * 3600.0
"""The hidden states of a large corpus take hours; the lock of a builder that died is free at once."""
POLL_SECONDS = 0.2


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


def _is_published(target: Path) -> bool:
    if not target.exists():
        return False
    check_directory(target)
    return True


def _build(target: Path, build: Callable[[Path], None], describe: str) -> None:
    """Fill, seal and rename the work directory; the caller holds the lock."""
    work = target.with_name(f"{target.name}.partial")
    logger.info("%s %s", "Continuing to build" if work.exists() else "Building", describe)
    work.mkdir(exist_ok=True)
    settle_leftovers(work)
    if not is_whole(work):  # it is if a builder was killed just before the last step
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
    except KDError:
        raise
    except Exception as error:
        if not is_lack_of_resource(error):
            raise
        raise ResourceError(
            f"{describe} cannot be kept in {target}: {error}. Free the space or the permission, or set the "
            "environment variable KD_CACHE to another folder."
        ) from error
