"""Examples from files of rows; the columns of a row say what it is."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from kd.data.corpora import TEST, VALIDATION
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
from kd.data.sources.files import ROW_SUFFIXES, FoundFile, find_parts
from kd.data.sources.rows import Row, read_rows
from kd.errors import DataError

E = TypeVar("E", bound=Example)
AnswerCheck = Callable[[str], None]
"""Raises DataError for a reference answer that cannot be used."""


def read_answers(
    path: str | Path,
    val_ratio: float,
    test_ratio: float = 0.0,
    *,
    val_path: str | Path | None = None,
    test_path: str | Path | None = None,
) -> ExampleSet[SftExample]:
    """Read rows with `prompt` and `response`, or with `messages` (a list of `role` and `content`).

    The tokenizer renders the messages when they are encoded. In a chat of several turns the last answer alone is
    learned.

    Args:
        path: A .jsonl, .jsonl.gz, .parquet, .json or .csv file, a folder that is searched through for files of the
            first three types, or a glob pattern.
        val_ratio: Share of the examples for validation, in (0, 1).
        test_ratio: Share of the examples for the test part, in [0, 1).
        val_path: Files of the validation part, which are left out of `path`; `val_ratio` does not count then.
        test_path: Files of the test part, likewise.

    Raises:
        ConfigError: if a ratio is out of range.
        DataError: naming file, line and column, if a file is missing, of another type or damaged, if a row lacks a
            column or holds no text there, if a chat does not end with the assistant's answer, or if there are fewer
            different prompts than parts.
    """
    return _read_set(_answer_of, (val_ratio, test_ratio), (path, val_path, test_path))


def read_preferences(
    path: str | Path,
    val_ratio: float,
    test_ratio: float = 0.0,
    *,
    val_path: str | Path | None = None,
    test_path: str | Path | None = None,
) -> ExampleSet[PreferenceExample]:
    """Read rows with `prompt`, `chosen` and `rejected`; arguments and errors as for `read_answers`."""
    return _read_set(_preference_of, (val_ratio, test_ratio), (path, val_path, test_path))


def read_prompts(
    path: str | Path,
    val_ratio: float,
    test_ratio: float = 0.0,
    *,
    val_path: str | Path | None = None,
    test_path: str | Path | None = None,
    check_answer: AnswerCheck | None = None,
) -> ExampleSet[PromptExample]:
    """Read rows with `prompt` and a reference `answer`; arguments and errors as for `read_answers`.

    What `check_answer` refuses is refused with the row named: in training it would end the run.
    """

    def prompt_of(row: Row) -> PromptExample:
        example = PromptExample(_text(row, "prompt"), _text(row, "answer"))
        try:
            if check_answer is not None:
                check_answer(example.answer)
        except DataError as error:
            raise DataError(f"data.path: {row.where}: {error}") from error
        return example

    return _read_set(prompt_of, (val_ratio, test_ratio), (path, val_path, test_path))


def _read_set(
    make: Callable[[Row], E],
    ratios: tuple[float, float],
    paths: tuple[str | Path, str | Path | None, str | Path | None],
) -> ExampleSet[E]:
    path, val_path, test_path = (None if path is None else str(path) for path in paths)
    assert path is not None
    found = find_parts(path, val_path, test_path, ROW_SUFFIXES)
    keys = {VALIDATION: "data.val_path", TEST: "data.test_path"}
    separate = {part: _examples(found[key], make) for part, key in keys.items() if key in found}
    return split_examples(f"data.path={path}", _examples(found["data.path"], make), *ratios, separate=separate)


def _examples(files: Sequence[FoundFile], make: Callable[[Row], E]) -> list[E]:
    return [make(row) for file in files for row in read_rows(file.path)]


# --- rows --------------------------------------------------------------------------------------------------------


def _answer_of(row: Row) -> SftExample:
    if "messages" in row.values:
        return _chat_of(row)
    return AnswerExample(_text(row, "prompt", "messages"), _text(row, "response", "messages"))


def _chat_of(row: Row) -> ChatExample:
    turns = row.values["messages"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(
            f"data.path: `messages` in {row.where} is not a list of objects with `role` and `content`. "
            "Mend or remove it."
        )
    where = f"a message of {row.where}"
    messages = tuple(Message(_text(Row(turn, where), "role"), _text(Row(turn, where), "content")) for turn in turns)
    try:
        return ChatExample(messages)
    except DataError as error:
        raise DataError(f"data.path: {row.where}: {error}") from error


def _preference_of(row: Row) -> PreferenceExample:
    return PreferenceExample(_text(row, "prompt"), _text(row, "chosen"), _text(row, "rejected"))


def _text(row: Row, key: str, alternative: str | None = None) -> str:
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
