"""Which files a path names: a file, a folder that is searched through, or a pattern. What is left out is said."""

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from kd.errors import DataError

log = logging.getLogger("kd")

ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
NAMED_SUFFIXES = (".json", ".csv")
"""Rows too, but read only where a path names them: in a folder they are as often settings, or tables of others."""
_SHOWN_KINDS = 6
_HELD_OUT_NAMES = ("test", "val", "valid", "validation", "dev", "eval")
_HELD_OUT_STEM = re.compile(rf"(?:.*[-_.])?(?:{'|'.join(_HELD_OUT_NAMES)})(?:[-_.]?\d.*)?", re.IGNORECASE)
"""test, my-test, test-00000-of-00001; but not testing or test_of_something."""


class FoundFile(NamedTuple):
    """A file that is read."""

    name: str
    """Inside the folder searched, so that it stays when that moves; empty where the path is the file itself."""
    path: Path


def suffix_of(path: Path, suffixes: Sequence[str]) -> str | None:
    """Return which of these suffixes a file has, if any; they are in lower case, and may have two dots."""
    return next((suffix for suffix in suffixes if path.name.lower().endswith(suffix)), None)


def printable(name: str) -> str:
    """Return a file's name with the bytes that are not UTF-8 written as backslash escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def find_parts(
    path: str, val_path: str | None, test_path: str | None, suffixes: Sequence[str]
) -> dict[str, list[FoundFile]]:
    """Return the files of `data.path` and, of those that are given, of `data.val_path` and `data.test_path`, by key.

    What the latter two name is left out of the first.

    Raises:
        DataError: as for `find_files`, or if a file is both of the validation and of the test part.
    """
    held_out = {"data.val_path": val_path, "data.test_path": test_path}
    parts = {key: find_files(value, key, suffixes) for key, value in held_out.items() if value is not None}
    resolved = [file.path.resolve() for files in parts.values() for file in files]
    twice = next((file for file, count in Counter(resolved).items() if count > 1), None)
    if twice is not None:
        raise DataError(
            f"{printable(str(twice))} is named by data.val_path={val_path} and data.test_path={test_path}: each part "
            "has its own files."
        )
    files = find_files(path, "data.path", suffixes, set(resolved))
    if not parts:
        _warn_of_split_names(files, path)
    return {"data.path": files, **parts}


def find_files(path: str, key: str, suffixes: Sequence[str], without: Collection[Path] = ()) -> list[FoundFile]:
    """Return the files that a path names, in the order of their names.

    Hidden files and folders, and folders behind a link, are left out, as are files of other types; the log says how
    many.

    Args:
        path: A file, a folder or a glob pattern.
        key: Of the configuration, for messages.
        suffixes: What can be read.
        without: Files to leave out, resolved.

    Raises:
        DataError: if there is no such file, it is of another type, or a folder cannot be looked into.
    """
    left_out: Counter[str] = Counter()
    try:
        found = _find(Path(path).expanduser(), path, key, suffixes, left_out)
        kept = [file for file in found if not without or file.path.resolve() not in without]
    except OSError as error:
        where = printable(str(error.filename or path))
        raise DataError(f"{key}: {where} cannot be read ({error.strerror}). Mend it or leave it out.") from error
    left_out["of data.val_path and data.test_path"] = len(found) - len(kept)
    reasons = _describe(left_out, key)
    if not kept:
        all_out = f"; left out: {reasons}" if reasons else ""
        raise DataError(
            f"{key}={path} names no file that can be read ({' '.join(suffixes)}){all_out}. Give a file, a folder or a "
            "glob pattern."
        )
    if reasons:
        only_hidden = not (+left_out).keys() - {"hidden", "of data.val_path and data.test_path"}
        level = logging.INFO if only_hidden else logging.WARNING
        log.log(level, "%s=%s: %d file(s) are read; left out: %s", key, path, len(kept), reasons)
    return kept


def _warn_of_split_names(files: Sequence[FoundFile], path: str) -> None:
    """Warn if files are named as held-out parts, but would be trained on like the others."""
    alike = [file.name for file in files if _is_named_as_held_out(file.name)]
    if alike:
        log.warning(
            "data.path=%s: %d of %d files are named like held-out parts (%s), yet all files are read as one and split "
            "anew. If that is not meant, name these in data.val_path and data.test_path",
            path,
            len(alike),
            len(files),
            printable(alike[0]) + (", ..." if len(alike) > 1 else ""),
        )


def _is_named_as_held_out(name: str) -> bool:
    if not name or name.lower().endswith(".py"):  # tests of code, which are no split
        return False
    *folders, last = Path(name).parts
    suffix = suffix_of(Path(last), (*ROW_SUFFIXES, *NAMED_SUFFIXES)) or Path(last).suffix
    is_held_out = _HELD_OUT_STEM.fullmatch(last[: len(last) - len(suffix)]) is not None
    return is_held_out or any(folder.lower() in _HELD_OUT_NAMES for folder in folders)


def _find(path: Path, given: str, key: str, suffixes: Sequence[str], left_out: Counter[str]) -> list[FoundFile]:
    if path.is_file():
        if suffix_of(path, (*suffixes, *NAMED_SUFFIXES)) is None:
            raise DataError(
                f"{key}={given} is a {path.suffix or 'file without a suffix'}; files of these types can be read: "
                f"{' '.join((*suffixes, *NAMED_SUFFIXES))}. Convert it or give another file."
            )
        return [FoundFile("", path)]
    if path.is_dir():
        return _wanted(_walk(path, left_out), path, suffixes, left_out)
    if not glob.has_magic(str(path)):
        raise DataError(f"{key}={given} does not exist. Give a file, a folder or a glob pattern.")
    base = _fixed_prefix(path)
    _look_into_folders(path, base)
    matches = {Path(name) for name in glob.iglob(str(path), recursive=True)}  # a set: **/**/ gives files twice
    named = suffix_of(path, NAMED_SUFFIXES)
    return _wanted(matches, base, suffixes if named is None else (*suffixes, named), left_out)


def _walk(folder: Path, left_out: Counter[str]) -> Iterator[Path]:
    """Yield what a folder holds at any depth, hidden files too, but nothing of hidden folders.

    Raises:
        OSError: if a folder cannot be looked into.
    """
    for root, folders, names in os.walk(folder, onerror=_raise):
        hidden = {name for name in folders if name.startswith(".")}
        linked = {name for name in folders if Path(root, name).is_symlink()} - hidden
        left_out["hidden"] += len(hidden)
        left_out["linked folder(s)"] += len(linked)
        folders[:] = [name for name in folders if name not in hidden | linked]
        yield from (Path(root, name) for name in names)


def _raise(error: OSError) -> None:
    raise error


def _look_into_folders(pattern: Path, base: Path) -> None:
    """Raise OSError if a folder that a pattern searches cannot be looked into: `glob` passes over it in silence."""
    for folders in pattern.parents:
        for folder in glob.iglob(str(folders), recursive=True):
            if os.path.isdir(folder):
                os.scandir(folder).close()
        if folders == base:
            return


def _fixed_prefix(pattern: Path) -> Path:
    """Return the folder above the first part with a wildcard."""
    parts = list(pattern.parts[:-1])
    first_magic = next((index for index, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return Path(*parts[:first_magic])


def _wanted(
    candidates: Collection[Path] | Iterator[Path], base: Path, suffixes: Sequence[str], left_out: Counter[str]
) -> list[FoundFile]:
    files = []
    for path in candidates:
        inside = path.relative_to(base)
        if path.is_dir():
            continue
        if any(part.startswith(".") for part in inside.parts):
            left_out["hidden"] += 1
        elif suffix_of(path, suffixes) is None:
            left_out[path.suffix.lower() or "without a suffix"] += 1
        elif not path.is_file():
            left_out["broken link(s)"] += 1
        else:
            files.append(FoundFile(inside.as_posix(), path))
    return sorted(files)


def _describe(left_out: Counter[str], key: str) -> str:
    kinds = [(kind, count) for kind, count in left_out.most_common() if count]
    shown = ", ".join(f"{count} {printable(kind)}" for kind, count in kinds[:_SHOWN_KINDS])
    rest = sum(count for _, count in kinds[_SHOWN_KINDS:])
    named = f" ({' and '.join(NAMED_SUFFIXES)} are read where {key} names them)"
    return shown + (f", {rest} more" if rest else "") + (named if any(left_out[s] for s in NAMED_SUFFIXES) else "")
