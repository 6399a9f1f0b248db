"""Corpora: sources, the draw, the split, and identity by content."""

import gzip
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.config import CorpusConfig, HubDataConfig, StdlibDataConfig, TextDataConfig
from kd.data.corpora import Corpus, read_corpus, split_groups
from kd.errors import ConfigError, DataError


def _text_config(path: Path | str, **changes: str | float | int | None) -> TextDataConfig:
    values = {"sample_size": None, **changes}
    return TextDataConfig(path=str(path), **values)  # type: ignore[arg-type]


def _write_folder(folder: Path, count: int = 30) -> Path:
    (folder / "deep").mkdir(parents=True)
    for index in range(count):
        name = f"deep/{index}.md" if index % 3 else f"{index}.txt"
        (folder / name).write_text(f"document {index} " * (5 + index % 7))
    return folder


def _all_texts(corpus: Corpus) -> dict[str, list[str]]:
    return {part: list(corpus.texts(part)) for part in corpus.part_names}


def test_the_embedded_corpus_has_the_promised_shape() -> None:
    corpus = read_corpus(StdlibDataConfig(sample_size=None, test_ratio=0.1))
    sizes = {part: corpus.num_bytes(part) for part in corpus.part_names}
    total = sum(sizes.values())
    assert total > 5_000_000
    assert sizes["validation"] / total == pytest.approx(0.1, abs=0.01)
    assert sizes["test"] / total == pytest.approx(0.1, abs=0.01)
    groups = {part: {name.split("/")[0] for name in corpus.document_ids(part)} for part in corpus.part_names}
    assert not groups["train"] & groups["validation"]
    assert not groups["test"] & (groups["train"] | groups["validation"])
    names = [name for part in corpus.part_names for name in corpus.document_ids(part)]
    assert "argparse.py" in names
    assert not [name for name in names if {"test", "site-packages", "encodings", "tkinter"} & set(name.split("/"))]
    assert not [name for name in names if name.startswith("_sysconfigdata")]


def test_reading_a_corpus_does_not_import_torch() -> None:
    script = (
        "import sys; from kd.data import read_corpus; from kd.config import StdlibDataConfig\n"
        "read_corpus(StdlibDataConfig(sample_size=300_000))\n"
        "print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "set()"


def test_every_document_is_in_exactly_one_part(tmp_path: Path) -> None:
    corpus = read_corpus(_text_config(_write_folder(tmp_path / "texts"), test_ratio=0.2))
    ids = [name for part in corpus.part_names for name in corpus.document_ids(part)]
    assert corpus.part_names == ("train", "validation", "test")
    assert sorted(ids) == sorted(set(ids))
    assert len(ids) == 30
    assert "deep/1.md" in ids
    assert "0.txt" in ids
    for part, texts in _all_texts(corpus).items():
        assert len(texts) == corpus.num_documents(part) > 0
        assert sum(len(text.encode()) for text in texts) == corpus.num_bytes(part)
        for name, text in zip(corpus.document_ids(part), texts, strict=True):
            assert text == (tmp_path / "texts" / name).read_text()


def test_identity_is_by_content(tmp_path: Path) -> None:
    folder = _write_folder(tmp_path / "a")
    before = read_corpus(_text_config(folder))
    again = read_corpus(_text_config(folder))
    shutil.copytree(folder, tmp_path / "elsewhere" / "b")
    moved = read_corpus(_text_config(tmp_path / "elsewhere" / "b"))
    by_pattern = read_corpus(_text_config(f"{folder}/**/*"))
    assert before.fingerprint == again.fingerprint == moved.fingerprint == by_pattern.fingerprint
    assert _all_texts(before) == _all_texts(moved)
    text = (folder / "0.txt").read_text()
    (folder / "0.txt").write_text("D" + text[1:])
    assert read_corpus(_text_config(folder)).fingerprint != before.fingerprint


def test_the_split_enters_the_identity(tmp_path: Path) -> None:
    folder = _write_folder(tmp_path / "a")
    prints = {read_corpus(_text_config(folder, val_ratio=ratio)).fingerprint for ratio in (0.1, 0.3)}
    assert len(prints) == 2


def test_a_sample_is_the_head_of_the_whole_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i} " * (i % 5 + 1)}) + "\n" for i in range(300)))
    whole = read_corpus(_text_config(path))
    sample = read_corpus(_text_config(path, sample_size=1500))
    total = sum(sample.num_bytes(part) for part in sample.part_names)
    largest = max(document.num_bytes for document in whole.source.documents)
    assert 1500 <= total < 1500 + largest
    kept = [document.id for document in sample.source.documents]
    everything = [document.id for document in whole.source.documents]
    assert kept == everything[: len(kept)]
    assert everything != sorted(everything)


def test_jsonl_parquet_and_text_with_a_separator_give_the_same_documents(tmp_path: Path) -> None:
    texts = [f"text number {i}\nwith two lines and \u4e2d\u6587" for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n\n" for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(20)), "body": texts}), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("<|cut|>".join(texts))
    configs = [
        _text_config(tmp_path / "a.jsonl", text_column="body"),
        _text_config(tmp_path / "a.parquet", text_column="body"),
        _text_config(tmp_path / "a.txt", document_separator="<|cut|>"),
    ]
    corpora = [read_corpus(config) for config in configs]
    assert len({corpus.fingerprint for corpus in corpora}) == 1
    assert sorted(text for part in _all_texts(corpora[0]).values() for text in part) == sorted(texts)


def test_blank_documents_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    folder = _write_folder(tmp_path / "a", count=6)
    before = read_corpus(_text_config(folder)).fingerprint
    (folder / "blank.txt").write_text(" \n\t")
    (folder / ".git").mkdir()
    (folder / ".git" / "notes.txt").write_text("hidden")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    assert read_corpus(_text_config(folder)).fingerprint == before


@pytest.mark.parametrize(
    ("separator", "text", "documents"),
    [
        (r"\n\n", "a\nb\n\nc\n\nd", ["a\nb", "c", "d"]),
        ("\n\n", "a\r\nb\r\n\r\nc\r\n\r\nd", ["a\r\nb", "c", "d"]),
        (r"\r\n\r\n", "a\nb\n\nc\n\nd", ["a\nb", "c", "d"]),
        (r"\n---\n", "a\r\n---\r\nb\n---\nc", ["a", "b", "c"]),
        (r"\t", "a\tb\\tc", ["a", "b\\tc"]),
        (r"\\t", "a\tb\\tc", ["a\tb", "c"]),
        (r"\q.", r"a\q.b\qc", ["a", r"b\qc"]),
    ],
)
def test_a_separator_may_be_escaped_and_cuts_at_any_line_end(
    separator: str, text: str, documents: list[str], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode())
    corpus = read_corpus(_text_config(tmp_path / "a.txt", document_separator=separator))
    assert sorted(text for part in _all_texts(corpus).values() for text in part) == documents


def test_a_text_of_one_document_is_told_how_to_cut_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo\r\n\r\nthree")
    with pytest.raises(DataError) as caught:
        read_corpus(_text_config(tmp_path / "a.txt", test_ratio=0.1))
    (advice,) = re.findall(r"'data.document_separator=\"(.*?)\"'", str(caught.value))
    assert "data.test_ratio=0" in str(caught.value)
    corpus = read_corpus(_text_config(tmp_path / "a.txt", document_separator=advice, test_ratio=0.1))
    assert [corpus.num_documents(part) for part in corpus.part_names] == [1, 1, 1]


def test_what_the_sample_leaves_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": f"row {index:04}" if index % 10 else " "} for index in range(2000)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level(logging.INFO):
        read_corpus(_text_config(path, sample_size=8000))
    blank, taken = (record.getMessage() for record in caplog.records)
    assert blank == f"data.path={path}: 200 of 2,000 documents are blank and left out"
    assert "1,000 of 2,000 documents are used" in taken
    assert "data.sample_size=8000" in taken
    caplog.clear()
    with caplog.at_level(logging.INFO):
        read_corpus(_text_config(path))
    assert [record.getMessage() for record in caplog.records] == [blank]


def test_held_out_documents_that_are_trained_on_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for index in range(40):
        (tmp_path / f"{index}.txt").write_text(f"the same text {index % 2}")
    read_corpus(_text_config(tmp_path, val_ratio=0.25))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "10 of 10 validation documents also stand in the training part" in warning


def test_a_line_that_any_corpus_repeats_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    read_corpus(StdlibDataConfig(sample_size=None, test_ratio=0.1))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


BAD_FILES = {
    "not utf-8": ("a.txt", b"good \xff bad", r"a\.txt is not UTF-8 at byte 5"),
    "broken line": ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON"),
    "deep line": ("a.jsonl", b'{"text": "x"}\n' + b"[" * 100_000, r"a\.jsonl, line 2 is not JSON"),
    "no object": ("a.jsonl", b'["x"]\n', r"line 1 is a list, not a JSON object"),
    "no column": ("a.jsonl", b'{"body": "x", "id": 3}\n', r"data\.text_column=text is not in .*body, id"),
    "number": ("a.jsonl", b'{"text": 3}\n', r"data\.text_column=text holds a int in .*line 1"),
    "half a surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1 is not valid Unicode"),
    "not parquet": ("a.parquet", b"PAR1 no", r"a\.parquet cannot be read as Parquet"),
    "other type": ("a.zst", b"text", r"data\.path=.*a\.zst is a \.zst.*\.jsonl"),
    "short csv line": ("a.csv", b"text,id\nx,1\ny\n", r"a\.csv, line 3 has 1 fields, and the header 2"),
    "open csv quote": ("a.csv", b'text\n"x\n', r"a\.csv cannot be read as CSV"),
    "csv not utf-8": ("a.csv", b"text\n\xff\n", r"a\.csv cannot be read as CSV"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n')[:-9], r"a\.jsonl\.gz cannot be read"),
    "no gzip": ("a.jsonl.gz", b'{"text": "x"}\n', r"a\.jsonl\.gz cannot be read"),
    "pretty json": ("a.json", b'{\n "text": "x"\n}', r"a\.json, line 1 is not JSON"),
    "list of texts": ("a.json", b'["x"]', r"a\.json, row 1 is a str, not a JSON object"),
    "empty": ("a.txt", b" \n", r"holds no text"),
    "one document": ("a.txt", b"all there is", r"1 separate document.*data\.document_separator"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_by_name(case: str, tmp_path: Path) -> None:
    name, content, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_corpus(_text_config(tmp_path / name))
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)


def test_parquet_without_the_column_says_which_there_are(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"data\.text_column=text is not in .*id, body"):
        read_corpus(_text_config(tmp_path / "a.parquet"))


@pytest.mark.parametrize("name", ["missing", "missing/*.txt", "."])
def test_a_path_without_files_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.path="):
        read_corpus(_text_config(tmp_path / name))


def test_a_configuration_without_a_corpus_is_refused() -> None:
    with pytest.raises(ConfigError, match="names no corpus"):
        read_corpus(CorpusConfig())


@given(
    sizes=st.dictionaries(st.text(min_size=1, max_size=5), st.integers(1, 1000), min_size=3, max_size=40),
    val=st.floats(0.01, 0.6),
    test=st.floats(0.01, 0.35),
)
def test_any_split_is_complete_and_keeps_to_its_shares(sizes: dict[str, int], val: float, test: float) -> None:
    part_of = split_groups(sizes, {"validation": val, "test": test}, "a corpus")
    assert part_of.keys() == sizes.keys()
    assert set(part_of.values()) == {"train", "validation", "test"}
    assert part_of == split_groups(dict(reversed(sizes.items())), {"validation": val, "test": test}, "a corpus")
    for part, ratio in (("validation", val), ("test", test)):
        members = [sizes[group] for group in sizes if part_of[group] == part]
        assert len(members) == 1 or sum(members) <= ratio * sum(sizes.values())


def test_rows_of_a_hub_data_set(hub_directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kd")
    corpus = read_corpus(HubDataConfig(path=str(hub_directory), name="20231101.zh", sample_size=None))
    texts = _all_texts(corpus)
    everything = texts["train"] + texts["validation"]
    assert sorted(everything) == sorted(f"20231101.zh \u6587\u7ae0 {i} " * 20 for i in range(40))
    assert corpus.num_documents("validation") >= 2
    for part in corpus.part_names:
        numbers = [int(text.split()[2]) for text in texts[part]]
        assert [str(number) for number in numbers] == corpus.document_ids(part)
    again = read_corpus(HubDataConfig(path=str(hub_directory), name="20231101.zh", sample_size=None))
    assert again.fingerprint == corpus.fingerprint
    sample = read_corpus(HubDataConfig(path=str(hub_directory), name="20231101.zh", sample_size=2000))
    total = sum(sample.num_bytes(part) for part in sample.part_names)
    assert 2000 <= total < 2000 + max(document.num_bytes for document in corpus.source.documents)
    taken = len(sample.source.documents)
    assert f"{taken} of 40 documents are used" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "20231101.de"}, r"data\.name=20231101\.de .*20231101\.zh"),
        ({"split": "dev"}, r"data\.split=dev .*train"),
        ({"text_column": "body"}, r"data\.text_column=body is not in .*id, url, title, text"),
    ],
)
def test_what_a_hub_data_set_lacks_is_named(changes: dict[str, str], message: str, hub_directory: Path) -> None:
    values = {"path": str(hub_directory), "name": "20231101.zh", **changes}
    with pytest.raises(DataError, match=message):
        read_corpus(HubDataConfig(**values))  # type: ignore[arg-type]


def test_a_hub_data_set_out_of_reach_says_how_to_fetch_it(tmp_path: Path) -> None:
    script = (
        "from kd.data import read_corpus; from kd.config import HubDataConfig; from kd.errors import DataError\n"
        "try: read_corpus(HubDataConfig(path='wikimedia/wikipedia', name='20231101.zh'))\n"
        "except DataError as error: print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    environment["HF_HOME"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True, timeout=60
    )
    assert "data.path=wikimedia/wikipedia data.name=20231101.zh" in done.stdout
    command = "from datasets import load_dataset; load_dataset('wikimedia/wikipedia', '20231101.zh')"
    assert f'python -c "{command}"' in done.stdout
    assert len(done.stdout.splitlines()) == 1
