"""A cache folder of its own, and a tokenizer whose tokens are the bytes."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow
import pyarrow.parquet
import pytest

from kd.data.corpora import Corpus
from kd.data.sources.base import Documents, describe_document
from kd.data.tokenizers import train_bpe
from kd.files import digest_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HUB_CONFIGURATIONS = ("20231101.zh", "20231101.xx")
MakeCorpus = Callable[[dict[str, list[str]]], Corpus]


@pytest.fixture(autouse=True, scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KD_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def byte_tokenizer() -> "PreTrainedTokenizerFast":
    return train_bpe(["any text"], 257)


@pytest.fixture(scope="session")
def word_tokenizer() -> "PreTrainedTokenizerFast":
    """A tokenizer that knows the word "one" alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<end>": 0, "<unk>": 1, "one": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unk>")


@pytest.fixture(scope="session")
def make_corpus() -> MakeCorpus:
    """Return a function that makes a corpus of given texts by part."""

    def make(parts: dict[str, list[str]]) -> Corpus:
        texts = [text for part in parts.values() for text in part]
        documents = [describe_document(str(i), str(i), text) for i, text in enumerate(texts)]
        positions: dict[str, Sequence[int]] = {}
        start = 0
        for name, members in parts.items():
            positions[name] = range(start, start + len(members))
            start += len(members)
        source = Documents("a made corpus", documents, lambda chosen: (texts[i] for i in chosen))
        return Corpus(source, positions, digest_of(parts))

    return make


@pytest.fixture(scope="session")
def hub_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A local directory in the Hub's format with the columns of the Wikipedia data set, in two configurations."""
    import datasets.config

    folder = tmp_path_factory.mktemp("hub") / "wikipedia"
    for name in HUB_CONFIGURATIONS:
        (folder / name).mkdir(parents=True)
        numbers = range(40)
        columns = {
            "id": [str(i) for i in numbers],
            "url": [f"https://example.org/{i}" for i in numbers],
            "title": [f"title {i}" for i in numbers],
            "text": [f"{name} \u6587\u7ae0 {i} " * 20 for i in numbers],
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / name / "train-00000-of-00001.parquet")
    entries = [
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
        for name in HUB_CONFIGURATIONS
    ]
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(entries) + "---\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield folder
