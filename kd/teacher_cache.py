"""A teacher that runs once: its final hidden states on disk, from which its head gives the logits back exactly.

What the teacher's head sees is kept for each block of a part of a corpus, in the dtype that the teacher computes in;
for any temperature the logits are one product away. A part is an entry of the cache of its own, the head another one:

teacher-states/<key>/   states-00000.safetensors, ...: `hidden` (blocks, L, width), and two digests of each block
teacher-heads/<key>/    head.safetensors: `weight` (V, width), and `bias` (V,) if there is one; head.json: the softcap
"""

import hashlib
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from kd.cache import cached_directory, is_cached
from kd.data import PackedBlocks
from kd.errors import DataError, IntegrityError, NumericError, ResourceError
from kd.files import digest_of, publish_file, read_json, write_array, write_json
from kd.heads import LinearHead
from kd.teacher import LiveTeacher

log = logging.getLogger("kd")

FORMAT = 1
STATES, HEADS = "teacher-states", "teacher-heads"
HEAD_FILE, HEAD_META = "head.safetensors", "head.json"
SHARD_BYTES = 16 * 2**20
"""What a killed build computes again, at most."""
BATCH_TOKENS = 4096
DIGEST_BYTES = 8


@dataclass(frozen=True)
class TeacherCacheKey:
    """What determines a teacher's hidden states, apart from the tokens."""

    fingerprint: str
    """Of the teacher, by content."""
    dtype: str
    """That it computes in, and that its states are kept in."""

    def of_states(self, blocks: PackedBlocks) -> str:
        """Return the cache key of the states of some blocks."""
        # The store's name is a hash of corpus, tokenizer and block length.
        content = {"store": blocks.directory.name, "part": blocks.part, "blocks": blocks.block_ids.tolist()}
        return digest_of({"format": FORMAT, "teacher": self.fingerprint, "dtype": self.dtype, **content})

    def of_head(self) -> str:
        """Return the cache key of the head."""
        return digest_of({"format": FORMAT, "teacher": self.fingerprint, "dtype": self.dtype})


def has_states(key: TeacherCacheKey, parts: Sequence[PackedBlocks]) -> bool:
    """Return whether the head and the states of all these blocks are in the cache."""
    return is_cached(HEADS, key.of_head()) and all(is_cached(STATES, key.of_states(part)) for part in parts)


def open_cached_teacher(
    key: TeacherCacheKey, parts: Sequence[PackedBlocks], load: Callable[[], LiveTeacher], device: torch.device
) -> "CachedTeacher":
    """Return a teacher whose states come from disk; whatever is missing there is computed first, once.

    Args:
        key: Identifies the teacher.
        parts: The blocks that will be asked for.
        load: Loads the teacher; called only if something is missing. It must have a head.
        device: Where states and head go.

    Raises:
        DataError: if the teacher has no linear head.
        NumericError: if one of its states is not finite.
        ResourceError: if the disk has not enough room.
        IntegrityError: if an entry is not what was written.
    """
    loaded: list[LiveTeacher] = []

    def teacher() -> LiveTeacher:
        if not loaded:
            loaded.append(_require_head(load()))
        return loaded[0]

    def build_head(work: Path) -> None:
        _write_head(work, teacher())

    head = cached_directory(HEADS, key.of_head(), build_head, "the teacher's head")
    states = []
    for part in parts:

        def build_states(work: Path, part: PackedBlocks = part) -> None:
            _StatesBuilder(work, part, teacher()).build()

        describe = f"the teacher's hidden states of {len(part)} {part.part} blocks"
        states.append(HiddenStates(cached_directory(STATES, key.of_states(part), build_states, describe)))
    return CachedTeacher(_read_head(head, device), states, device)


def _require_head(teacher: LiveTeacher) -> LiveTeacher:
    if teacher.head is None:
        raise DataError(
            f"teacher.cache=require: the hidden states of {teacher.description} cannot stand for its logits: "
            f"{teacher.no_head}. Set teacher.cache=off."
        )
    return teacher


# --- the head ----------------------------------------------------------------------------------------------------


def _write_head(work: Path, teacher: LiveTeacher) -> None:
    head = teacher.head
    assert head is not None
    tensors = {"weight": head.weight} if head.bias is None else {"weight": head.weight, "bias": head.bias}
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, work / HEAD_FILE)
    write_json(work / HEAD_META, {"softcap": head.softcap})


def _read_head(directory: Path, device: torch.device) -> LinearHead:
    try:
        tensors = load_file(directory / HEAD_FILE, device=str(device))
    except SafetensorError as error:
        raise IntegrityError(f"{directory / HEAD_FILE} cannot be read ({error}). Remove {directory}.") from error
    return LinearHead(tensors["weight"], tensors.get("bias"), read_json(directory / HEAD_META)["softcap"])


# --- building ----------------------------------------------------------------------------------------------------


class _StatesBuilder:
    """Fills one entry, shard by shard; shards that an earlier attempt finished are taken as they are."""

    def __init__(self, work: Path, blocks: PackedBlocks, teacher: LiveTeacher) -> None:
        assert teacher.head is not None
        self.work, self.blocks, self.teacher = work, blocks, teacher
        self.weight = teacher.head.weight
        self.block_bytes = blocks.seq_len * self.weight.size(1) * self.weight.element_size()
        self.shard_blocks = max(1, SHARD_BYTES // self.block_bytes)
        self.batch_blocks = max(1, BATCH_TOKENS // blocks.seq_len)

    def build(self) -> None:
        """Write all shards and the table of blocks."""
        starts = range(0, len(self.blocks), self.shard_blocks)
        missing = [start for start in starts if not _shard(self.work, start // self.shard_blocks).exists()]
        sizes = [min(self.shard_blocks, len(self.blocks) - start) for start in missing]
        self._check_room(sum(sizes))
        with tqdm(total=len(self.blocks), unit="block", desc=f"teacher, {self.blocks.part}", disable=None) as progress:
            progress.update(len(self.blocks) - sum(sizes))
            for start, size in zip(missing, sizes, strict=True):
                self._write_shard(start, size, progress)
        write_array(self.work / "block_ids.npy", self.blocks.block_ids)
        write_json(self.work / "meta.json", {"shard_blocks": self.shard_blocks})

    def _check_room(self, count: int) -> None:
        """Say how much disk is needed, and refuse what does not fit."""
        need, free = count * self.block_bytes, shutil.disk_usage(self.work).free
        log.info(
            "The teacher's hidden states of %d %s blocks take %s of disk (free: %s)",
            count,
            self.blocks.part,
            _size(need),
            _size(free),
        )
        if need > free:
            raise ResourceError(
                f"The teacher's hidden states of {count} {self.blocks.part} blocks need {_size(need)}, and only "
                f"{_size(free)} are free in {self.work.parent}. Free the space, set KD_CACHE to a folder on another "
                "disk, lower data.sample_size or data.max_train_blocks, choose teacher.dtype=bfloat16 (half the size "
                "of float32), or set teacher.cache=off."
            )

    def _write_shard(self, start: int, size: int, progress: "tqdm[Any]") -> None:
        """Write one shard in one step, so that a killed build leaves whole shards only."""
        shape = (size, self.blocks.seq_len, self.weight.size(1))
        hidden = torch.empty(shape, dtype=self.weight.dtype)
        tokens = []
        for first in range(0, size, self.batch_blocks):
            last = min(first + self.batch_blocks, size)
            batch = self.blocks[list(range(start + first, start + last))]
            on_device = {"input_ids": batch["input_ids"].to(self.weight.device), "block_id": batch["block_id"]}
            hidden[first:last] = self.teacher.hidden(on_device)
            _require_finite(hidden[first:last], batch["block_id"])
            tokens.append(token_digests(batch["input_ids"]))
            progress.update(last - first)
        digests = {"tokens": np.concatenate(tokens), "digests": _digests(hidden)}
        with publish_file(_shard(self.work, start // self.shard_blocks)) as temporary:
            save_file({"hidden": hidden} | {name: torch.from_numpy(x) for name, x in digests.items()}, temporary)


def _require_finite(hidden: Tensor, block_ids: Tensor) -> None:
    bad = ~torch.isfinite(hidden).flatten(1).all(dim=1)
    if bad.any():
        dtype = str(hidden.dtype).removeprefix("torch.")
        raise NumericError(
            f"The teacher's hidden states of block {int(block_ids[bad][0])} are not finite in {dtype}: its activations "
            "overflow. Set teacher.dtype=bfloat16 (or float32)."
        )


def _shard(directory: Path, index: int) -> Path:
    return directory / f"states-{index:05d}.safetensors"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def token_digests(input_ids: Tensor) -> npt.NDArray[np.int64]:
    """Return the 8-byte BLAKE2b digest of each row of token ids (B, L), (B,) int64."""
    return _digests(input_ids.to(torch.int64))


def _digests(rows: Tensor) -> npt.NDArray[np.int64]:
    """Return the 8-byte BLAKE2b digest of the bytes of each row of a tensor on the CPU, (rows,) int64."""
    flat = rows.contiguous().flatten(1).view(torch.uint8).numpy()
    digests = b"".join(hashlib.blake2b(row.data, digest_size=DIGEST_BYTES).digest() for row in flat)
    return np.frombuffer(digests, dtype="<i8").copy()


# --- reading -----------------------------------------------------------------------------------------------------


class HiddenStates:
    """The states of some blocks, mapped from disk; a block is compared with its digests at its first reading.

    Args:
        directory: A published entry.

    Raises:
        IntegrityError: if a file cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.block_ids: npt.NDArray[np.int64] = np.load(directory / "block_ids.npy")
        self._shard_blocks = int(read_json(directory / "meta.json")["shard_blocks"])
        self._is_checked = np.zeros(len(self.block_ids), dtype=np.bool_)
        num_shards = -(-len(self.block_ids) // self._shard_blocks)
        shards = [_open_shard(_shard(directory, index)) for index in range(num_shards)]
        self._hidden = [shard["hidden"] for shard in shards]
        self._digests = torch.cat([shard["digests"] for shard in shards]).numpy()
        self._tokens = torch.cat([shard["tokens"] for shard in shards]).numpy()

    def positions(self, block_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.intp] | None:
        """Return where these blocks are, or None if not all of them are here."""
        places = np.searchsorted(self.block_ids, block_ids)
        found = self.block_ids[np.minimum(places, len(self.block_ids) - 1)]
        return places if (found == block_ids).all() else None

    def read(self, positions: npt.NDArray[np.intp], input_ids: Tensor) -> Tensor:
        """Return the states (B, L, width) of the blocks at some positions, whose tokens are `input_ids` (B, L).

        Raises:
            IntegrityError: if states are not what was written.
            DataError: if the teacher saw other tokens.
        """
        rows = [divmod(int(position), self._shard_blocks) for position in positions]
        hidden = torch.stack([self._hidden[shard][row] for shard, row in rows])
        if not self._is_checked[positions].all():
            self._check(positions, hidden, input_ids)
        return hidden

    def _check(self, positions: npt.NDArray[np.intp], hidden: Tensor, input_ids: Tensor) -> None:
        if len(damaged := positions[_digests(hidden) != self._digests[positions]]):
            raise IntegrityError(
                f"The teacher's hidden states of block {self.block_ids[damaged[0]]} in {self.directory} are not what "
                "was written. Remove that folder to have them made again."
            )
        if len(other := positions[token_digests(input_ids.cpu()) != self._tokens[positions]]):
            raise DataError(
                f"Block {self.block_ids[other[0]]} holds other tokens than those the teacher's hidden states in "
                f"{self.directory} are of. Give the blocks that they were made from, or set teacher.cache=off."
            )
        self._is_checked[positions] = True


def _open_shard(path: Path) -> dict[str, Tensor]:
    """Map a shard into memory; nothing of the states is read yet."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in ("hidden", "tokens", "digests")}
    except (OSError, SafetensorError) as error:
        raise IntegrityError(f"{path} cannot be read ({error}). Remove {path.parent}.") from error


class CachedTeacher:
    """A teacher of which only the head is loaded; made by `open_cached_teacher`."""

    def __init__(self, head: LinearHead, states: Sequence[HiddenStates], device: torch.device) -> None:
        self.head = head
        self._states = states
        self._device = device
        count = sum(len(part.block_ids) for part in states)
        dtype = str(head.weight.dtype).removeprefix("torch.")
        self.description = f"hidden states of {count:,} blocks from the cache ({dtype}, {head.weight.size(1)} wide)"
        self.flops_per_token = 2.0 * head.weight.numel()

    def hidden(self, batch: dict[str, Tensor]) -> Tensor:
        """Return what the head sees, (B, L, width), of a batch with `input_ids` (B, L) and `block_id` (B,).

        Raises:
            DataError: if a block is not in the cache, or its tokens are not those that the teacher saw.
            IntegrityError: if states are not what was written.
        """
        block_ids = batch["block_id"].cpu().numpy()
        for part in self._states:
            if (positions := part.positions(block_ids)) is not None:
                return part.read(positions, batch["input_ids"]).to(self._device, non_blocking=True)
        raise DataError(
            f"The teacher's hidden states of the blocks {block_ids.tolist()} are not in the cache that was opened. "
            "Set teacher.cache=off, so that the teacher runs live."
        )

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Return next-token logits (B, L, V) of the same batch."""
        return self.head.logits(self.hidden(batch))
