"""Files and directories that are either whole or absent, and that prove it by their digests.

Everything is written under a temporary name, flushed to disk, and renamed. A published directory holds
a manifest with the size and SHA-256 of each of its files.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kd.errors import IntegrityError

MANIFEST = "manifest.json"


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


def sync_path(path: Path) -> None:
    """Flush a file's or a directory's content to disk, so that a rename cannot outrun it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text` in one step: a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_path(path.parent)


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
    try:
        yield temporary
        seal_directory(temporary)
        if target.exists():
            # A directory cannot replace a full one in one call: move the old one aside first.
            old = temporary.with_suffix(".old")
            os.replace(target, old)
            os.replace(temporary, target)
            shutil.rmtree(old)
        else:
            os.replace(temporary, target)
        sync_path(target.parent)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def remove_leftovers(parent: Path) -> None:
    """Remove what a killed `publish_directory` left in a folder that only this process writes to."""
    for pattern in (".*.tmp", ".*.old"):
        for path in parent.glob(pattern):
            shutil.rmtree(path)


def seal_directory(directory: Path) -> None:
    """Flush all files of a directory and write its manifest last."""
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST):
        sync_path(path)
        files[path.relative_to(directory).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    write_json(directory / MANIFEST, {"files": files})
    sync_path(directory)


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
