"""Killed anywhere, the same command ends as an undisturbed one does: a kill at every call to the file system."""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .kill_points import COMMAND, Ending, Forker, fingerprint, forker, left_over

NAMES = ("nothing", "all but the result", "a finished run")
SPREAD = 4
"""Kills of the quicker test in each of the situations."""


@dataclass(frozen=True)
class Situation:
    """What a command finds, what it comes to there if nobody kills it, and what it leaves."""

    folder: Path
    arguments: tuple[str, ...]
    calls: list[str]
    result: dict[str, str]


@pytest.fixture(scope="module")
def commands() -> Iterator[Forker]:
    with forker() as forking:
        yield forking


def command(
    commands: Forker, folder: Path, *arguments: str, kill_at: int | None = None, is_done: bool = False
) -> Ending:
    """Run the command in a folder, which has its own cache."""
    os.chdir(folder)
    variables = {"KD_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return commands.run(*COMMAND, *arguments, kill_at=kill_at, is_done=is_done, **variables)


@pytest.fixture(scope="module")
def situations(commands: Forker, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Situation]:
    """An empty folder; a run that was stopped just before its result; a finished one that is to be overwritten."""
    base = tmp_path_factory.mktemp("situations")
    found: dict[str, Situation] = {}
    for name, arguments in zip(NAMES, ((), (), ("overwrite=true",)), strict=True):
        folder = base / name
        if name == "nothing":
            folder.mkdir()
        else:
            shutil.copytree(base / "nothing.whole", folder)
        if name == "all but the result":
            (result,) = folder.glob("outputs/*/*/result.json")
            result.rename(result.with_name(".result.json.0123abcd.tmp"))
        whole = base / f"{name}.whole"
        shutil.copytree(folder, whole)
        ending = command(commands, whole, *arguments)
        assert ending.code == 0, ending.output
        found[name] = Situation(folder, arguments, ending.calls, fingerprint(whole / "outputs", whole / "cache"))
    return found


def faults(commands: Forker, situation: Situation, number: int, is_done: bool, folder: Path) -> list[str]:
    """Kill a command at one of its calls and repeat it; return what is not as it would be without the kill."""
    shutil.copytree(situation.folder, folder)
    killed = command(commands, folder, *situation.arguments, kill_at=number, is_done=is_done)
    repeated = command(commands, folder, *situation.arguments)
    found = [] if killed.code == -9 else [f"it was not killed: {killed.code}"]
    if repeated.code != 0:
        found.append(repeated.output[-500:])
    else:
        result = fingerprint(folder / "outputs", folder / "cache")
        names = result.keys() | situation.result.keys()
        found += [name for name in sorted(names) if result.get(name) != situation.result.get(name)]
        found += left_over(folder)
    shutil.rmtree(folder)
    return [f"{situation.calls[number]} (number {number}{', done' * is_done}): {fault}" for fault in found]


def test_the_situations_are_what_they_should_be(situations: dict[str, Situation]) -> None:
    first = situations["nothing"]
    assert {call.split()[0] for call in first.calls} == {"mkdir", "link", "fsync", "replace", "unlink", "rmdir"}
    assert all(situation.result == first.result for situation in situations.values())
    replaced = [call for call in first.calls if call.startswith("replace") and call.endswith(".old")]
    assert replaced, "no directory was replaced by another"


def check_it_goes_on(commands: Forker, situation: Situation, folder: Path) -> None:
    """Kill a command at its last checkpoint, and again; each time it goes on from the one before."""
    shutil.copytree(situation.folder, folder)
    ends = "checkpoints/checkpoint-6"
    at = next(
        number for number, call in enumerate(situation.calls) if call.startswith("replace") and call.endswith(ends)
    )
    killed = command(commands, folder, *situation.arguments, kill_at=at)
    assert "Run: outputs/debug/" in killed.output
    assert "Continuing from" not in killed.output
    repeated = command(commands, folder, *situation.arguments)
    assert re.search(r"Continuing from .*/checkpoint-3$", repeated.output, re.M), repeated.output
    assert fingerprint(folder / "outputs", folder / "cache") == situation.result


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nothing", "a finished run"])
def test_a_killed_run_goes_on_also_one_that_overwrites(
    commands: Forker, situations: dict[str, Situation], name: str, tmp_path: Path
) -> None:
    check_it_goes_on(commands, situations[name], tmp_path / "cut")


def kills(situation: Situation) -> list[tuple[int, bool]]:
    """Return every kill there is: before each call, and after each that is no mere wait for the disk."""
    before = [(number, False) for number in range(len(situation.calls))]
    return before + [(number, True) for number, call in enumerate(situation.calls) if not call.startswith("fsync")]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_killed_here_and_there(commands: Forker, situations: dict[str, Situation], name: str, tmp_path: Path) -> None:
    chosen = kills(situations[name])
    for kill in chosen[:: -(-len(chosen) // SPREAD)]:
        assert not faults(commands, situations[name], *kill, tmp_path / "cut")


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_killed_at_every_call(commands: Forker, situations: dict[str, Situation], name: str, tmp_path: Path) -> None:
    found: list[str] = []
    for kill in kills(situations[name]):
        found += faults(commands, situations[name], *kill, tmp_path / "cut")
    print(f"{name}: {len(kills(situations[name]))} kills, {len(found)} faults")
    assert not found
