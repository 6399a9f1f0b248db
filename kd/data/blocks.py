"""Packed blocks: a corpus as one long row of token ids on disk, cut into blocks of equal length.

With L = seq_len, block i has the inputs tokens[i*L : (i+1)*L] and the labels tokens[i*L+1 : (i+1)*L+1]: neighbours
share one token, and every token but the first (and a rest shorter than a block) is a target exactly once.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kd.cache import cache_root, cached_directory, is_cached
from kd.data.corpora import Corpus
from kd.data.packing import StoreMeta, Tokens, block_digests, block_windows, pack_corpus
from kd.errors import DataError, IntegrityError
from kd.files import check_directory, digest_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("kd")

_FORMAT = 1
_KIND = "blocks"


def build_blocks(
    corpus: Corpus, tokenizer: "PreTrainedTokenizerFast", tokenizer_fingerprint: str, seq_len: int
) -> Path:
    """Return the cached directory of a corpus's packed blocks, tokenizing it at the first call.

    Args:
        corpus: What to pack.
        tokenizer: Encodes the documents; its end-of-text token follows each of them.
        tokenizer_fingerprint: Identifies the tokenizer by content.
        seq_len: Inputs (and targets) per block, in tokens.

    Raises:
        DataError: if a part is shorter than one block, or the tokenizer has no end-of-text token.
    """
    description = f"the blocks of {seq_len} tokens of {corpus.description}"

    def build(work: Path) -> None:
        pack_corpus(work, corpus, tokenizer, seq_len)

    return cached_directory(_KIND, _key(corpus, tokenizer_fingerprint, seq_len), build, description)


def find_blocks(corpus: Corpus, tokenizer_fingerprint: str, seq_len: int) -> Path | None:
    """Return the directory that `build_blocks` would, if it is there already; no tokenizer is needed for that."""
    key = _key(corpus, tokenizer_fingerprint, seq_len)
    return cache_root() / _KIND / key if is_cached(_KIND, key) else None


def _key(corpus: Corpus, tokenizer_fingerprint: str, seq_len: int) -> str:
    content = {"corpus": corpus.fingerprint, "tokenizer": tokenizer_fingerprint, "seq_len": seq_len}
    return digest_of({"format": _FORMAT, **content})


class PackedBlocks(Dataset[dict[str, Tensor]]):
    """The blocks of one part of a packed corpus.

    `blocks[i]` is `{"input_ids": (L,), "labels": (L,), "block_id": ()}`, all int64; labels are next-token targets, and
    the id is unique in the whole store, over all parts.
    `blocks[[i, j, ...]]` is the batch of these, `(B, L)` and `(B,)`, gathered in one step.
    """

    def __init__(self, directory: Path, part: str, max_blocks: int | None = None) -> None:
        """Open a store; its files are mapped into memory, not read.

        Args:
            directory: From `build_blocks`.
            part: `train`, `validation` or `test`.
            max_blocks: Take this many blocks, spread evenly over the part; None, or more than there are: all.

        Raises:
            IntegrityError: if a file is missing or has another size than when it was written.
            DataError: if there is no such part.
        """
        check_directory(directory)
        meta = StoreMeta.read(directory)
        if part not in meta.parts:
            raise DataError(
                f"{directory} has no part {part!r}, only {', '.join(meta.parts)}. A test part needs data.test_ratio "
                "above 0, or data.test_path."
            )
        self.directory = directory
        self.part = part
        self.seq_len = meta.seq_len
        self.vocab_size = meta.vocab_size
        counts = meta.parts[part]
        for warning in counts.warnings():
            log.warning("%s: %s", part.capitalize(), warning)
        self.tokens_per_byte = counts.tokens / counts.bytes
        """Tokens per byte of text, of the whole part."""
        earlier = list(meta.parts)[: list(meta.parts).index(part)]
        self._positions = _spread(counts.blocks, max_blocks)
        self._first_id = sum(meta.parts[name].blocks for name in earlier)
        self.document_ids: npt.NDArray[np.int64] = np.load(directory / f"{part}.documents.npy")[self._positions]
        """Index, within the part, of the document that holds a selected block's first target, (len,) int64."""
        self._digests: npt.NDArray[np.uint64] = np.load(directory / f"{part}.digests.npy")
        self._is_checked = np.zeros(counts.blocks, dtype=np.bool_)
        self._dtype = meta.dtype
        self._windows = self._map_windows()

    @property
    def block_ids(self) -> npt.NDArray[np.int64]:
        """Ids of the selected blocks, (len,), ascending."""
        return self._first_id + self._positions

    @property
    def num_tokens(self) -> int:
        """Targets in the selected blocks."""
        return len(self) * self.seq_len

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int | Sequence[int]) -> dict[str, Tensor]:
        """Return one block, or a batch of blocks.

        Raises:
            IntegrityError: naming the file and the block, if its content is not what was written.
            IndexError: if there is no such block.
        """
        positions = self._positions[index]
        windows = self._windows[positions]
        if not self._is_checked[positions].all():
            self._check(np.atleast_1d(positions), np.atleast_2d(windows))
        tokens = torch.from_numpy(windows.astype(np.int64))
        return {
            "input_ids": tokens[..., :-1].contiguous(),
            "labels": tokens[..., 1:].contiguous(),
            "block_id": torch.as_tensor(self._first_id + positions),
        }

    def _check(self, positions: npt.NDArray[np.int64], windows: Tokens) -> None:
        """Compare blocks with their digests; each is checked at its first reading only."""
        wrong = positions[block_digests(windows) != self._digests[positions]]
        if len(wrong):
            raise IntegrityError(
                f"{self.directory / self.part}.bin is not what was written: block {wrong[0]} differs from its digest. "
                f"Remove {self.directory} to have it made again."
            )
        self._is_checked[positions] = True

    def _map_windows(self) -> Tokens:
        tokens = np.memmap(self.directory / f"{self.part}.bin", dtype=self._dtype, mode="r")
        # A plain array over the same pages: indexing a memmap costs several times as much.
        return block_windows(np.asarray(tokens), self.seq_len)

    def __getstate__(self) -> dict[str, Any]:
        # The map would travel to a loading process as a copy of the whole file.
        return {name: value for name, value in self.__dict__.items() if name != "_windows"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._windows = self._map_windows()


def _spread(num_blocks: int, max_blocks: int | None) -> npt.NDArray[np.int64]:
    """Return at most `max_blocks` distinct block ids, evenly spaced."""
    chosen = num_blocks if max_blocks is None else min(max_blocks, num_blocks)
    return np.arange(chosen, dtype=np.int64) * num_blocks // chosen
