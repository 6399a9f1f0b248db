"""Files and their rows: all that a path names is read once, or counted as left out."""

import gzip
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from kd.config import ExampleFilesConfig, TextDataConfig
from kd.data import answer_set, read_answers, read_corpus
from kd.data.sources.files import FoundFile, find_files
from kd.data.sources.text import SUFFIXES
from kd.errors import ConfigError, DataError

ROWS = [
    {"text": f'text {i},\n"quoted" \u4e2d', "prompt": f"prompt {i}", "response": f"response {i}"} for i in range(12)
]


def lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts_of(path: Path | str, **changes: Any) -> dict[str, list[str]]:
    corpus = read_corpus(TextDataConfig(path=str(path), **{"sample_size": None, **changes}))
    return {part: sorted(corpus.texts(part)) for part in corpus.part_names}


def all_texts(path: Path | str, **changes: Any) -> list[str]:
    return sorted(text for part in texts_of(path, **changes).values() for text in part)


@pytest.fixture
def deny(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that takes the permission to look into a folder away, from root too."""
    denied: list[str] = []
    original = os.scandir

    def scandir(path: Any = ".") -> Any:
        if not isinstance(path, int) and os.fspath(path) in denied:
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    return lambda folder: denied.append(str(folder))


# --- what is read, and what is counted ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "b.json", "a.csv", "a.CSV"])
def test_rows_of_every_format_are_the_same(name: str, tmp_path: Path) -> None:
    header = ["text", "prompt", "response"]
    quoted = [",".join('"' + row[key].replace('"', '""') + '"' for key in header) for row in ROWS]
    contents = {
        "a.jsonl": lines(ROWS),
        "a.jsonl.gz": gzip.compress(lines(ROWS).encode()),
        "a.json": "\ufeff " + json.dumps(ROWS, indent=1),
        "b.json": lines(ROWS),
        "a.csv": "\ufeff" + "\r\n".join([",".join(header), *quoted, ""]),
    }
    path = write(tmp_path / name, contents[name.replace("CSV", "csv")])
    assert all_texts(path) == sorted(row["text"] for row in ROWS)
    expected = read_answers(write(tmp_path / "plain.jsonl", lines(ROWS)), 0.3)
    assert read_answers(path, 0.3).fingerprint == expected.fingerprint
    assert read_answers(f"{tmp_path}/{name[0]}*{path.suffix}", 0.3).fingerprint == expected.fingerprint


def test_a_long_csv_field_is_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text\n" + "x" * 200_000 + "\ny\n")
    assert [len(text) for text in all_texts(path)] == [200_000, 1]


def test_what_a_folder_holds_is_read_or_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "a"
    write(folder / "deep" / "1.jsonl", lines(ROWS[:4]))
    write(folder / "2.jsonl.gz", gzip.compress(lines(ROWS[4:8]).encode()))
    write(folder / "3.txt", "a text")
    for name in ("4.jsonl.zst", "5.jsonl.zst", "6.csv", "7.json", "README", ".hidden/8.txt", ".9.txt"):
        write(folder / name, "left out")
    (folder / "10").symlink_to(tmp_path)
    (folder / "11.txt").symlink_to(tmp_path / "missing")
    with caplog.at_level(logging.WARNING):
        assert len(all_texts(folder)) == 9
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "3 file(s) are read; left out: " in warning
    for count in ("2 .zst", "2 hidden", "1 .csv", "1 .json", "1 linked folder", "1 broken link", "1 more"):
        assert count in warning
    assert "(.json and .csv are read where data.path names them)" in warning


def test_hidden_files_alone_are_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "rows.jsonl", lines(ROWS[:6]))
    write(tmp_path / ".ipynb_checkpoints" / "rows-checkpoint.jsonl", lines(ROWS[6:]))
    with caplog.at_level(logging.INFO):
        parts = read_answers(tmp_path, 0.3).parts
    assert sum(map(len, parts.values())) == 6
    assert [(r.levelname, "1 file(s) are read; left out: 1 hidden" in r.getMessage()) for r in caplog.records] == [
        ("INFO", True)
    ]


@pytest.mark.parametrize("pattern", ["", "/**/*", "/**/*.txt", "/*/*.txt"])
@pytest.mark.parametrize("read", [all_texts, lambda path: read_answers(path, 0.3)])
def test_a_folder_that_cannot_be_looked_into_is_refused(pattern: str, read: Any, tmp_path: Path, deny: Any) -> None:
    for index in range(20):
        write(tmp_path / "abc"[index % 3] / f"{index}.txt", f"text {index}")
    deny(tmp_path / "b")
    with pytest.raises(DataError, match=r"data\.path: .*/b cannot be read \(Permission denied\)"):
        read(f"{tmp_path}{pattern}")


def test_a_folder_beside_those_of_a_pattern_may_be_closed(tmp_path: Path, deny: Any) -> None:
    for name in ("a/1.txt", "a/2.txt", "b/3.txt"):
        write(tmp_path / name, name)
    deny(tmp_path / "b")
    assert all_texts(f"{tmp_path}/a/*.txt") == ["a/1.txt", "a/2.txt"]


@pytest.mark.parametrize("pattern", ["**/**/*.txt", "**/*.txt", "*/**/*.txt"])
def test_a_pattern_reads_each_file_once(pattern: str, tmp_path: Path) -> None:
    names = ["x/a.txt", "x/y/b.txt", "x/y/z/c.txt"]
    for name in names:
        write(tmp_path / name, name)
    assert all_texts(f"{tmp_path}/{pattern}") == names


def test_a_name_that_is_not_utf_8_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = os.fsencode(tmp_path)
    for name in (b"caf\xe9.txt", b"caf\xe9.jsonl", b"a.txt", b"b.\xe9"):
        Path(os.fsdecode(folder + b"/" + name)).write_text(json.dumps({"text": "row"}))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["row"]}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").rename(os.fsdecode(folder + b"/caf\xe9.parquet"))
    corpus = read_corpus(TextDataConfig(path=str(tmp_path)))
    ids = [name for part in corpus.part_names for name in corpus.document_ids(part)]
    assert sorted(ids) == ["a.txt", "caf\\xe9.jsonl#0", "caf\\xe9.parquet#0", "caf\\xe9.txt"]
    "\n".join([*ids, caplog.text]).encode()
    Path(os.fsdecode(folder + b"/caf\xe9.jsonl")).write_text("{")
    with pytest.raises(DataError, match=r"caf\\xe9\.jsonl, line 1 is not JSON"):
        read_corpus(TextDataConfig(path=str(tmp_path)))


@pytest.mark.parametrize("config", [TextDataConfig, ExampleFilesConfig])
def test_a_path_that_is_not_utf_8_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.path=caf\\xe9\.txt is not allowed: it is not UTF-8"):
        config(path=os.fsdecode(b"caf\xe9.txt"))


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "rows.jsonl", lines(ROWS))
    assert len(all_texts("~/rows.jsonl")) == len(all_texts("~/*.jsonl")) == 12
    assert answer_set(ExampleFilesConfig(path="~/rows.jsonl")).part("train")


# --- parts with files of their own -------------------------------------------------------------------------------


def split_files(folder: Path) -> None:
    for name, rows in {"train": ROWS[:8], "val": ROWS[8:10], "test": ROWS[10:]}.items():
        write(folder / f"{name}.jsonl", lines(rows))


def test_parts_come_from_the_files_that_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    split_files(tmp_path)
    own = {f"{part}_path": str(tmp_path / f"{part}.jsonl") for part in ("val", "test")}
    expected = {"train": ROWS[:8], "validation": ROWS[8:10], "test": ROWS[10:]}
    with caplog.at_level(logging.WARNING):
        texts = texts_of(tmp_path, **own)
        examples = answer_set(ExampleFilesConfig(path=str(tmp_path), **own))
    assert texts == {part: sorted(row["text"] for row in rows) for part, rows in expected.items()}
    assert list(texts) == list(examples.parts) == list(expected)
    for part, rows in expected.items():
        assert {example.group for example in examples.part(part)} == {row["prompt"] for row in rows}
    assert not caplog.records


def test_the_other_part_keeps_its_share(tmp_path: Path) -> None:
    split_files(tmp_path)
    (tmp_path / "test.jsonl").unlink()
    own = {"val_path": str(tmp_path / "val.jsonl"), "val_ratio": 0.9, "test_ratio": 0.05}
    sizes = {part: len(texts) for part, texts in texts_of(tmp_path, **own).items()}
    assert sizes == {"train": 7, "validation": 2, "test": 1}
    parts = answer_set(ExampleFilesConfig(path=str(tmp_path), **own)).parts  # type: ignore[arg-type]
    assert {part: len(examples) for part, examples in parts.items()} == sizes


def test_files_of_held_out_parts_enter_the_identity(tmp_path: Path) -> None:
    split_files(tmp_path)

    def fingerprints(**own: str) -> tuple[str, str]:
        path = str(tmp_path / "train.jsonl")
        return (
            read_corpus(TextDataConfig(path=path, **own)).fingerprint,  # type: ignore[arg-type]
            answer_set(ExampleFilesConfig(path=path, **own)).fingerprint,  # type: ignore[arg-type]
        )

    val, test = str(tmp_path / "val.jsonl"), str(tmp_path / "test.jsonl")
    found = [fingerprints(), fingerprints(val_path=val), fingerprints(val_path=test), fingerprints(test_path=test)]
    found.append(fingerprints(val_path=val, test_path=test))
    write(tmp_path / "val.jsonl", lines(ROWS[8:9]))
    found.append(fingerprints(val_path=val))
    for column in zip(*found, strict=True):
        assert len(set(column)) == len(found)


def test_one_file_in_two_parts_is_refused(tmp_path: Path) -> None:
    split_files(tmp_path)
    path, folder = str(tmp_path / "val.jsonl"), str(tmp_path)
    with pytest.raises(ConfigError, match="must differ"):
        TextDataConfig(path=folder, val_path=path, test_path=path)
    for config in (
        TextDataConfig(path=folder, val_path=path, test_path=f"{folder}/[v]*.jsonl"),
        TextDataConfig(path=f"{folder}/[v]*.jsonl", val_path=path),
    ):
        with pytest.raises(DataError, match=r"val\.jsonl is named by data\.val_path|1 of data\.val_path and data"):
            read_corpus(config)
    write(tmp_path / "empty.jsonl", "")
    with pytest.raises(DataError, match=r"data\.val_path=.*holds no text"):
        texts_of(path, val_path=str(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match=r"validation part of .* has no example"):
        read_answers(path, 0.3, val_path=str(tmp_path / "empty.jsonl"))


def test_names_of_held_out_parts_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    split_files(tmp_path)
    for read in (all_texts, lambda path: read_answers(path, 0.3)):
        caplog.clear()
        read(tmp_path)
        (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert "2 of 3 files are named like held-out parts (test.jsonl, ...)" in warning
        assert "data.val_path and data.test_path" in warning


@pytest.mark.parametrize(
    ("name", "is_warned"),
    [
        ("test.jsonl", True),
        ("dev.jsonl.gz", True),
        ("validation-00000-of-00002.parquet", True),
        ("gsm8k_test.jsonl", True),
        ("my.valid.txt", True),
        ("test/0.txt", True),
        ("Val/0.txt", True),
        ("train.jsonl", False),
        ("testament.txt", False),
        ("contest.txt", False),
        ("test_of_time.txt", False),
        ("test.py", False),
        ("tests/0.txt", False),
        ("a_developer.txt", False),
    ],
)
def test_which_names_are_those_of_held_out_parts(
    name: str, is_warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from kd.data.sources.files import _warn_of_split_names

    _warn_of_split_names([FoundFile("a.txt", tmp_path), FoundFile(name, tmp_path)], "folder")
    assert bool(caplog.records) == is_warned


def test_files_are_found_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "c.md"):
        write(tmp_path / name, name)
    found = [file.name for file in find_files(str(tmp_path), "data.path", SUFFIXES)]
    assert found == ["a/z.txt", "b.txt", "c.md"]
