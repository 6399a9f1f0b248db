"""Local files: text, JSON Lines and Parquet."""

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kd.config import TextDataConfig
from kd.data.sources.base import Documents, RawDocument, draw_documents
from kd.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")
_PARQUET_ROWS = 256


def read_text_files(config: TextDataConfig) -> Documents:
    """Draw the documents of the files that `data.path` names.

    Raises:
        DataError: naming the key, the file and the line or byte, if a file is missing, of another type,
            not UTF-8, not JSON, or lacks the text column.
    """
    files = _find_files(config.path)
    return draw_documents(f"data.path={config.path}", _all_documents(files, config), config.sample_size)


def _find_files(path_or_pattern: str) -> list[tuple[str, Path]]:
    """Return the files and their names inside the folder searched: the names stay when the folder moves."""
    path = Path(path_or_pattern).expanduser()
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(
                f"data.path={path_or_pattern} is a {path.suffix or 'file without a suffix'}; files of these types "
                f"can be read: {' '.join(SUFFIXES)}. Convert it or give another file."
            )
        return [("", path)]
    if path.is_dir():
        base, found = path, list(path.rglob("*"))
    else:
        base = _fixed_prefix(path)
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
    named = sorted((file.relative_to(base).as_posix(), file) for file in found if _is_wanted(file, base))
    if not named:
        problem = "holds no file" if found else "does not exist, or matches no file"
        raise DataError(
            f"data.path={path_or_pattern} {problem} that can be read ({' '.join(SUFFIXES)}). "
            "Give a file, a folder or a glob pattern."
        )
    return named


def _fixed_prefix(pattern: Path) -> Path:
    """Return the folder above the first part with a wildcard."""
    parts = list(pattern.parts[:-1])
    first_magic = next((index for index, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return Path(*parts[:first_magic])


def _is_wanted(file: Path, base: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(base).parts)
    return not hidden and file.suffix.lower() in SUFFIXES and file.is_file()


def _all_documents(files: list[tuple[str, Path]], config: TextDataConfig) -> Iterator[RawDocument]:
    for name, path in files:
        try:
            yield from _file_documents(name, path, config)
        except OSError as error:
            raise DataError(f"data.path: {path} cannot be read ({error}). Mend it or leave it out.") from error


def _file_documents(name: str, path: Path, config: TextDataConfig) -> Iterator[RawDocument]:
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        yield from _text_documents(name, path, config.document_separator)
        return
    rows = _json_rows(path, config.text_column) if suffix == ".jsonl" else _parquet_rows(path, config.text_column)
    for index, text in enumerate(rows):
        row = f"{name}#{index}"
        yield RawDocument(row, row, text)


def _text_documents(name: str, path: Path, separator: str | None) -> Iterator[RawDocument]:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Of the file, not of what follows a byte-order mark.
        start = error.start + len(content) - len(error.object)
        raise DataError(
            f"data.path: {path} is not UTF-8 at byte {start} ({error.reason}). Convert it to UTF-8 or leave it out."
        ) from error
    if separator is None:
        yield RawDocument(name, name, text)
        return
    for index, piece in enumerate(text.split(separator)):
        yield RawDocument(f"{name}#{index}", f"{name}#{index}", piece)


def _json_rows(path: Path, column: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _json_text(line, f"{path}, line {number}", column)


def _json_text(line: bytes, where: str, column: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"data.path: {where} is not JSON ({error}). Mend or remove the line.") from error
    if not isinstance(row, dict):
        raise DataError(f"data.path: {where} is not a JSON object with a column {column!r}. Mend or remove the line.")
    if column not in row:
        raise _missing_column(where, column, list(row))
    return _checked_text(row[column], where, column)


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


def _parquet_rows(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise _missing_column(str(path), column, names)
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    yield _checked_text(value, str(path), column)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"data.path: {path} cannot be read as Parquet ({error}). Mend the file or leave it out."
        ) from error


def _missing_column(where: str, column: str, names: list[str]) -> DataError:
    return DataError(
        f"data.text_column={column} is not in {where}, which has: {', '.join(names)}. Set data.text_column to one "
        "of these."
    )
