"""Every test works alone: its own folder and cache, no network, one thread."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kd.data.blocks import build_blocks
from kd.data.corpora import TRAIN, VALIDATION, Corpus
from kd.data.sources.base import Documents, describe_document
from kd.data.tokenizers import train_bpe

from .trainers.helpers import LENGTH

TRAIN_BLOCKS = 22
VAL_BLOCKS = 5


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store of 22 training and 5 validation blocks of bytes."""
    texts = [
        "".join(chr(97 + (i * i + i // 7) % 26) for i in range(blocks * LENGTH))
        for blocks in (TRAIN_BLOCKS, VAL_BLOCKS)
    ]
    documents = [describe_document(str(i), str(i), text) for i, text in enumerate(texts)]
    source = Documents("a made corpus", documents, lambda chosen: (texts[i] for i in chosen))
    corpus = Corpus(source, {TRAIN: range(1), VALIDATION: range(1, 2)}, "made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield build_blocks(corpus, train_bpe(["any text"], 257), "bytes", LENGTH)
