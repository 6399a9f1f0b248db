"""Files and directories that are either whole or absent, and that prove it by their digests.

Everything is written under a temporary name, flushed to disk, and renamed. A published directory holds
a manifest with the size and SHA-256 of each of its files.
"""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.errors import IntegrityError

if TYPE_CHECKING:
    import numpy.typing as npt

MANIFEST = "manifest.json"
_LEFTOVERS = (".*.tmp", ".*.old")
_MOVED_ASIDE = re.compile(r"\.(.+)\.\d+-[0-9a-f]{8}\.old")
"""What `publish_directory` calls the old copy, with the name that it had."""
_RESOURCE_ERRNOS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
)
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, NaN refused with ValueError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_of(value: Any) -> str:
    """Return the SHA-256 (hex) of a JSON-serialisable value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_lack_of_resource(error: Exception) -> bool:
    """Return whether an error of any library says that disk space or a permission is missing."""
    if isinstance(error, OSError):
        return error.errno in _RESOURCE_ERRNOS
    # Libraries in Rust (safetensors, tokenizers) have errors of their own, with the system's in the text.
    found = _RUST_ERRNO.search(str(error))
    return found is not None and int(found[1]) in _RESOURCE_ERRNOS


def sync_path(path: Path) -> None:
    """Flush a file's or a directory's content to disk, so that a rename cannot outrun it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def publish_file(target: Path) -> Iterator[Path]:
    """Yield the path of a new file to write; on success it becomes `target` in one step, else nothing remains.

    A reader sees the old content or the new, never a part.
    """
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        sync_path(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    sync_path(target.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file by `content` in one step."""
    with publish_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text` in UTF-8 in one step."""
    write_bytes(path, text.encode())


def write_array(path: Path, array: "npt.NDArray[Any]") -> None:
    """Replace a .npy file in one step."""
    import numpy as np

    content = io.BytesIO()
    # Not into the file itself: that a disk is full numpy says without the error's number.
    np.save(content, array, allow_pickle=False)
    write_bytes(path, content.getvalue())


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a value as strict, indented JSON (NaN and infinity raise ValueError)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Return a JSON file's value.

    Raises:
        IntegrityError: if the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path} cannot be read as JSON ({error}). Remove it to have it made again.") from error


@contextmanager
def publish_directory(target: Path) -> Iterator[Path]:
    """Yield a new directory to fill; on success it becomes `target`, with a manifest, in one rename.

    An existing `target` is replaced. If the body raises, nothing remains.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    # A directory cannot replace a full one in one call: the old one is moved aside first. Whoever is killed in between
    # leaves both, whole, to `settle_leftovers`.
    old = temporary.with_suffix(".old")
    try:
        yield temporary
        seal_directory(temporary)
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
        sync_path(target.parent)
    finally:
        if old.exists() and not target.exists():
            os.replace(old, target)
        for path in (temporary, old):
            remove_path(path)


def remove_path(path: Path) -> None:
    """Remove what lies at a path - a file, a link, or a directory with all that is in it - if there is anything."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def settle_leftovers(folder: Path) -> None:
    """Settle what killed processes left in a folder, and in those inside it, that only this process writes to.

    A directory whose replacement was cut short is there again, the new copy if that is whole, else the old one. All
    else that was being written is removed.
    """
    for old in sorted(folder.rglob(_LEFTOVERS[1])):
        if match := _MOVED_ASIDE.fullmatch(old.name):
            _recover(old.with_name(match[1]), old)
    for path in [path for pattern in _LEFTOVERS for path in folder.rglob(pattern)]:
        remove_path(path)


def _recover(target: Path, old: Path) -> None:
    """Give a directory its name back if its replacement was stopped between the two renames."""
    if target.exists():
        return
    new = old.with_suffix(".tmp")
    os.replace(new if is_whole(new) else old, target)
    sync_path(target.parent)


def seal_directory(directory: Path) -> None:
    """Flush all files of a directory and write its manifest last."""
    (directory / MANIFEST).unlink(missing_ok=True)
    files = {}
    paths = sorted(directory.rglob("*"))
    for path in paths:
        sync_path(path)
        if path.is_file():
            name = path.relative_to(directory).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    write_json(directory / MANIFEST, {"files": files})


def is_whole(directory: Path) -> bool:
    """Return whether a directory has a manifest, and all that it names is what was written."""
    try:
        check_directory(directory, digests=True)
    except IntegrityError:
        return False
    return True


def check_directory(directory: Path, *, digests: bool = False) -> None:
    """Check a published directory against its manifest: each file's size and, on request, its SHA-256.

    Raises:
        IntegrityError: naming the first file that is missing, has another size or another digest.
    """
    for name, size, digest in _read_manifest(directory):
        path = directory / name
        if not path.is_file():
            raise IntegrityError(f"{path} is missing. Remove {directory} to have it made again.")
        if path.stat().st_size != size:
            raise IntegrityError(
                f"{path} has {path.stat().st_size} bytes, its manifest says {size}. "
                f"Remove {directory} to have it made again."
            )
        if digests and file_digest(path) != digest:
            raise IntegrityError(f"{path} is not what was written (SHA-256 differs). Remove {directory}.")


def _read_manifest(directory: Path) -> list[tuple[str, int, str]]:
    """Return name, bytes and SHA-256 of each file."""
    manifest = read_json(directory / MANIFEST)
    try:
        return [(name, entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()]
    except (AttributeError, KeyError, TypeError) as error:  # JSON still, but not what was written
        raise IntegrityError(f"{directory / MANIFEST} is damaged ({error!r}). Remove {directory}.") from error
