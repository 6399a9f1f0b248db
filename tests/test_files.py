"""Files and directories are whole or absent, and any damage to them is found."""

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.errors import IntegrityError
from kd.files import (
    MANIFEST,
    canonical_json,
    check_directory,
    digest_of,
    publish_directory,
    read_json,
    write_json,
    write_text,
)

CONTENT = {"a.bin": b"\x00\x01\x02", "deep/b.txt": b"text", "empty": b""}


def publish(target: Path, content: dict[str, bytes]) -> None:
    """Publish a directory of given files."""
    with publish_directory(target) as work:
        for name, data in content.items():
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).write_bytes(data)


def publish_and_fail(target: Path, error: BaseException) -> None:
    """Begin to publish a directory, then raise."""
    with publish_directory(target) as work:
        (work / "a.bin").write_bytes(b"other")
        raise error


def files_in(directory: Path) -> dict[str, bytes]:
    """Return the content of all files but the manifest, by relative name."""
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    publish(tmp_path / "parent" / "thing", CONTENT)
    return tmp_path / "parent" / "thing"


# --- directories ------------------------------------------------------------------------------------------------


def test_a_published_directory_holds_its_files_and_a_manifest(published: Path) -> None:
    assert files_in(published) == CONTENT
    assert set(json.loads((published / MANIFEST).read_text())["files"]) == set(CONTENT)
    check_directory(published, digests=True)
    assert os.listdir(published.parent) == ["thing"]


def test_nothing_is_visible_before_the_end(tmp_path: Path) -> None:
    with publish_directory(tmp_path / "thing") as work:
        (work / "a").write_text("a")
        assert not (tmp_path / "thing").exists()
        assert work.name.startswith(".")


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no"):
        publish_and_fail(tmp_path / "thing", RuntimeError("no"))
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_is_replaced_whole(published: Path) -> None:
    publish(published, {"new": b"new"})
    assert files_in(published) == {"new": b"new"}
    check_directory(published, digests=True)
    assert os.listdir(published.parent) == ["thing"]


def test_an_exception_leaves_an_existing_directory_as_it_was(published: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        publish_and_fail(published, KeyboardInterrupt())
    assert files_in(published) == CONTENT
    check_directory(published, digests=True)
    assert os.listdir(published.parent) == ["thing"]


@pytest.mark.parametrize("name", [*CONTENT, MANIFEST])
def test_a_missing_file_is_found(published: Path, name: str) -> None:
    (published / name).unlink()
    with pytest.raises(IntegrityError, match=Path(name).name) as caught:
        check_directory(published)
    assert caught.value.exit_code == 6


def test_a_missing_directory_is_found(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError):
        check_directory(tmp_path / "none")


@pytest.mark.parametrize("name", ["a.bin", "deep/b.txt", MANIFEST])
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_a_truncated_file_is_found(published: Path, name: str, kept: float) -> None:
    data = (published / name).read_bytes()
    (published / name).write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(IntegrityError, match=Path(name).name):
        check_directory(published)


@pytest.mark.parametrize("name", ["a.bin", "deep/b.txt"])
def test_a_grown_file_is_found(published: Path, name: str) -> None:
    with (published / name).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(IntegrityError, match="bytes, its manifest says"):
        check_directory(published)


@pytest.mark.parametrize("name", ["a.bin", "deep/b.txt", MANIFEST])
def test_a_flipped_bit_anywhere_is_found(published: Path, name: str) -> None:
    path = published / name
    data = path.read_bytes()
    for position in range(0, len(data) * 8, 5):  # in every byte, and each of its bits in turn
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(IntegrityError):
            check_directory(published, digests=True)
    path.write_bytes(data)
    check_directory(published, digests=True)


def test_without_digests_only_sizes_are_compared(published: Path) -> None:
    (published / "a.bin").write_bytes(b"\x00\x01\x03")
    check_directory(published)


# --- files ------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")

    def fail(source: Path, target: Path) -> None:
        assert source.read_text() == "new"
        assert target.read_text() == "old"
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        write_text(path, "new")
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "old"


def test_json_is_strict_and_keeps_what_it_was_given(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, True], "a": "\u6587"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="JSON"):
            write_json(tmp_path / "a.json", {"x": bad})
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_unreadable_json_is_an_integrity_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=5))
def test_a_digest_depends_on_content_and_not_on_order(value: dict[str, object]) -> None:
    backwards = dict(reversed(value.items()))
    assert digest_of(backwards) == digest_of(value)
    assert json.loads(canonical_json(value)) == value
    assert digest_of({**value, "more": 1}) != digest_of({**value, "more": 2})
