"""Files and directories are whole or absent, and any damage to them is found."""

import errno
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

import kd.files
from kd.cache import cached_directory
from kd.errors import IntegrityError
from kd.files import (
    MANIFEST,
    canonical_json,
    check_directory,
    digest_of,
    is_lack_of_resource,
    publish_directory,
    publish_file,
    read_json,
    seal_directory,
    settle_leftovers,
    write_array,
    write_json,
    write_text,
)

from .small_disk import fill, small_disk

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


def test_a_manifest_is_not_there_before_its_files_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    known = kd.files.file_digest

    def digest(path: Path) -> str:
        assert not (tmp_path / MANIFEST).exists()
        seen.append(path.name)
        return known(path)

    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    for _ in range(2):  # also where there is one already, of other content
        with monkeypatch.context() as patch:
            patch.setattr(kd.files, "file_digest", digest)
            seal_directory(tmp_path)
        assert seen == ["a", "b"]
        seen.clear()
        check_directory(tmp_path, digests=True)
        (tmp_path / "a").write_text("other")


# --- replacing a directory --------------------------------------------------------------------------------------


def replace_until(monkeypatch: pytest.MonkeyPatch, renames: int, act: Callable[[], None]) -> Callable[[Path], None]:
    """Return what replaces a published directory, acting before the rename of the directory with that number."""

    def replace(target: Path) -> None:
        rename, count = os.replace, 0

        def counted(source: Path, to: Path) -> None:
            nonlocal count
            if Path(source).is_dir():
                count += 1
                if count == renames:
                    act()
            rename(source, to)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted)
            publish(target, {"new": b"new"})

    return replace


def kill_in_between(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a process be killed between the two renames of a replacement."""
    if (child := os.fork()) == 0:
        replace_until(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGKILL))(target)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not target.exists()


@pytest.mark.parametrize("damage", ["none", "a file", "the manifest"])
def test_killed_between_two_renames_one_copy_is_there_again(
    published: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_in_between(published, monkeypatch)
    (new,) = published.parent.glob(".*.tmp")
    if damage == "a file":
        (new / "new").write_bytes(b"now")
    elif damage == "the manifest":
        (new / MANIFEST).unlink()
    settle_leftovers(published.parent.parent)  # it may be anywhere inside
    assert os.listdir(published.parent) == ["thing"]
    assert files_in(published) == ({"new": b"new"} if damage == "none" else CONTENT)
    check_directory(published, digests=True)


def test_an_exception_between_two_renames_leaves_the_old_copy(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_until(monkeypatch, 2, interrupt)(published)
    assert os.listdir(published.parent) == ["thing"]
    assert files_in(published) == CONTENT


def test_leftovers_of_all_kinds_are_removed(published: Path, tmp_path: Path) -> None:
    folder = published.parent
    (folder / ".history.json.0123abcd.tmp").write_text("half")
    (folder / ".gone.1-0123abcd.tmp").mkdir()
    (folder / ".gone.1-0123abcd.tmp" / ".manifest.json.0123abcd.tmp").write_text("half")
    (folder / ".thing.1-0123abcd.old").mkdir()  # its replacement was done
    (folder / "deep").mkdir()
    (folder / "deep" / ".a.0123abcd.tmp").write_text("half")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").write_text("kept")
    (folder / ".link.tmp").symlink_to(tmp_path / "outside", target_is_directory=True)
    (folder / ".broken.old").symlink_to(tmp_path / "none")
    settle_leftovers(folder)
    assert sorted(os.listdir(folder)) == ["deep", "thing"]
    assert os.listdir(folder / "deep") == []
    assert files_in(published) == CONTENT
    assert (tmp_path / "outside" / "kept").read_text() == "kept"


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


def write_a_file(folder: Path) -> None:
    write_json(folder / "a.json", {"a": 1})


def write_an_array(folder: Path) -> None:
    write_array(folder / "a.npy", np.arange(3))


def publish_a_file(folder: Path) -> None:
    with publish_file(folder / "a.bin") as temporary:
        temporary.write_bytes(b"content")


def publish_twice(folder: Path) -> None:
    for _ in range(2):
        publish(folder / "thing", CONTENT)


def publish_in_the_cache(_folder: Path) -> None:
    def build(work: Path) -> None:
        write_a_file(work)
        (work / "deep").mkdir()
        (work / "deep" / "b").write_text("b")

    cached_directory("things", "key", build, "a thing")


@pytest.mark.parametrize(
    "act",
    [write_a_file, write_an_array, publish_a_file, publish_twice, publish_in_the_cache],
    ids=lambda act: act.__name__,
)
def test_a_name_is_given_to_what_is_on_the_disk_and_is_itself_made_to_last(
    act: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fsync has seen is what survives the loss of power, whatever `kill -9` can show."""
    synced: set[int] = set()  # inodes
    due: list[Path] = []
    renamed: list[str] = []
    sync, rename = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        due[:] = [folder for folder in due if folder.stat().st_ino != os.fstat(descriptor).st_ino]
        sync(descriptor)

    def replace(source: Path, target: Path) -> None:
        if not str(target).endswith(".old"):
            for path in (source, *source.rglob("*")):
                assert path.stat().st_ino in synced, f"{path} is not on the disk"
        rename(source, target)
        synced.discard(target.parent.stat().st_ino)
        due.append(target.parent)
        renamed.append(target.name)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    act(tmp_path)
    assert renamed
    assert not due, "a rename may be lost"


# --- a full disk ------------------------------------------------------------------------------------------------


def save_tensors(path: Path) -> None:
    save_file({"a": torch.zeros(50_000)}, path)


def save_a_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_tokens([f"token-{number}" for number in range(3000)])
    tokenizer.save(str(path))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(200_000)),
        lambda path: write_text(path, "a" * 200_000),
        lambda path: write_array(path, np.zeros(50_000)),
        save_tensors,
        save_a_tokenizer,
    ],
    ids=["bytes", "text", "array", "tensors", "tokenizer"],
)
def test_a_full_disk_is_known_by_every_librarys_error(tmp_path: Path, write: Callable[[Path], None]) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        with pytest.raises(Exception, match="No space left on device") as caught:
            write(disk / "file")
        assert is_lack_of_resource(caught.value)
        fill(disk)
        with pytest.raises(Exception, match="No space left on device") as caught:
            write(disk / "other")
        assert is_lack_of_resource(caught.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EACCES, "denied"), True),
        (OSError(errno.EIO, "broken"), False),
        (OSError("no number"), False),
        (RuntimeError("file not found (os error 2)"), False),
        (RuntimeError("no number"), False),
    ],
    ids=str,
)
def test_other_errors_are_no_lack_of_a_resource(error: Exception, expected: bool) -> None:
    assert is_lack_of_resource(error) == expected


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
