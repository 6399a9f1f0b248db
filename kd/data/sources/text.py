"""Local files: text, and rows that hold a text each."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kd.config import TextDataConfig
from kd.data.sources.base import Documents, RawDocument, draw_documents
from kd.data.sources.files import ROW_SUFFIXES, FoundFile, find_parts, printable, suffix_of
from kd.data.sources.rows import Row, read_rows
from kd.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (*TEXT_SUFFIXES, *ROW_SUFFIXES)
_ESCAPES = {r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\f": "\f", r"\\": "\\"}


def read_text_files(config: TextDataConfig) -> dict[str, Documents]:
    """Draw the documents of the files that `data.path`, `data.val_path` and `data.test_path` name, by that key.

    About `data.sample_size` bytes are taken of each.

    Raises:
        DataError: naming the key, the file and the line or byte, if a file is missing, of another type,
            not UTF-8, not JSON, or lacks the text column.
    """
    paths = {"data.path": config.path, "data.val_path": config.val_path, "data.test_path": config.test_path}
    drawn = {}
    for key, files in find_parts(config.path, config.val_path, config.test_path, SUFFIXES).items():
        # A document's id is unique in the corpus, whose parts may have files of one name.
        prefix = "" if key == "data.path" else f"{key}:"
        stream = _all_documents(files, config, prefix)
        drawn[key] = draw_documents(f"{key}={paths[key]}", stream, config.sample_size)
    return drawn


def _all_documents(files: Sequence[FoundFile], config: TextDataConfig, prefix: str) -> Iterator[RawDocument]:
    for file in files:
        name = prefix + printable(file.name)
        if suffix_of(file.path, TEXT_SUFFIXES) is not None:
            yield from _text_documents(name, file.path, config.document_separator)
            continue
        for index, row in enumerate(read_rows(file.path, config.text_column)):
            yield RawDocument(f"{name}#{index}", f"{name}#{index}", _text_of(row, config.text_column))


def _text_documents(name: str, path: Path, separator: str | None) -> Iterator[RawDocument]:
    text = _decoded(path)
    if separator is None:
        yield RawDocument(name, name, text)
        return
    for index, piece in enumerate(_separator_pattern(separator).split(text)):
        yield RawDocument(f"{name}#{index}", f"{name}#{index}", piece)


def _decoded(path: Path) -> str:
    shown = printable(str(path))
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"data.path: {shown} cannot be read ({error}). Mend it or leave it out.") from error
    except UnicodeDecodeError as error:
        # Of the file, not of what follows a byte-order mark.
        start = error.start + len(content) - len(error.object)
        raise DataError(
            f"data.path: {shown} is not UTF-8 at byte {start} ({error.reason}). Convert it to UTF-8 or leave it out."
        ) from error


def _separator_pattern(separator: str) -> re.Pattern[str]:
    r"""Return what cuts a text: the separator with \n, \r, \t, \f and \\ read as escapes, its line ends as any.

    A command line has no other way to write a line break, and Hydra passes its quoted strings on as they stand.
    """
    plain = re.sub(r"\\[nrtf\\]", lambda found: _ESCAPES[found.group()], separator)
    lines = plain.replace("\r\n", "\n").split("\n")
    return re.compile(r"\r?\n".join(map(re.escape, lines)))


def _text_of(row: Row, column: str) -> str:
    if column not in row.values:
        raise DataError(
            f"data.text_column={column} is not in {row.where}, which has: {', '.join(row.values)}. Set "
            "data.text_column to one of these."
        )
    return _checked_text(row.values[column], row.where, column)


def _checked_text(value: Any, where: str, column: str) -> str:
    """Return a row's text; an absent one (null) is an empty one, which is dropped later."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"data.text_column={column} holds a {type(value).__name__} in {where}, and text is needed: "
            "name the column that holds text."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half a surrogate pair, which no UTF-8 text can hold.
        raise DataError(f"data.path: the text in {where} is not valid Unicode ({error}). Mend the line.") from error
    return value
