"""A disk that is full while a run writes: a sentence, exit code 7, and the same command goes on when there is room."""

import os
from pathlib import Path

import pytest

from .kill_points import COMMAND, Forker, fingerprint, forker, left_over
from .small_disk import enlarge, small_disk

OFTEN = (
    *COMMAND,
    "train.max_steps=14",
    "train.num_epochs=9",
    "train.save_interval=1",
    "teacher.train.max_steps=14",
    "teacher.train.save_interval=1",
)
"""More than 3 MB of checkpoints, of the run and of its teacher."""


def command(commands: Forker, outputs: Path, cache: Path) -> tuple[int, str]:
    os.chdir(outputs.parent)
    variables = {"KD_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    ending = commands.run(*OFTEN, **variables)
    return ending.code, ending.output


def check(commands: Forker, disk: Path, outputs: Path, cache: Path, whole: dict[str, str]) -> str:
    """Let a command come to the end of a disk, then make room; return what it said when it had none."""
    code, words = command(commands, outputs, cache)
    assert code == 7, words
    assert "No space left on device" in words or "only" in words
    assert "Free the space" in words
    assert "Traceback" not in words
    assert "Logging error" not in words
    enlarge(disk, "64m")
    code, output = command(commands, outputs, cache)
    assert code == 0, output
    assert not left_over(disk)
    assert fingerprint(outputs, cache) == whole
    return words


@pytest.mark.slow
def test_three_megabytes_for_outputs_then_for_the_cache(tmp_path: Path) -> None:
    with forker() as commands:
        outputs, cache = tmp_path / "whole" / "outputs", tmp_path / "whole" / "cache"
        outputs.mkdir(parents=True)
        assert command(commands, outputs, cache)[0] == 0
        whole = fingerprint(outputs, cache)
        with small_disk(tmp_path / "first" / "outputs", "3m") as disk:
            words = check(commands, disk, disk, tmp_path / "first" / "cache", whole)
            assert "the same command then continues" in words
        with small_disk(tmp_path / "second" / "cache", "3m") as disk:
            words = check(commands, disk, tmp_path / "second" / "outputs", disk, whole)
            assert "KD_CACHE" in words


def whole_size(folder: Path) -> int:
    """Return the kilobytes in a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*")) // 1024


@pytest.mark.exhaustive
def test_any_size_for_both(tmp_path: Path) -> None:
    """Whatever it is that is being written when the disk is full."""
    with forker() as commands:
        outputs, cache = tmp_path / "whole" / "outputs", tmp_path / "whole" / "cache"
        outputs.mkdir(parents=True)
        assert command(commands, outputs, cache)[0] == 0
        whole = fingerprint(outputs, cache)
        # Beyond that it fits.
        sizes = [*range(8, 64, 8), *range(64, whole_size(outputs) + whole_size(cache), 400)]
        for size in sizes:
            with small_disk(tmp_path / str(size) / "all", f"{size}k") as disk:
                words = check(commands, disk, disk / "outputs", disk / "cache", whole)
                print(size, words.strip().splitlines()[-1])
