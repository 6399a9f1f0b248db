"""Corpora, tokenizers, packed blocks and their loaders.

Names are imported at their first use, so that reading a corpus does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kd.data.blocks import PackedBlocks, build_blocks, find_blocks
    from kd.data.corpora import Corpus, read_corpus
    from kd.data.loaders import BlockLoader, eval_loader, train_loader
    from kd.data.tokenizers import (
        bpe_fingerprint,
        bpe_tokenizer_directory,
        directory_tokenizer_fingerprint,
        end_of_text_id,
        load_tokenizer,
        num_token_ids,
        tokenizer_object_fingerprint,
        train_bpe,
        vocabulary_difference,
    )
    from kd.data.wiki import WikiDataset

_MODULES = {
    "BlockLoader": "loaders",
    "Corpus": "corpora",
    "PackedBlocks": "blocks",
    "WikiDataset": "wiki",
    "bpe_fingerprint": "tokenizers",
    "bpe_tokenizer_directory": "tokenizers",
    "build_blocks": "blocks",
    "directory_tokenizer_fingerprint": "tokenizers",
    "end_of_text_id": "tokenizers",
    "eval_loader": "loaders",
    "find_blocks": "blocks",
    "load_tokenizer": "tokenizers",
    "num_token_ids": "tokenizers",
    "read_corpus": "corpora",
    "tokenizer_object_fingerprint": "tokenizers",
    "train_bpe": "tokenizers",
    "train_loader": "loaders",
    "vocabulary_difference": "tokenizers",
}

__all__ = [
    "BlockLoader",
    "Corpus",
    "PackedBlocks",
    "WikiDataset",
    "bpe_fingerprint",
    "bpe_tokenizer_directory",
    "build_blocks",
    "directory_tokenizer_fingerprint",
    "end_of_text_id",
    "eval_loader",
    "find_blocks",
    "load_tokenizer",
    "num_token_ids",
    "read_corpus",
    "tokenizer_object_fingerprint",
    "train_bpe",
    "train_loader",
    "vocabulary_difference",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
