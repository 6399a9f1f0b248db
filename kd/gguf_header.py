"""What a GGUF file says about its model, read from the header alone.

The package `gguf` makes Python objects of every entry of the token and merge lists, which takes seconds for a large
vocabulary. Here lists are stepped over, and reading ends as soon as the sizes are known.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3).
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The specification's number of a type, and its layout in the words of `struct`."""
STRING, LIST = 8, 9
TOKENS = "tokenizer.ggml.tokens"


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
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _sizes(_Header(data))
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"its header is damaged ({error})") from error


def _sizes(header: "_Header") -> GGUFSizes:
    found: dict[str, int | str] = {}
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
        self._offset = 16  # magic, version, and the number of tensors
        self.num_keys = self._integer("Q")

    def read_pair(self) -> tuple[str, int | str]:
        """Return the next key and its value: of a list its length, of a number its integer part."""
        return self._string(), self._value(self._integer("I"))

    def _value(self, kind: int) -> int | str:
        if kind == STRING:
            return self._string()
        return self._skip_list() if kind == LIST else self._integer(_layout(kind))

    def _skip_list(self) -> int:
        kind, length = self._integer("I"), self._integer("Q")
        if kind != STRING:
            self._skip(length * struct.calcsize(_layout(kind)))
            return length
        for _ in range(length):
            self._skip(self._integer("Q"))
        return length

    def _integer(self, layout: str) -> int:
        (value,) = struct.unpack_from(f"<{layout}", self._data, self._offset)
        self._offset += struct.calcsize(layout)
        return int(value)

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
