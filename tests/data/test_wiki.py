"""WikiDataset on a local directory in the Hub's format."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kd.data import WikiDataset
from kd.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def test_the_parts_hold_different_articles(hub_directory: Path, byte_tokenizer: "PreTrainedTokenizerFast") -> None:
    parts = {
        split: WikiDataset(split, byte_tokenizer, seq_len=32, path=str(hub_directory), test_ratio=0.2)
        for split in ("train", "validation", "test")
    }
    seen: dict[str, set[str]] = {}
    for split, blocks in parts.items():
        everything = blocks[list(range(len(blocks)))]
        assert everything["input_ids"].shape == (len(blocks), 32)
        text = str(byte_tokenizer.decode(everything["input_ids"].flatten().tolist()))
        seen[split] = set(re.findall("\u6587\u7ae0 (\\d+) ", text))
    assert parts["train"].num_tokens > 2 * parts["validation"].num_tokens
    assert parts["train"].directory == parts["validation"].directory
    assert "20231101.zh" in byte_tokenizer.decode(parts["train"][0]["input_ids"])
    assert not seen["train"] & seen["validation"]
    assert not seen["test"] & (seen["train"] | seen["validation"])


def test_an_unknown_part_is_refused(byte_tokenizer: "PreTrainedTokenizerFast") -> None:
    with pytest.raises(ConfigError, match="split=dev is not one of train, validation"):
        WikiDataset("dev", byte_tokenizer)
    with pytest.raises(ConfigError, match="test_ratio above 0"):
        WikiDataset("test", byte_tokenizer)
