"""The cache: one build for many processes, nothing half-made, and going on after a kill."""

import fcntl
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import kd.cache
from kd.cache import cache_root, cached_directory
from kd.errors import ConfigError, DataError, IntegrityError, Interrupted, ResourceError
from kd.files import check_directory, write_array

from .small_disk import enlarge, small_disk

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _write_hello(work: Path) -> None:
    (work / "hello.txt").write_text("hello")


def _never(_work: Path) -> None:
    raise AssertionError("built although it was there")


def _build_counted(log: Path, results: Path) -> None:
    def build(work: Path) -> None:
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.3)
        _write_hello(work)

    directory = cached_directory("things", "key", build, "a thing")
    (results / str(os.getpid())).write_text((directory / "hello.txt").read_text())


def _build_shard_then_hang(reached: Path) -> None:
    def build(work: Path) -> None:
        (work / "shard-0").write_text("zero")
        (work / ".shard-1.tmp").write_text("hal")
        reached.touch()
        time.sleep(60)

    cached_directory("things", "key", build, "a thing")


@contextmanager
def _held_lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_six_processes_build_once(tmp_path: Path) -> None:
    log, results = tmp_path / "log", tmp_path / "results"
    results.mkdir()
    processes = [SPAWN.Process(target=_build_counted, args=(log, results)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 6
    assert log.read_text() == "built\n"
    assert [path.read_text() for path in results.iterdir()] == ["hello"] * 6


def test_a_killed_build_goes_on_with_its_finished_shards(tmp_path: Path) -> None:
    reached = tmp_path / "reached"
    process = SPAWN.Process(target=_build_shard_then_hang, args=(reached,))
    process.start()
    deadline = time.monotonic() + 30
    while not reached.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    found: list[str] = []

    def build(work: Path) -> None:
        found.extend(sorted(path.name for path in work.iterdir()))
        (work / "shard-1").write_text("one")

    directory = cached_directory("things", "key", build, "a thing")
    assert found == ["shard-0"]  # the half-written temporary file is gone, the finished shard is not
    assert sorted(path.name for path in directory.iterdir()) == ["manifest.json", "shard-0", "shard-1"]
    assert not list(directory.parent.glob("*.partial"))


def test_a_published_entry_is_opened_without_building_or_locking(root: Path) -> None:
    first = cached_directory("things", "key", _write_hello, "a thing")
    with _held_lock(root / "things" / "key.lock"):
        assert cached_directory("things", "key", _never, "a thing") == first


def test_a_failed_build_publishes_nothing(root: Path) -> None:
    def build(_work: Path) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cached_directory("things", "key", build, "a thing")
    assert not (root / "things" / "key").exists()


def test_a_changed_size_is_an_integrity_error_and_no_rebuild() -> None:
    directory = cached_directory("things", "key", _write_hello, "a thing")
    (directory / "hello.txt").write_text("hell")
    with pytest.raises(IntegrityError, match=r"hello\.txt has 4 bytes.*Remove"):
        cached_directory("things", "key", _never, "a thing")


def test_who_waits_too_long_says_for_what(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kd.cache, "LOCK_TIMEOUT_SECONDS", 0.5)
    with (
        caplog.at_level(logging.INFO, "kd.cache"),
        _held_lock(root / "things" / "key.lock"),
        pytest.raises(DataError, match="Another process has been building a thing") as caught,
    ):
        cached_directory("things", "key", _never, "a thing")
    assert caught.value.exit_code == 4
    waits = [record for record in caplog.records if "waits" in record.message]
    assert len(waits) == 1
    assert str(os.getpid()) in waits[0].message


def test_no_space_names_the_path_and_the_way_out_and_what_was_done_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []

    def build(work: Path) -> None:
        found.extend(path.name for path in work.iterdir())
        write_array(work / "small.npy", np.zeros(100))
        write_array(work / "large.npy", np.zeros(50_000))

    with small_disk(tmp_path / "disk", "64k") as disk:
        monkeypatch.setenv("KD_CACHE", str(disk / "cache"))
        with pytest.raises(ResourceError, match=r"No space left on device.*KD_CACHE") as caught:
            cached_directory("things", "key", build, "a thing")
        assert str(disk / "cache" / "things" / "key") in str(caught.value)
        enlarge(disk, "1m")
        directory = cached_directory("things", "key", build, "a thing")
        assert "small.npy" in found
        check_directory(directory, digests=True)


def test_a_file_in_place_of_the_folder_is_a_resource_error(root: Path) -> None:
    root.write_text("")
    with pytest.raises(ResourceError, match="KD_CACHE"):
        cached_directory("things", "key", _never, "a thing")


def test_the_folder_is_under_outputs_unless_it_is_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_root() == tmp_path / "cache"
    monkeypatch.delenv("KD_CACHE")
    monkeypatch.chdir(tmp_path)
    assert cache_root() == tmp_path / "outputs" / ".cache"


# --- what others have a use for -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ConfigError("no"), DataError("no"), Interrupted("stop"), ResourceError("full")])
def test_what_is_published_stays_however_its_builder_ends(error: Exception) -> None:
    """Another process may have opened it in the meantime."""
    with pytest.raises(type(error)):
        _build_then_raise(error)
    assert (cached_directory("things", "one", _never, "a thing") / "hello.txt").read_text() == "hello"


def _build_then_raise(error: Exception) -> None:
    cached_directory("things", "one", _write_hello, "a thing")
    raise error


# --- what killed builders leave -----------------------------------------------------------------------------------


def test_leftovers_of_all_kinds_are_no_hindrance(root: Path) -> None:
    work = root / "things" / "key.partial"
    (work / "checkpoints" / ".checkpoint-2.1-0123abcd.tmp").mkdir(parents=True)
    (work / "checkpoints" / ".checkpoint-2.1-0123abcd.tmp" / "state.json").write_text("{}")
    (work / "checkpoints" / ".checkpoint-1.1-0123abcd.old").mkdir()
    (work / ".history.json.0123abcd.tmp").write_text("{")
    directory = cached_directory("things", "key", _write_hello, "a thing")
    assert {path.name for path in directory.rglob("*")} == {"checkpoints", "checkpoint-1", "hello.txt", "manifest.json"}


def test_an_entry_that_is_whole_but_has_no_name_yet_is_not_built_again(root: Path) -> None:
    cached_directory("things", "key", _write_hello, "a thing")
    (root / "things" / "key").rename(root / "things" / "key.partial")
    assert (cached_directory("things", "key", _never, "a thing") / "hello.txt").read_text() == "hello"


def test_one_that_is_not_whole_is_built_again(root: Path) -> None:
    cached_directory("things", "key", _write_hello, "a thing")
    (root / "things" / "key").rename(root / "things" / "key.partial")
    (root / "things" / "key.partial" / "hello.txt").write_text("hallo")
    assert (cached_directory("things", "key", _write_hello, "a thing") / "hello.txt").read_text() == "hello"
