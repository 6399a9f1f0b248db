"""Live or cached teacher, on the command line: real processes, killed for real."""

import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from kd.data import PackedBlocks
from kd.teacher_cache import token_digests

from .commands import TINY, begin_children_with, only_run, run, start, strict_json
from .counting_train import SECONDS, SEEN_FILE

COUNTED = "tests.counting_train"


def cache() -> Path:
    return Path(os.environ["KD_CACHE"])


def seen(file: Path) -> Counter[str]:
    """Digests of the rows that the teacher's body saw."""
    return Counter(line.split()[0] for line in file.read_text().splitlines()) if file.exists() else Counter()


def all_blocks(train: int, validation: int) -> Counter[str]:
    """Digests of the tokens of all blocks that a run of the tiny profile trains on and validates with."""
    (store,) = (path for path in (cache() / "blocks").iterdir() if path.is_dir())
    parts = [PackedBlocks(store, "train", train), PackedBlocks(store, "validation", validation)]
    rows = torch.cat([part[list(range(len(part)))]["input_ids"] for part in parts])
    return Counter(str(digest) for digest in token_digests(rows))


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that holds what the teacher's body saw."""
    monkeypatch.setenv(SEEN_FILE, str(tmp_path / "rows"))
    return tmp_path / "rows"


@pytest.mark.slow
def test_a_sweep_shows_each_block_to_the_teacher_once(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        begin_children_with(f"from {COUNTED} import watch_teachers\nwatch_teachers()", tmp_path / "site", patch)
        outcome = run("-m", *TINY, "train.alpha=0,0.5,1", "train.temperature=1,4", "train.max_steps=null")
    assert outcome.code == 0, outcome.errors
    assert seen(rows) == all_blocks(32, 32)
    logs = [path.read_text() for path in Path("outputs").glob("debug/*/train.log")]
    assert sum("from the cache" in log for log in logs) == 5
    # What was cached serves other processes and settings too; the teacher is not even loaded.
    again = run(*TINY, "train.alpha=0.2", "train.max_steps=3", "teacher.cache=require", module=COUNTED)
    assert again.code == 0, again.errors
    assert seen(rows) == all_blocks(32, 32)


@pytest.mark.slow
def test_live_and_cached_runs_agree(rows: Path) -> None:
    results = []
    for mode, name in (("off", "live"), ("require", "first"), ("require", "second")):
        before = seen(rows).total()
        outcome = run(*TINY, f"teacher.cache={mode}", f"name={name}", "train.log_interval=1", module=COUNTED)
        assert outcome.code == 0, outcome.errors
        assert (seen(rows).total() > before) == (name != "second"), name
        results.append(strict_json(only_run(name) / "history.json"))
    live, *cached = results
    for history in cached:
        assert history["train_loss"][0] == pytest.approx(live["train_loss"][0], rel=1e-6)
        assert history["val_ppl"][-1] == pytest.approx(live["val_ppl"][-1], rel=1e-3)
        assert history["teacher_val_ppl"] == pytest.approx(live["teacher_val_ppl"], rel=1e-4)
    # How the teacher is met is no part of the identity.
    assert only_run("live").name == only_run("first").name == only_run("second").name


def test_a_run_shorter_than_an_epoch_keeps_the_teacher_live_and_says_so() -> None:
    outcome = run(*TINY, "train.max_steps=3")
    assert outcome.code == 0, outcome.errors
    assert "The teacher runs live: train.max_steps=3 ends before all 32 training blocks were seen" in outcome.output
    assert "(live, " in outcome.output
    assert not (cache() / "teacher-states").exists()


@pytest.mark.parametrize("signum", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_build_that_was_killed_goes_on(signum: signal.Signals, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECONDS, "0.005")
    arguments = (*TINY, "train.max_steps=null", "data.max_train_blocks=300")
    process = start(*arguments, module=COUNTED)
    deadline = time.monotonic() + 100
    while not list((cache() / "teacher-states").glob("*.partial/states-00002*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signum)
    process.communicate()
    assert process.returncode != 0, "it ended before it could be killed"
    before = seen(rows)
    outcome = run(*arguments, module=COUNTED)
    assert outcome.code == 0, outcome.errors
    assert "Continuing to build the teacher's hidden states" in outcome.output
    expected = all_blocks(300, 32)
    assert seen(rows).keys() == expected.keys()
    twice = sum((seen(rows) - expected).values())
    assert twice <= 1, "only the shard of one block that was being made is made again"
    assert 0 < sum(before.values()) < sum(expected.values())


@pytest.mark.slow
def test_a_damaged_cache_is_refused_with_the_folder_to_remove() -> None:
    assert run(*TINY, "train.max_steps=null").code == 0
    (file, *_) = (cache() / "teacher-states").glob("*/states-00000.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    outcome = run(*TINY, "train.max_steps=null", "train.alpha=0.9")
    assert outcome.code == 6
    assert str(file.parent) in outcome.errors
    assert "Traceback" not in outcome.errors


def test_what_the_cache_may_be_is_checked() -> None:
    outcome = run(*TINY, "teacher.cache=always")
    assert outcome.code == 2
    assert "teacher.cache=always is not allowed: use one of auto, off, require" in outcome.errors
