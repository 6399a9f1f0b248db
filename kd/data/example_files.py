"""Examples from JSON Lines and Parquet files; the columns of a row say what it is."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from kd.data.examples import (
    AnswerExample,
    ChatExample,
    Example,
    ExampleSet,
    Message,
    PreferenceExample,
    PromptExample,
    SftExample,
    split_examples,
)
from kd.errors import DataError

SUFFIXES = (".jsonl", ".parquet")
_PARQUET_ROWS = 256
E = TypeVar("E", bound=Example)


class _Row(NamedTuple):
    values: dict[str, Any]
    where: str
    """File and line or row, for messages."""


def read_answers(path: str | Path, val_ratio: float, test_ratio: float = 0.0) -> ExampleSet[SftExample]:
    """Read rows with `prompt` and `response`, or with `messages` (a list of `role` and `content`).

    The tokenizer renders the messages when they are encoded. In a chat of several turns the last answer alone is
    learned.

    Args:
        path: A .jsonl or .parquet file, or a folder that is searched through for such files.
        val_ratio: Share of the examples for validation, in (0, 1).
        test_ratio: Share of the examples for the test part, in [0, 1).

    Raises:
        ConfigError: if a ratio is out of range.
        DataError: naming file, line and column, if a file is missing, of another type or damaged, if a row lacks a
            column or holds no text there, if a chat does not end with the assistant's answer, or if there are fewer
            different prompts than parts.
    """
    return _read_set(path, _answer_of, val_ratio, test_ratio)


def read_preferences(path: str | Path, val_ratio: float, test_ratio: float = 0.0) -> ExampleSet[PreferenceExample]:
    """Read rows with `prompt`, `chosen` and `rejected`; arguments and errors as for `read_answers`."""
    return _read_set(path, _preference_of, val_ratio, test_ratio)


def read_prompts(path: str | Path, val_ratio: float, test_ratio: float = 0.0) -> ExampleSet[PromptExample]:
    """Read rows with `prompt` and a reference `answer`; arguments and errors as for `read_answers`."""
    return _read_set(path, _prompt_of, val_ratio, test_ratio)


def _read_set(path: str | Path, make: Callable[[_Row], E], val_ratio: float, test_ratio: float) -> ExampleSet[E]:
    examples = [make(row) for file in _find_files(Path(path).expanduser()) for row in _rows(file)]
    return split_examples(f"data.path={path}", examples, val_ratio, test_ratio)


# --- files -------------------------------------------------------------------------------------------------------


def _find_files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise DataError(f"data.path={path} holds no {' or '.join(SUFFIXES)} file. Give a file or another folder.")
        return files
    if not path.is_file():
        raise DataError(f"data.path={path} does not exist. Give a {' or '.join(SUFFIXES)} file, or a folder of them.")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"data.path={path} is not a {' or '.join(SUFFIXES)} file. Convert it, with one example a row.")
    return [path]


def _rows(path: Path) -> Iterator[_Row]:
    try:
        yield from _json_rows(path) if path.suffix.lower() == ".jsonl" else _parquet_rows(path)
    except OSError as error:
        raise DataError(f"data.path: {path} cannot be read ({error}). Mend it or leave it out.") from error


def _json_rows(path: Path) -> Iterator[_Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _json_row(line, f"{path}, line {number}")


def _json_row(line: bytes, where: str) -> _Row:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"data.path: {where} is not JSON ({error}). Mend or remove the line.") from error
    if not isinstance(values, dict):
        raise DataError(f"data.path: {where} is a {type(values).__name__}, not a JSON object. Mend or remove the line.")
    return _Row(values, where)


def _parquet_rows(path: Path) -> Iterator[_Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield _Row(values, f"{path}, row {number}")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"data.path: {path} cannot be read as Parquet ({error}). Mend the file or leave it out."
        ) from error


# --- rows --------------------------------------------------------------------------------------------------------


def _answer_of(row: _Row) -> SftExample:
    if "messages" in row.values:
        return _chat_of(row)
    return AnswerExample(_text(row, "prompt", "messages"), _text(row, "response", "messages"))


def _chat_of(row: _Row) -> ChatExample:
    turns = row.values["messages"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(
            f"data.path: `messages` in {row.where} is not a list of objects with `role` and `content`. "
            "Mend or remove it."
        )
    where = f"a message of {row.where}"
    messages = tuple(Message(_text(_Row(turn, where), "role"), _text(_Row(turn, where), "content")) for turn in turns)
    try:
        return ChatExample(messages)
    except DataError as error:
        raise DataError(f"data.path: {row.where}: {error}") from error


def _preference_of(row: _Row) -> PreferenceExample:
    return PreferenceExample(_text(row, "prompt"), _text(row, "chosen"), _text(row, "rejected"))


def _prompt_of(row: _Row) -> PromptExample:
    return PromptExample(_text(row, "prompt"), _text(row, "answer"))


def _text(row: _Row, key: str, alternative: str | None = None) -> str:
    """Return a row's text under a key; `alternative` is a key that could stand there instead."""
    if key not in row.values:
        instead = f" (or `{alternative}`)" if alternative is not None else ""
        raise DataError(
            f"data.path: {row.where} has no `{key}`{instead}, only: {', '.join(row.values) or 'nothing'}. Rename the "
            "column that holds it, or remove the row."
        )
    value = row.values[key]
    if not isinstance(value, str):
        raise DataError(
            f"data.path: `{key}` in {row.where} is of type {type(value).__name__}, and text is needed. Write it as a "
            "string, or remove the row."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half a surrogate pair, which no UTF-8 text can hold.
        raise DataError(f"data.path: `{key}` in {row.where} is not valid Unicode ({error}). Mend the row.") from error
    return value
