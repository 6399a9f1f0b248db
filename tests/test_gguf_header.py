"""Sizes from headers that are put together here, byte by byte, as the GGUF specification has them."""

import struct
from pathlib import Path

import pytest

from kd.gguf_header import GGUFSizes, read_gguf_header, read_gguf_sizes

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


# --- the whole header -----------------------------------------------------------------------------------------------


def float32(key: str, value: float) -> bytes:
    return pair(key, FLOAT32, struct.pack("<f", value))


def kind(value: str, architecture: str = "llama") -> bytes:
    return pair(f"{architecture}.rope.scaling.type", STRING, text(value))


def tensor(name: str, *sizes: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, 0, 0)


def whole(pairs: tuple[bytes, ...], *tensors: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pairs) + b"".join(tensors)


EMBEDDING, FREQUENCIES = tensor("token_embd.weight", 16, 300), tensor("rope_freqs.weight", 2)


def test_values_and_names_of_tensors_are_read(tmp_path: Path) -> None:
    content = whole((ARCHITECTURE, TOKENS, SCORES, FLAG, SIZE, float32("llama.x", 2.5)), EMBEDDING, FREQUENCIES)
    (tmp_path / "a.gguf").write_bytes(content)
    found = read_gguf_header(tmp_path / "a.gguf")
    assert found.tensors == ("token_embd.weight", "rope_freqs.weight")
    numbers = {"tokenizer.ggml.tokens": 4, "tokenizer.ggml.scores": 3, "a.flag": True, "a.size": 2**40, "llama.x": 2.5}
    assert found.values == {"general.architecture": "llama", **numbers}
    for length in range(len(content)):
        (tmp_path / "a.gguf").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"."):
            read_gguf_header(tmp_path / "a.gguf")


FACTOR, NO_FACTOR = float32("llama.rope.scaling.factor", 4.0), float32("llama.rope.scaling.factor", 1.0)


@pytest.mark.parametrize(
    ("pairs", "tensors", "words"),
    [
        ((), (EMBEDDING,), None),
        ((kind("none"), FACTOR), (EMBEDDING,), None),
        ((kind("linear"), NO_FACTOR), (EMBEDDING,), None),
        ((float32("llama.rope.scale_linear", 0.0),), (EMBEDDING,), None),
        ((kind("linear"), FACTOR), (EMBEDDING,), "llama.rope.scaling.factor=4.0"),
        ((FACTOR,), (EMBEDDING,), "llama.rope.scaling.type=linear"),
        ((float32("llama.rope.scale_linear", 2.0),), (EMBEDDING,), "llama.rope.scale_linear=2.0"),
        ((kind("yarn"), FACTOR), (EMBEDDING,), "llama.rope.scaling.type=yarn"),
        ((kind("longrope"),), (EMBEDDING,), "llama.rope.scaling.type=longrope"),
        ((kind("yarn"), float32("llama.rope.scaling.attn_factor", 1.5)), (EMBEDDING,), "attn_factor=1.5"),
        ((), (EMBEDDING, FREQUENCIES), "rope_freqs.weight"),
        ((kind("none"),), (EMBEDDING, tensor("rope_factors_long.weight", 2)), "rope_factors_long.weight"),
    ],
)
def test_scaled_positions_are_told(
    tmp_path: Path, pairs: tuple[bytes, ...], tensors: tuple[bytes, ...], words: str | None
) -> None:
    (tmp_path / "a.gguf").write_bytes(whole((ARCHITECTURE, TOKENS, *pairs), *tensors))
    found = read_gguf_header(tmp_path / "a.gguf").rope_scaling()
    assert (found is None) == (words is None)
    assert (words or "") in (found or "")


def test_what_transformers_reads_itself_is_no_matter(tmp_path: Path) -> None:
    architecture = pair("general.architecture", STRING, text("gpt-oss"))
    pairs = (architecture, kind("yarn", "gpt-oss"), float32("gpt-oss.rope.scaling.factor", 32.0))
    (tmp_path / "a.gguf").write_bytes(whole(pairs, EMBEDDING))
    assert read_gguf_header(tmp_path / "a.gguf").rope_scaling() is None
