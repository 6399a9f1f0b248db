"""What a GGUF file says about its model, read from the header alone.

The package `gguf` makes Python objects of every entry of the token and merge lists, which takes seconds for a large
vocabulary. Here lists are stepped over, and for the sizes alone reading ends as soon as they are known.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3).
"""

import mmap
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The specification's number of a type, and its layout in the words of `struct`."""
STRING, LIST = 8, 9
TOKENS = "tokenizer.ggml.tokens"
ROPE_TENSORS = ("rope_freqs", "rope_factors")
"""How tensors are called whose values the rotary frequencies are divided by."""
READS_ROPE_SCALING = ("gpt-oss",)
"""Architectures whose scaled positions transformers reads from GGUF."""
Value = int | float | str


@dataclass(frozen=True)
class GGUFSizes:
    """Sizes of the model in a GGUF file."""

    vocab_size: int
    """The one that is stated, else the number of tokens."""
    max_seq_len: int | None
    """Longest sequence that the model was made for, in tokens, if the file says so."""


def read_gguf_sizes(path: Path) -> GGUFSizes:
    """Read a model's sizes from the header of a GGUF file (little-endian, as nearly all are).

    Raises:
        ValueError: if it is no such file, is damaged, or states no vocabulary.
        OSError: if it cannot be read.
    """
    with _opened(path) as header:
        return _sizes(header)


@dataclass(frozen=True)
class GGUFHeader:
    """All that a header says."""

    values: dict[str, Value]
    """By key; of a list its length."""
    tensors: tuple[str, ...]
    """Names of the weights."""

    def rope_scaling(self) -> str | None:
        """Return in words what scales the rotary positions and transformers leaves out; None if nothing does."""
        architecture = self.values.get("general.architecture")
        if architecture in READS_ROPE_SCALING:
            return None
        kind = self.values.get(f"{architecture}.rope.scaling.type", "linear")
        names = ("rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor")
        factors = {
            name: value for name in names if (value := self.values.get(f"{architecture}.{name}", 1)) not in (0, 1)
        }
        tensors = [name for name in self.tensors if any(part in name for part in ROPE_TENSORS)]
        if kind in ("linear", "yarn", "none") and not factors and not tensors:
            return None
        if kind == "none" and not tensors:
            return None
        stated = [f"{architecture}.{name}={value}" for name, value in factors.items()]
        return ", ".join([f"{architecture}.rope.scaling.type={kind}", *stated, *tensors])

    def unused(self, num_layers: int, *, has_biases: bool) -> list[str]:
        """Return the names of tensors that a model of so many layers, with or without biases, has no place for."""
        blocks = {name: found for name in self.tensors if (found := re.match(r"blk\.(\d+)\.", name))}
        beyond = [name for name, found in blocks.items() if int(found[1]) >= num_layers]
        return beyond + [name for name in self.tensors if name.endswith(".bias") and not has_biases]


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read the whole header of a GGUF file; errors as for `read_gguf_sizes`."""
    with _opened(path) as header:
        values = dict(header.read_pair() for _ in range(header.num_keys))
        return GGUFHeader(values, tuple(header.read_tensor_name() for _ in range(header.num_tensors)))


@contextmanager
def _opened(path: Path) -> Iterator["_Header"]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield _Header(data)
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"its header is damaged ({error})") from error


def _sizes(header: "_Header") -> GGUFSizes:
    found: dict[str, Value] = {}
    for _ in range(header.num_keys):
        name, value = header.read_pair()
        found[name] = value
        architecture = found.get("general.architecture")
        stated, context = found.get(f"{architecture}.vocab_size"), found.get(f"{architecture}.context_length")
        if stated is not None and context is not None:
            break
    vocab_size = found.get(TOKENS) if stated is None else stated
    if not isinstance(vocab_size, int):
        raise ValueError("its header states neither a vocabulary size nor tokens")
    return GGUFSizes(vocab_size, context if isinstance(context, int) else None)


class _Header:
    """Steps through the header's keys and values."""

    def __init__(self, data: mmap.mmap) -> None:
        version = int.from_bytes(data[4:8], "little")
        if data[:4] != MAGIC or version not in VERSIONS:
            raise ValueError(f"it is not a little-endian GGUF file of version {' or '.join(map(str, VERSIONS))}")
        self._data = data
        self._offset = 8  # after magic and version
        self.num_tensors = self._integer("Q")
        self.num_keys = self._integer("Q")

    def read_pair(self) -> tuple[str, Value]:
        """Return the next key and its value: of a list its length."""
        return self._string(), self._value(self._integer("I"))

    def read_tensor_name(self) -> str:
        """Return the name of the next tensor, of those that follow the last key."""
        name = self._string()
        self._skip(8 * self._integer("I"))  # its sizes
        self._skip(4 + 8)  # type and place
        return name

    def _value(self, kind: int) -> Value:
        if kind == STRING:
            return self._string()
        return self._skip_list() if kind == LIST else self._number(_layout(kind))

    def _skip_list(self) -> int:
        kind, length = self._integer("I"), self._integer("Q")
        if kind != STRING:
            self._skip(length * struct.calcsize(_layout(kind)))
            return length
        # Written out, since a vocabulary and its merges are hundreds of thousands of entries.
        read, data, offset, end = struct.Struct("<Q").unpack_from, self._data, self._offset, len(self._data)
        for _ in range(length):
            (size,) = read(data, offset)
            offset += 8 + size
            if offset > end:
                break
        self._skip(offset - self._offset)
        return length

    def _integer(self, layout: str) -> int:
        return int(self._number(layout))

    def _number(self, layout: str) -> int | float:
        value: int | float
        (value,) = struct.unpack_from(f"<{layout}", self._data, self._offset)
        self._offset += struct.calcsize(f"<{layout}")
        return value

    def _string(self) -> str:
        size = self._integer("Q")
        start = self._offset
        self._skip(size)
        return self._data[start : self._offset].decode("utf-8")

    def _skip(self, size: int) -> None:
        self._offset += size
        if self._offset > len(self._data):
            raise ValueError("its header is damaged (it goes beyond the end of the file)")


def _layout(kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError(f"its header is damaged or has a value of the unknown type {kind}")
    return SCALARS[kind]
