"""Sizes from headers that are put together here, byte by byte, as the GGUF specification has them."""

import struct
from pathlib import Path

import pytest

from kd.gguf_header import GGUFSizes, read_gguf_sizes

UINT32, FLOAT32, BOOL, STRING, LIST, UINT64 = 4, 6, 7, 8, 9, 10


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def uint32(key: str, value: int) -> bytes:
    return pair(key, UINT32, struct.pack("<I", value))


def strings(key: str, values: list[str]) -> bytes:
    return pair(key, LIST, struct.pack("<IQ", STRING, len(values)) + b"".join(map(text, values)))


def numbers(key: str, values: list[float]) -> bytes:
    return pair(key, LIST, struct.pack(f"<IQ{len(values)}f", FLOAT32, len(values), *values))


def header(*pairs: bytes, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, 5, len(pairs)) + b"".join(pairs)


ARCHITECTURE = pair("general.architecture", STRING, text("llama"))
TOKENS = strings("tokenizer.ggml.tokens", ["a", "\u4e2d", "", "d" * 300])
SCORES = numbers("tokenizer.ggml.scores", [0.5, -1.0, 2.0])
FLAG = pair("a.flag", BOOL, b"\x01")
SIZE = pair("a.size", UINT64, struct.pack("<Q", 2**40))


@pytest.mark.parametrize(
    ("content", "sizes"),
    [
        (header(ARCHITECTURE, uint32("llama.vocab_size", 9), uint32("llama.context_length", 64)), GGUFSizes(9, 64)),
        (header(ARCHITECTURE, FLAG, SCORES, TOKENS, SIZE, uint32("llama.context_length", 64)), GGUFSizes(4, 64)),
        (header(TOKENS, uint32("llama.context_length", 64), ARCHITECTURE, version=2), GGUFSizes(4, 64)),
        (header(ARCHITECTURE, TOKENS, uint32("llama.vocab_size", 9)), GGUFSizes(9, None)),
        (header(ARCHITECTURE, uint32("other.vocab_size", 9), TOKENS), GGUFSizes(4, None)),
    ],
)
def test_sizes_are_found_wherever_they_stand(tmp_path: Path, content: bytes, sizes: GGUFSizes) -> None:
    (tmp_path / "a.gguf").write_bytes(content + bytes(40))
    assert read_gguf_sizes(tmp_path / "a.gguf") == sizes


def test_every_cut_of_a_header_is_a_value_error(tmp_path: Path) -> None:
    content = header(ARCHITECTURE, SCORES, TOKENS, uint32("llama.context_length", 64))
    for length in range(len(content)):
        (tmp_path / "a.gguf").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"."):
            read_gguf_sizes(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    "content",
    [
        header(ARCHITECTURE, TOKENS, version=1),
        b"FUGG" + header(ARCHITECTURE, TOKENS)[4:],
        header(ARCHITECTURE, pair("x", 99, b"\x00" * 8), TOKENS),
        header(ARCHITECTURE, pair("x", LIST, struct.pack("<IQ", 99, 3)), TOKENS),
        header(ARCHITECTURE, pair("x", LIST, struct.pack("<IQ", UINT32, 2**63)), TOKENS),
        header(ARCHITECTURE, pair("x", STRING, struct.pack("<Q", 2**63)), TOKENS),
        header(ARCHITECTURE, pair("x", STRING, struct.pack("<Q", 1) + b"\xff"), TOKENS),
        header(ARCHITECTURE, uint32("llama.context_length", 64)),
    ],
)
def test_what_is_no_header_is_a_value_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"header|GGUF"):
        read_gguf_sizes(tmp_path / "a.gguf")
