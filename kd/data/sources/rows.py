"""Rows of JSON Lines, JSON, CSV and Parquet files."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kd.data.sources.files import NAMED_SUFFIXES, ROW_SUFFIXES, printable, suffix_of
from kd.errors import DataError

_PARQUET_ROWS = 256
_LONGEST_FIELD = 2**31 - 1


class Row(NamedTuple):
    """A row, and where it stands."""

    values: dict[str, Any]
    where: str
    """File and line or row, for messages."""


def read_rows(path: Path, column: str | None = None) -> Iterator[Row]:
    """Yield the rows of a file; blank lines are none.

    Args:
        path: A file with one of `ROW_SUFFIXES` or `NAMED_SUFFIXES`. JSON is a list of objects, or JSON Lines; CSV has a
            header, and all its values are text.
        column: What is wanted; of Parquet no other column is read then. A row may lack it.

    Raises:
        DataError: naming the file and the line or row, if it cannot be read.
    """
    shown = printable(str(path))
    suffix = suffix_of(path, (*ROW_SUFFIXES, *NAMED_SUFFIXES))
    try:
        if suffix == ".parquet":
            yield from _parquet_rows(path, shown, column)
        elif suffix == ".csv":
            yield from _csv_rows(path, shown)
        elif suffix == ".json" and path.read_bytes().removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from _listed_rows(path, shown)
        else:
            yield from _line_rows(path, shown)
    except (OSError, EOFError, zlib.error) as error:  # the last two of a damaged gzip file
        raise DataError(f"data.path: {shown} cannot be read ({error}). Mend it or leave it out.") from error


def _line_rows(path: Path, shown: str) -> Iterator[Row]:
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{shown}, line {number}"
                yield _object(_parsed(line, where, "Mend or remove the line."), where)


def _listed_rows(path: Path, shown: str) -> Iterator[Row]:
    for number, values in enumerate(_parsed(path.read_bytes(), shown, "Mend the file or leave it out."), start=1):
        yield _object(values, f"{shown}, row {number}")


def _parsed(text: bytes, where: str, way_out: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"data.path: {where} is not JSON ({error}). {way_out}") from error


def _object(values: Any, where: str) -> Row:
    if not isinstance(values, dict):
        raise DataError(f"data.path: {where} is a {type(values).__name__}, not a JSON object. Mend or remove it.")
    return Row(values, where)


def _csv_rows(path: Path, shown: str) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD)  # of the whole module, whose own 131,072 characters many documents exceed
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            for fields in filter(None, reader):
                where = f"{shown}, line {reader.line_num}"
                if len(fields) != len(header):
                    raise DataError(
                        f"data.path: {where} has {len(fields)} fields, and the header {len(header)}. Mend the line."
                    )
                yield Row(dict(zip(header, fields, strict=True)), where)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"data.path: {shown} cannot be read as CSV ({error}). Mend it or leave it out.") from error


def _parquet_rows(path: Path, shown: str, column: str | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        # Opened here: pyarrow takes no path that is not UTF-8.
        with path.open("rb") as opened, pyarrow.parquet.ParquetFile(opened) as file:
            columns = [column] if column in file.schema_arrow.names else None
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{shown}, row {number}")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"data.path: {shown} cannot be read as Parquet ({error}). Mend the file or leave it out."
        ) from error
