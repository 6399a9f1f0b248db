"""Packed blocks: what a block holds, what survives an interruption, and what damage is noticed."""

import hashlib
import json
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import kd.data.packing
from kd.data import PackedBlocks, build_blocks, end_of_text_id, find_blocks, tokenizer_object_fingerprint
from kd.data.packing import StoreMeta
from kd.errors import DataError, IntegrityError

from .conftest import MakeCorpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Build = Callable[[dict[str, list[str]], int], Path]


@pytest.fixture(scope="module")
def build(byte_tokenizer: "PreTrainedTokenizerFast", make_corpus: MakeCorpus) -> Build:
    def build_from(parts: dict[str, list[str]], seq_len: int) -> Path:
        fingerprint = tokenizer_object_fingerprint(byte_tokenizer)
        return build_blocks(make_corpus(parts), byte_tokenizer, fingerprint, seq_len)

    return build_from


@pytest.fixture
def store(build: Build, tmp_path: Path) -> Path:
    """A copy, free to be damaged, of a store of blocks of 16 tokens."""
    texts = [f"document number {i} " * (i % 4 + 1) for i in range(30)]
    shutil.copytree(build({"train": texts, "validation": texts[:9]}, 16), tmp_path / "store")
    return tmp_path / "store"


def _row_of_tokens(texts: list[str], tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    row = []
    for text in texts:
        row += [*tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, end_of_text_id(tokenizer)]
    return row


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text("ab \n\u4e2d", min_size=1, max_size=40), min_size=1, max_size=12),
    seq_len=st.integers(1, 20),
    shard_bytes=st.integers(1, 100),
)
def test_every_token_but_the_first_is_a_target_exactly_once(
    texts: list[str], seq_len: int, shard_bytes: int, build: Build, byte_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    row = _row_of_tokens(texts, byte_tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kd.data.packing, "SHARD_BYTES", shard_bytes)
        patch.setattr(kd.data.packing, "_DIGEST_ROWS", 3)
        if len(row) < seq_len + 1:
            with pytest.raises(DataError, match=rf"has {len(row)} tokens .* needs {seq_len + 1}"):
                build({"train": texts}, seq_len)
            return
        blocks = PackedBlocks(build({"train": texts}, seq_len), "train")
    assert len(blocks) == (len(row) - 1) // seq_len
    labels = torch.cat([blocks[i]["labels"] for i in range(len(blocks))])
    inputs = torch.cat([blocks[i]["input_ids"] for i in range(len(blocks))])
    used = len(blocks) * seq_len
    assert labels.tolist() == row[1 : used + 1]
    assert inputs.tolist() == row[:used]
    assert blocks.num_tokens == used
    assert blocks.tokens_per_byte == pytest.approx(len(row) / len("".join(texts).encode()))
    owner = [number for number, text in enumerate(texts) for _ in range(len(text.encode()) + 1)]
    assert blocks.document_ids.tolist() == [owner[i * seq_len + 1] for i in range(len(blocks))]


def test_a_batch_is_its_blocks(store: Path) -> None:
    blocks = PackedBlocks(store, "train")
    batch = blocks[[5, 0, 7]]
    assert batch["block_id"].tolist() == [5, 0, 7]
    for name in ("input_ids", "labels", "block_id"):
        assert batch[name].dtype == torch.int64
        assert batch[name].is_contiguous()
        assert torch.equal(batch[name], torch.stack([blocks[i][name] for i in (5, 0, 7)]))
    assert blocks[3]["input_ids"].shape == (16,)
    assert blocks[3]["block_id"].shape == ()
    assert torch.equal(blocks[3]["input_ids"][1:], blocks[3]["labels"][:-1])
    assert blocks[3]["labels"][-1] == blocks[4]["input_ids"][0]


def test_a_plain_torch_loader_reads_blocks(store: Path) -> None:
    blocks = PackedBlocks(store, "validation")
    batch = next(iter(DataLoader(blocks, batch_size=2)))
    assert torch.equal(batch["labels"], blocks[[0, 1]]["labels"])
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_some_blocks_are_spread_over_the_part(store: Path) -> None:
    everything = PackedBlocks(store, "train")
    some = PackedBlocks(store, "train", max_blocks=7)
    gaps = np.diff(some.block_ids)
    assert len(some) == 7
    assert some.num_tokens == 7 * 16
    assert gaps.min() >= 1
    assert np.ptp(gaps) <= 1
    assert some.block_ids[0] == 0
    assert some.block_ids[-1] >= len(everything) * 6 // 7
    last = some[6]["block_id"].item()
    assert torch.equal(some[6]["labels"], everything[int(last)]["labels"])
    assert some.document_ids[6] == everything.document_ids[int(last)]
    assert len(PackedBlocks(store, "train", max_blocks=10**6)) == len(everything)


def test_digests_are_of_the_tokens_as_32_bit_numbers(store: Path) -> None:
    blocks = PackedBlocks(store, "train")
    tokens = torch.cat([blocks[2]["input_ids"], blocks[2]["labels"][-1:]]).numpy().astype("<u4")
    expected = hashlib.blake2b(tokens.tobytes(), digest_size=8).digest()
    assert np.load(store / "train.digests.npy")[2].tobytes() == expected


def test_a_large_vocabulary_takes_four_bytes() -> None:
    assert kd.data.packing.token_dtype(65536) == "<u2"
    assert kd.data.packing.token_dtype(65537) == "<u4"


def test_a_document_cannot_forge_its_end(build: Build, byte_tokenizer: "PreTrainedTokenizerFast") -> None:
    blocks = PackedBlocks(build({"train": ["one<|endoftext|>two", "three"]}, 24), "train")
    tokens = [*blocks[0]["input_ids"].tolist(), blocks[0]["labels"][-1].item()]
    assert tokens.count(0) == 1
    assert byte_tokenizer.decode(tokens[:19]) == "one<|endoftext|>two"


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_a_part_shorter_than_a_block_is_refused_and_leaves_nothing(part: str, build: Build, cache_folder: Path) -> None:
    parts = {"train": ["long enough"], "validation": ["long enough"], "test": ["long enough"]}
    parts[part] = ["short"]
    before = sorted((cache_folder / "blocks").glob("*[!k]"))
    with pytest.raises(DataError, match=rf"The {part} part .* 6 tokens in 1 document.*data\.seq_len=8 needs 9"):
        build(parts, 8)
    assert sorted((cache_folder / "blocks").glob("*[!k]")) == before


def test_an_interrupted_build_goes_on_with_its_shards(
    build: Build, byte_tokenizer: "PreTrainedTokenizerFast", monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"interrupted document {i}" for i in range(40)]
    written: list[str] = []
    write = kd.data.packing._write_shard

    def write_two(path: Path, batch: list[str], tokenizer: "PreTrainedTokenizerFast", dtype: str) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, batch, tokenizer, dtype)

    monkeypatch.setattr(kd.data.packing, "SHARD_BYTES", 200)
    monkeypatch.setattr(kd.data.packing, "_write_shard", write_two)
    with pytest.raises(KeyboardInterrupt):
        build({"train": texts}, 16)
    first = list(written)

    def write_counted(path: Path, batch: list[str], tokenizer: "PreTrainedTokenizerFast", dtype: str) -> None:
        written.append(path.name)
        write(path, batch, tokenizer, dtype)

    monkeypatch.setattr(kd.data.packing, "_write_shard", write_counted)
    directory = build({"train": texts}, 16)
    assert len(first) == 2
    assert len(written) > 3
    assert len(set(written)) == len(written)
    blocks = PackedBlocks(directory, "train")
    row = _row_of_tokens(texts, byte_tokenizer)
    assert blocks[list(range(len(blocks)))]["labels"].flatten().tolist() == row[1 : blocks.num_tokens + 1]
    assert not (directory / "shards").exists()


def test_another_tokenizer_corpus_or_length_is_another_store(
    build: Build, byte_tokenizer: "PreTrainedTokenizerFast", make_corpus: MakeCorpus
) -> None:
    parts = {"train": ["some text to pack"]}
    stores = {
        build(parts, 4),
        build(parts, 5),
        build({"train": ["some text to pack!"]}, 4),
        build_blocks(make_corpus(parts), byte_tokenizer, "another", 4),
    }
    assert len(stores) == 4
    assert build(parts, 4) in stores


def test_a_flipped_bit_is_noticed_when_its_block_is_first_read(store: Path) -> None:
    path = store / "train.bin"
    content = bytearray(path.read_bytes())
    content[(5 * 16 + 3) * 2] ^= 1
    path.write_bytes(content)
    blocks = PackedBlocks(store, "train")
    assert len(blocks[[3, 4, 6]]["labels"]) == 3
    with pytest.raises(IntegrityError, match=r"train\.bin .*block 5 "):
        blocks[5]
    with pytest.raises(IntegrityError, match=r"train\.bin .*block 5 "):
        blocks[[4, 5, 6]]


@pytest.mark.parametrize("name", ["train.bin", "validation.documents.npy", "train.digests.npy"])
def test_a_truncated_or_missing_file_is_noticed_at_opening(name: str, store: Path) -> None:
    path = store / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=name):
        PackedBlocks(store, "train")
    path.unlink()
    with pytest.raises(IntegrityError, match=name):
        PackedBlocks(store, "train")


def test_a_part_that_is_not_there_is_refused(store: Path) -> None:
    with pytest.raises(DataError, match=r"no part 'test', only train, validation.*data\.test_ratio"):
        PackedBlocks(store, "test")


def test_opening_reads_no_tokens(build: Build) -> None:
    directory = build({"train": ["0123456789" * 1000] * 200}, 64)
    start = time.perf_counter()
    blocks = PackedBlocks(directory, "train")
    blocks[0]
    assert time.perf_counter() - start < 0.5
    assert len(blocks) == json.loads((directory / "meta.json").read_text())["parts"]["train"]["blocks"] > 30_000


def test_a_copy_for_another_process_does_not_carry_the_tokens(build: Build) -> None:
    blocks = PackedBlocks(build({"train": ["0123456789" * 1000] * 10}, 128), "train", max_blocks=20)
    pickled = pickle.dumps(blocks)
    assert len(pickled) < 50_000 < (blocks.directory / "train.bin").stat().st_size
    assert torch.equal(pickle.loads(pickled)[[0, 9]]["labels"], blocks[[0, 9]]["labels"])


def test_packed_blocks_are_found_without_a_tokenizer(
    make_corpus: MakeCorpus, byte_tokenizer: "PreTrainedTokenizerFast", monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "empty"))
    corpus = make_corpus({"train": ["some text " * 9], "validation": ["other text " * 9]})
    assert find_blocks(corpus, "bytes", 16) is None
    assert not (tmp_path / "empty").exists()
    directory = build_blocks(corpus, byte_tokenizer, "bytes", 16)
    assert find_blocks(corpus, "bytes", 16) == directory
    assert find_blocks(corpus, "bytes", 17) is None
    assert find_blocks(corpus, "others", 16) is None


def test_unknown_tokens_and_spelled_special_ones_are_counted(
    make_corpus: MakeCorpus, word_tokenizer: "PreTrainedTokenizerFast", caplog: pytest.LogCaptureFixture
) -> None:
    corpus = make_corpus({"train": ["one x y z", "one one <end>"], "validation": ["one one one", "one"]})
    directory = build_blocks(corpus, word_tokenizer, "words", 2)
    for _ in range(2):  # also of a store that is there already
        caplog.clear()
        PackedBlocks(directory, "train")
        unknown, spelled = (record.getMessage() for record in caplog.records)
        assert unknown.startswith("Train: 54.5 % of the tokens are the tokenizer's unknown one")
        assert spelled.startswith("Train: 1 of 2 documents spell a special token")
        caplog.clear()
        PackedBlocks(directory, "validation")
        assert not caplog.records


def test_a_store_of_before_these_were_counted_is_read(
    make_corpus: MakeCorpus, byte_tokenizer: "PreTrainedTokenizerFast", tmp_path: Path
) -> None:
    directory = build_blocks(make_corpus({"train": ["abc"], "validation": ["def"]}), byte_tokenizer, "bytes", 2)
    meta = json.loads((directory / "meta.json").read_text())
    for part in meta["parts"].values():
        del part["unknown"], part["spelled"]
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert StoreMeta.read(tmp_path).parts["train"].unknown is None
    assert StoreMeta.read(tmp_path).parts["train"].warnings() == []


def test_each_part_holds_its_own_text(make_corpus: MakeCorpus, byte_tokenizer: "PreTrainedTokenizerFast") -> None:
    texts = {"train": "a" * 40, "validation": "b" * 40, "test": "c" * 40}
    directory = build_blocks(make_corpus({part: [text] for part, text in texts.items()}), byte_tokenizer, "bytes", 8)
    for part, text in texts.items():
        blocks = PackedBlocks(directory, part)
        assert byte_tokenizer.decode(blocks[0]["input_ids"].tolist()) == text[:8]
