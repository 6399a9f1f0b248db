"""How a corpus becomes the files of a packed block store: shards first, then one row of tokens a part."""

import hashlib
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from kd.data.corpora import TEST, TRAIN, VALIDATION, Corpus
from kd.data.special_tokens import special_pattern, spelled_warning, unknown_id, unknown_warning
from kd.data.tokenizers import end_of_text_id, num_token_ids
from kd.errors import DataError, IntegrityError
from kd.files import publish_file, read_json, remove_path, write_array, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

META_FILE = "meta.json"
SHARD_BYTES = 4_000_000
_BATCH_BYTES = 500_000
_DIGEST_ROWS = 4096
_SHARE_HINTS = {TRAIN: "lower data.val_ratio", VALIDATION: "raise data.val_ratio", TEST: "raise data.test_ratio"}

Tokens = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class PartMeta:
    """What a store's meta.json says of one part."""

    tokens: int
    """All tokens, the end-of-text tokens and an unused rest included."""
    blocks: int
    bytes: int
    """Of the part's text in UTF-8."""
    documents: int
    unknown: int | None = None
    """Tokens that stand for text which the vocabulary lacks; None: not counted, by an earlier version."""
    spelled: int | None = None
    """Documents that spell a special token, which is plain characters there; None: not counted."""

    def warnings(self) -> list[str]:
        """Return what should be known before anything is trained on the part."""
        found = (
            unknown_warning(self.unknown or 0, self.tokens),
            spelled_warning(self.spelled or 0, self.documents, "documents"),
        )
        return [warning for warning in found if warning is not None]


@dataclass(frozen=True)
class StoreMeta:
    """What a store's meta.json says."""

    seq_len: int
    vocab_size: int
    """Largest token id plus 1."""
    dtype: str
    """Of the .bin files, as numpy spells it: little-endian, 2 bytes if the vocabulary allows, else 4."""
    parts: dict[str, PartMeta]

    @classmethod
    def read(cls, directory: Path) -> "StoreMeta":
        """Return the meta.json of a store.

        Raises:
            IntegrityError: if it cannot be read.
        """
        values = read_json(directory / META_FILE)
        parts = {name: PartMeta(**part) for name, part in values.pop("parts").items()}
        return cls(parts=parts, **values)


def token_dtype(vocab_size: int) -> str:
    """Return the smallest of the two stored token types that holds the vocabulary."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


def block_windows(tokens: Tokens, seq_len: int) -> Tokens:
    """Return a view of shape (blocks, seq_len + 1) of a row of tokens; neighbouring rows share one token."""
    return np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)[::seq_len]


def block_digests(windows: Tokens) -> npt.NDArray[np.uint64]:
    """Return the 8-byte BLAKE2b digest of each row, (blocks,) uint64; it does not depend on the stored type."""
    rows = np.ascontiguousarray(windows, dtype="<u4")
    digests = b"".join(hashlib.blake2b(row.data, digest_size=8).digest() for row in rows)
    return np.frombuffer(digests, dtype="<u8")


def pack_corpus(work: Path, corpus: Corpus, tokenizer: "PreTrainedTokenizerFast", seq_len: int) -> None:
    """Fill a directory with the packed parts of a corpus; shards found in it are taken as they are.

    Raises:
        DataError: if a part is shorter than one block, or the tokenizer has no end-of-text token.
    """
    shards = work / "shards"
    # The metadata is written last: if it is there, only the shards were still to be removed.
    if not (work / META_FILE).exists():
        _pack_parts(work, shards, corpus, tokenizer, seq_len)
    remove_path(shards)


def _pack_parts(work: Path, folder: Path, corpus: Corpus, tokenizer: "PreTrainedTokenizerFast", seq_len: int) -> None:
    vocab_size = num_token_ids(tokenizer)
    dtype = token_dtype(vocab_size)
    shards, spelled = _tokenize_parts(folder, corpus, tokenizer, dtype)
    lengths = {part: _document_lengths(files) for part, files in shards.items()}
    try:
        _require_one_block(lengths, corpus, seq_len)
    except DataError:
        # Nobody will come back for shards that are too short.
        remove_path(work)
        raise
    parts, unknown = {}, unknown_id(tokenizer)
    for part, files in shards.items():
        tokens = _write_part(work, part, files, lengths[part], seq_len, dtype)
        total = int(lengths[part].sum())
        parts[part] = PartMeta(
            tokens=total,
            blocks=(total - 1) // seq_len,
            bytes=corpus.num_bytes(part),
            documents=len(lengths[part]),
            unknown=0 if unknown is None else int(np.count_nonzero(tokens == unknown)),
            spelled=spelled[part],
        )
    write_json(work / META_FILE, asdict(StoreMeta(seq_len, vocab_size, dtype, parts)))


def _tokenize_parts(
    folder: Path, corpus: Corpus, tokenizer: "PreTrainedTokenizerFast", dtype: str
) -> tuple[dict[str, list[Path]], Counter[str]]:
    """Write the shards that are missing; return all, in order, and how many texts spell a special token, by part."""
    folder.mkdir(exist_ok=True)
    special, spelled = special_pattern(tokenizer), Counter[str]()
    total = sum(corpus.num_bytes(part) for part in corpus.part_names)
    shards: dict[str, list[Path]] = {part: [] for part in corpus.part_names}
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=None) as progress:
        for part, files in shards.items():
            for index, texts in enumerate(batch_by_bytes(corpus.texts(part), SHARD_BYTES)):
                files.append(folder / f"{part}-{index:05d}.npz")
                if not files[-1].exists():
                    _write_shard(files[-1], texts, tokenizer, dtype)
                spelled[part] += sum(special.search(text) is not None for text in texts)
                progress.update(sum(len(text.encode()) for text in texts))
    return shards, spelled


def batch_by_bytes(texts: Iterable[str], limit: int) -> Iterator[list[str]]:
    """Yield runs of whole texts of at least `limit` bytes in UTF-8; the last may be shorter."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text.encode())
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_shard(path: Path, texts: list[str], tokenizer: "PreTrainedTokenizerFast", dtype: str) -> None:
    """Encode texts and write their tokens, each followed by the end-of-text token, in one step."""
    end = end_of_text_id(tokenizer)
    encoded: list[Tokens] = []
    for batch in batch_by_bytes(texts, _BATCH_BYTES):
        # Special tokens spelled out in a document are text: a document cannot forge its own end.
        ids = tokenizer(batch, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        encoded.extend(np.array([*document, end], dtype=dtype) for document in ids)
    lengths = np.array([len(document) for document in encoded], dtype=np.int64)
    with publish_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, tokens=np.concatenate(encoded), lengths=lengths)


def _read_shard(path: Path, name: str) -> npt.NDArray[np.integer]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            array: npt.NDArray[np.integer] = arrays[name]
            return array
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise IntegrityError(f"{path} is not what was written ({error}). Remove it to have it made again.") from error


def _document_lengths(files: list[Path]) -> npt.NDArray[np.int64]:
    """Return the tokens of each document of a part, its end-of-text token included."""
    return np.concatenate([_read_shard(path, "lengths") for path in files]).astype(np.int64)


def _require_one_block(lengths: dict[str, npt.NDArray[np.int64]], corpus: Corpus, seq_len: int) -> None:
    for part, documents in lengths.items():
        if documents.sum() < seq_len + 1:
            raise DataError(
                f"The {part} part of {corpus.description} has {documents.sum()} tokens in {len(documents)} "
                f"document(s), and one block of data.seq_len={seq_len} needs {seq_len + 1}. Give more text (or raise "
                f"data.sample_size), lower data.seq_len, or {_SHARE_HINTS[part]}."
            )


def _write_part(
    work: Path, part: str, shards: list[Path], lengths: npt.NDArray[np.int64], seq_len: int, dtype: str
) -> Tokens:
    """Write one part's tokens, and each block's document and digest; return the tokens, mapped into memory."""
    path = work / f"{part}.bin"
    with path.open("wb") as file:
        for shard in shards:
            file.write(_read_shard(shard, "tokens").astype(dtype).tobytes())
    tokens = np.memmap(path, dtype=dtype, mode="r")
    windows = block_windows(tokens, seq_len)
    chunks = range(0, len(windows), _DIGEST_ROWS)
    digests = np.concatenate([block_digests(windows[start : start + _DIGEST_ROWS]) for start in chunks])
    first_targets = np.arange(len(windows), dtype=np.int64) * seq_len + 1
    documents = np.searchsorted(np.cumsum(lengths), first_targets, side="right")
    write_array(work / f"{part}.digests.npy", digests)
    write_array(work / f"{part}.documents.npy", documents.astype(np.int64))
    return tokens
