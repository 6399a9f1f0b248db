"""`python -m kd.train -m` as a user sees it: real processes, kills, exit codes, on every launcher that is installed."""

import json
import os
import shutil
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from .commands import TINY, Outcome, begin_children_with, run, start, strict_json

needs_joblib = pytest.mark.skipif(find_spec("joblib") is None, reason="the extra sweep is not installed")
needs_submitit = pytest.mark.skipif(find_spec("submitit") is None, reason="the extra slurm is not installed")
LAUNCHERS = {
    "basic": (),
    "joblib": ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
    "submitit": ("hydra/launcher=submitit",),
}
EVERYWHERE = [
    "basic",
    pytest.param("joblib", marks=[pytest.mark.slow, needs_joblib]),
    pytest.param("submitit", marks=[pytest.mark.slow, needs_submitit]),
]
SMALL_GRID = ("train.alpha=0,0.0,1", "model.dropout=0.1")
GRID = ("train.alpha=0,0.5,1", "train.temperature=1,2,4", "seed=0,1")
OTHER_ORDER = ("seed=1,0", "train.temperature=4,2,1", "train.alpha=1,0.5,0")
FAULTS = """
import os, signal
import kd.job
do_run = kd.job.do_run

def faulty(config, files):
    if config.seed == 1:
        raise ValueError("a planned fault")
    if config.seed == 2:
        sys.exit(9)
    if config.seed == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return do_run(config, files)

kd.job.do_run = faulty
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sweep that was not disturbed, and its cache of tokenizer, blocks and teacher."""
    folder = tmp_path_factory.mktemp("prepared")
    before = Path.cwd()
    os.chdir(folder)
    try:
        outcome = run("-m", *TINY, *SMALL_GRID, "name=whole", KD_CACHE=str(folder / "cache"))
    finally:
        os.chdir(before)
    assert outcome.code == 0, outcome.errors
    return folder


@pytest.fixture
def cache(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(prepared / "cache", tmp_path / "warm")
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "warm"))


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the runs of seeds 1, 2 and 3 raise, exit and be killed."""
    begin_children_with(FAULTS, tmp_path / "site", monkeypatch)


def sweep(*arguments: str, timeout: float = 300) -> Outcome:
    return run("-m", *TINY, *arguments, timeout=timeout)


def runs(experiment: str = "debug") -> list[Path]:
    return sorted(path for path in (Path("outputs") / experiment).iterdir() if path.name != "reports")


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def assert_same(first: Path, second: Path) -> None:
    """Two experiments hold the same runs, bit for bit but for what a clock measured."""
    assert [path.name for path in runs(first.name)] == [path.name for path in runs(second.name)]
    for ours in runs(first.name):
        theirs = second / ours.name
        for name in ("history.json", "result.json"):
            values = [strict_json(folder / name) for folder in (ours, theirs)]
            for value in values:
                del value["timing"]
            assert values[0] == values[1]
        np.testing.assert_array_equal(np.load(ours / "val_blocks.npy"), np.load(theirs / "val_blocks.npy"))
        weights = [load_file(folder / "checkpoints/checkpoint-6/model.safetensors") for folder in (ours, theirs)]
        for key in weights[0]:
            np.testing.assert_array_equal(weights[0][key], weights[1][key])


@pytest.mark.usefixtures("cache", "faults")
@pytest.mark.parametrize("launcher", EVERYWHERE)
def test_a_fault_costs_only_its_own_run(launcher: str) -> None:
    outcome = sweep(*LAUNCHERS[launcher], "seed=0,1,2,3,4")
    assert outcome.code == 1, outcome.errors
    assert "5 runs: 2 done, 3 failed" in outcome.output
    assert "3 of 5 runs are missing" in outcome.errors
    words = {1: "ValueError: a planned fault", 2: "", 3: "SIGKILL"}
    codes = {1: 1, 2: 9, 3: -9}
    for path in runs():
        seed = int(path.name.split("seed")[1].partition("-")[0])
        assert (path / "result.json").exists() == (seed in (0, 4))
        assert (path / "failure.json").exists() == (seed in words)
        if seed in words:
            failure = json.loads((path / "failure.json").read_text())
            assert failure["exit_code"] == codes[seed]
            assert words[seed] in failure["error"]
            assert Path(failure["log"]).is_file()
            assert f"log: {failure['log']}" in outcome.output
    assert "| ValueError: a planned fault" in outcome.output
    assert Path("outputs/debug/reports/report.html").is_file()


@pytest.mark.usefixtures("cache")
def test_a_killed_sweep_goes_on_and_a_finished_one_does_nothing(prepared: Path) -> None:
    shutil.copytree(prepared / "outputs/whole", "outputs/whole")
    process = start("-m", *TINY, *SMALL_GRID, "name=cut")
    deadline = time.monotonic() + 90
    while not list(Path("outputs").glob("cut/alpha1-*/checkpoints/checkpoint-3")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (done,) = Path("outputs/cut").glob("*/result.json")
    before = done.stat().st_mtime_ns
    outcome = sweep(*SMALL_GRID, "name=cut")
    assert outcome.code == 0, outcome.errors
    assert done.stat().st_mtime_ns == before
    assert "Sweep of 2 runs (3 points, some of which are the same run): 1 done, 1 to do" in outcome.output
    assert_same(Path("outputs/whole"), Path("outputs/cut"))
    before_third, started = contents(Path("outputs")), time.monotonic()
    outcome = sweep(*SMALL_GRID, "name=cut")
    assert time.monotonic() - started < 10
    assert outcome.code == 0
    assert "2 done, 0 to do" in outcome.output
    assert "2 runs: 2 done" in outcome.output
    assert contents(Path("outputs")) == before_third


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("launcher", EVERYWHERE)
def test_a_sweep_that_is_asked_to_stop_saves_first(launcher: str) -> None:
    long = ("train.max_steps=100000", "train.num_epochs=100000", "train.save_interval=50000")
    process = start("-m", *TINY, *LAUNCHERS[launcher], *long, "seed=0,1")
    deadline = time.monotonic() + 90
    while not list(Path("outputs").glob("debug/*/history.json")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # Ctrl-C on a terminal reaches the whole group.
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in output
    assert "2 of 2 runs missing" in errors
    assert list(Path("outputs").glob("debug/*/checkpoints/checkpoint-*/manifest.json"))
    assert not list(Path("outputs").glob("debug/*/failure.json"))


def test_a_sweep_of_a_hundred_points_with_two_bad_ones_is_refused(tmp_path: Path) -> None:
    started = time.monotonic()
    alphas = ",".join(str(value / 50) for value in range(49))
    outcome = sweep(f"train.alpha={alphas},1.5", "seed=0,1")
    assert time.monotonic() - started < 10
    assert outcome.code == 2
    assert "2 of 100 points" in outcome.errors
    assert "train.alpha=1.5 seed=0" in outcome.errors
    assert "train.alpha=1.5 seed=1" in outcome.errors
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_the_same_sweep_by_every_launcher_in_any_order_gives_the_same_bits() -> None:
    installed = [name for name in LAUNCHERS if name == "basic" or find_spec(name) is not None]
    for position, launcher in enumerate(installed):
        outcome = sweep(*LAUNCHERS[launcher], *(OTHER_ORDER if position % 2 else GRID), f"name={launcher}")
        assert outcome.code == 0, outcome.errors
        assert "14 runs: 14 done" in outcome.output
        assert len(runs(launcher)) == 14
        assert_same(Path("outputs/basic"), Path("outputs") / launcher)


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("launcher", EVERYWHERE)
def test_a_sweep_killed_at_any_moment_goes_on(launcher: str) -> None:
    for seconds in (2.0, 12.0):  # before its first run has begun, and in the midst of them
        process = start("-m", *TINY, *LAUNCHERS[launcher], *GRID)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    done = list(Path("outputs").glob("debug/*/result.json"))
    before = {path: path.stat().st_mtime_ns for path in done}
    outcome = sweep(*LAUNCHERS[launcher], *GRID)
    assert outcome.code == 0, outcome.errors
    assert len(runs()) == 14
    assert {path: path.stat().st_mtime_ns for path in done} == before


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_two_sweeps_share_the_work() -> None:
    first = start("-m", *TINY, "seed=0,1,2")
    second = start("-m", *TINY, "seed=0,1,2")
    outcomes = [process.communicate(timeout=120) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outcomes
    assert len(runs()) == 3
    for path in runs():
        assert (path / "train.log").read_text().count("DistillationTrainer: ") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_a_file_of_grids_runs_without_the_flag() -> None:
    Path("mine/sweep").mkdir(parents=True)
    grid = "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      seed: 0,1\n"
    Path("mine/sweep/own.yaml").write_text(grid)
    outcome = run("--config-dir", "mine", *TINY, "sweep=own")
    assert outcome.code == 0, outcome.errors
    assert "2 runs: 2 done" in outcome.output
