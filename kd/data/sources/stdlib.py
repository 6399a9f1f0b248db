"""The embedded corpus: the source text of the running Python's standard library."""

import io
import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from kd.config import StdlibDataConfig
from kd.data.sources.base import Documents, RawDocument, draw_documents
from kd.errors import DataError

# Tests, tables and near-duplicates teach little and leak between the parts; installed packages differ by machine.
_LEFT_OUT_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "encodings", "pydoc_data"}
    | {"idlelib", "tkinter", "turtledemo", "__pycache__"}
)
# Folders and files that the build of this interpreter wrote: they hold its paths and flags.
_BUILD_PREFIXES = ("config-", "_sysconfigdata", "sitecustomize", "usercustomize")


def read_stdlib(config: StdlibDataConfig) -> Documents:
    """Draw the modules of the standard library; a document is a file, a group is a top-level module.

    Raises:
        DataError: if this interpreter has no source files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    description = f"the standard library of Python {platform.python_version()}"
    drawn = draw_documents(description, _modules(root), config.sample_size)
    if not drawn.documents:
        raise DataError(
            f"data=stdlib needs the source text of Python's standard library, and {root} has no .py files. "
            "Use an interpreter that is installed with its sources, or data=text data.path=<file or folder>."
        )
    return drawn


def _modules(root: Path) -> Iterator[RawDocument]:
    for path in sorted(_source_files(root)):
        relative = path.relative_to(root)
        yield RawDocument(relative.as_posix(), relative.parts[0], _source_text(path.read_bytes()))


def _source_files(root: Path) -> Iterator[Path]:
    # Unlike rglob, this does not look into the folders that are left out; installed packages are most of the files.
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if _is_wanted(name) and name not in _LEFT_OUT_FOLDERS]
        yield from (Path(folder, name) for name in names if name.endswith(".py") and _is_wanted(name))


def _is_wanted(name: str) -> bool:
    return not name.startswith(_BUILD_PREFIXES)


def _source_text(source: bytes) -> str:
    """Decode a module as the interpreter would, but never fail."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
    except SyntaxError:
        encoding = "utf-8"
    return source.decode(encoding, errors="replace").replace("\r\n", "\n")
