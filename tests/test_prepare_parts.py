"""From a plan to loaders: each part is made of its own files, and what is odd about them is said."""

import json
import logging
from pathlib import Path

import pytest

from kd.config import (
    Config,
    ExampleFilesConfig,
    ModelConfig,
    PretrainConfig,
    SFTConfig,
    TeacherConfig,
    TextDataConfig,
)
from kd.data import ExampleSet, PositionedLoader, answer_set
from kd.data.tokenizers import train_bpe
from kd.plan import make_plan
from kd.prepare import Loader, build_parts
from kd.prepare_examples import open_example_loaders
from kd.stop import StopSignal

MODEL = ModelConfig(16, 1, 2, 1, intermediate_size=16, vocab_size=257, max_seq_len=32)
LETTERS = {"train": "a", "val": "b", "test": "c"}


def paths(folder: Path, suffix: str) -> dict[str, str]:
    """The paths of a folder's files of each part, by key."""
    keys = {"train": "path", "val": "val_path", "test": "test_path"}
    return {key: str(folder / f"{part}{suffix}") for part, key in keys.items()}


def letters_of(loader: Loader | None, key: str) -> set[str]:
    """Return what the texts of a loader's batches are made of."""
    assert isinstance(loader, PositionedLoader)
    tokenizer = train_bpe(["any text"], 257)
    loader.set_position(0)
    texts = [str(tokenizer.decode(row)) for batch in loader for row in batch[key].tolist()]
    return {letter for text in texts for letter in text if letter in "abc"}


@pytest.mark.parametrize("with_files", [True, False])
def test_each_loader_holds_the_text_of_its_part(with_files: bool, tmp_path: Path) -> None:
    for part, letter in LETTERS.items():
        (tmp_path / f"{part}.txt").write_text(letter * 100)
    if with_files:
        data = TextDataConfig(**paths(tmp_path, ".txt"), tokenizer="bpe", seq_len=8)  # type: ignore[arg-type]
    else:
        data = TextDataConfig(path=str(tmp_path), test_ratio=0.1, tokenizer="bpe", seq_len=8)
    train = PretrainConfig(batch_size=2, max_steps=1)
    parts = build_parts(make_plan(Config(MODEL, train, data, TeacherConfig(), device="cpu")), StopSignal())
    found = [letters_of(loader, "input_ids") for loader in (parts.train_loader, parts.val_loader, parts.test_loader)]
    assert sorted(map(sorted, found)) == [["a"], ["b"], ["c"]]
    if with_files:
        assert found == [{"a"}, {"b"}, {"c"}]


def example_config(folder: Path) -> tuple[Config, ExampleSet]:  # type: ignore[type-arg]
    data = ExampleFilesConfig(**paths(folder, ".jsonl"), tokenizer="given")  # type: ignore[arg-type]
    config = Config(MODEL, SFTConfig(batch_size=2, max_steps=1), data, TeacherConfig())
    return config, answer_set(data)


def test_each_loader_holds_the_examples_of_its_part(tmp_path: Path) -> None:
    for part, letter in LETTERS.items():
        rows = [{"prompt": letter * (n + 1), "response": letter} for n in range(4)]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaders = open_example_loaders(*example_config(tmp_path), train_bpe(["any text"], 257))
    assert [letters_of(loader, "input_ids") for loader in loaders] == [{"a"}, {"b"}, {"c"}]


def test_what_is_odd_about_examples_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for part in LETTERS:
        rows = [{"prompt": f"{part}{n}", "response": "<|endoftext|>" if n else ""} for n in range(4)]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level(logging.INFO):
        open_example_loaders(*example_config(tmp_path), train_bpe(["any text"], 257))
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert ("INFO", "Train: 3 of 4 examples are used; left out: 1 without an answer") in lines
    warnings = [line for level, line in lines if level == "WARNING"]
    assert [line.split(" of 4 examples spell a special token")[0] for line in warnings] == [
        "Train: 3",
        "Validation: 3",
        "Test: 3",
    ]
