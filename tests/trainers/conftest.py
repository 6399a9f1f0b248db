"""A packed corpus small enough to train on in a moment."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kd.data.blocks import build_blocks
from kd.data.corpora import TRAIN, VALIDATION, Corpus
from kd.data.sources.base import Documents, describe_document
from kd.data.tokenizers import train_bpe

from .helpers import LENGTH, TRAINERS, MakeTrainer

TRAIN_BLOCKS = 22
VAL_BLOCKS = 5


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


@pytest.fixture(params=list(TRAINERS.values()), ids=list(TRAINERS))
def make_trainer(request: pytest.FixtureRequest) -> MakeTrainer:
    make: MakeTrainer = request.param
    return make
