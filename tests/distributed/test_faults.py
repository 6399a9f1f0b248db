"""What goes wrong in one of several processes, or is given wrong to them: a sentence, no hang, nothing left."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from kd.config import PretrainConfig
from kd.errors import ConfigError
from tests.commands import TINY, only_run, strict_json
from tests.commands import run as run_alone
from tests.trainers.helpers import make_batches, make_student, pretrain

from . import launch

JOBS = "tests.distributed.jobs"
pytestmark = pytest.mark.slow
LONG = (*TINY, "train.num_epochs=100", "train.max_steps=100", "train.save_interval=20", "train.eval_interval=1000")
LIMIT = 60
"""Seconds within which a group must end that has lost a process."""


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("unequal", 4, ["different numbers of batches", "5, 6"]),
        ("shuffled", 1, ["cannot be dealt to 2 processes", "DistributedSampler"]),
        ("careless", 1, ["self.module"]),
        ("memory", 1, []),
        ("optimizer", 2, ["train.strategy=fsdp", "optimizer"]),
        ("three", 2, ["3 micro-batches", "2 processes"]),
    ],
)
def test_a_fault_ends_all_processes_in_a_sentence(tmp_path: Path, name: str, code: int, words: list[str]) -> None:
    agent = launch.start("fault", str(tmp_path), name, module=JOBS)
    outcome = launch.finish(agent, LIMIT)
    assert outcome.code != 0
    said = [line for line in outcome.errors.splitlines() if line.startswith("rank ")]
    assert all(word in " ".join(said) for word in words)
    assert f"exitcode  : {code} " in outcome.errors
    assert launch.ranks_of(agent) == {}


def test_everything_else_that_a_training_does(tmp_path: Path) -> None:
    """See `tests.distributed.variety`."""
    outcome = launch.run(str(tmp_path), module="tests.distributed.variety")
    assert outcome.code == 0, outcome.errors


def test_a_trainer_that_has_not_joined_the_others_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for key, value in place.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match="process_group"):
        pretrain(make_student(), make_batches(2))


def test_parts_of_weights_need_other_processes() -> None:
    with pytest.raises(ConfigError, match=r"train\.strategy=fsdp .* torchrun"):
        pretrain(make_student(), make_batches(2), strategy="fsdp")
    assert PretrainConfig().strategy == "ddp"


# --- processes that end ---------------------------------------------------------------------------------------------


def curve(run: Path) -> dict[str, Any]:
    history: dict[str, Any] = strict_json(run / "history.json")
    return {key: history[key] for key in ("train_step", "train_loss", "kl_loss", "grad_norm", "val_loss", "tokens")}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The curve of one process that nobody interrupts."""
    folder = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("KD_CACHE", str(folder / "cache"))
        outcome = run_alone(*LONG, "train.gradient_accumulation_steps=2")
        assert outcome.code == 0, outcome.errors
        return curve(only_run())


def train_until_checkpoint(*arguments: str, step: int = 40) -> Any:
    """Start a training in two processes; return torchrun when it has left a checkpoint."""
    agent = launch.start(*(arguments or LONG), module="kd.train")
    until = time.monotonic() + 100
    while not list(Path("outputs").glob(f"debug/*/checkpoints/checkpoint-{step}/manifest.json")):
        assert agent.poll() is None, agent.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.02)
    return agent


def assert_goes_on(ways: tuple[str, ...], unbroken: dict[str, Any]) -> None:
    for way in ways:
        if way == "one":
            outcome = run_alone(*LONG, "train.gradient_accumulation_steps=2")
        else:
            outcome = launch.run(*LONG, f"train.strategy={way}", module="kd.train")
        assert outcome.code == 0, outcome.errors
    found = curve(only_run())
    assert found["train_step"] == unbroken["train_step"]
    for key, column in unbroken.items():
        assert found[key] == pytest.approx(column, rel=1e-4), key


@pytest.mark.parametrize(
    ("victim", "first", "then"), [(1, "ddp", ("one",)), (0, "ddp", ("ddp",)), (1, "fsdp", ("fsdp",))]
)
def test_a_killed_process_ends_the_group_and_its_run_goes_on(
    victim: int, first: str, then: tuple[str, ...], unbroken: dict[str, Any]
) -> None:
    agent = train_until_checkpoint(*LONG, f"train.strategy={first}")
    workers = launch.ranks_of(agent)
    assert sorted(workers) == [0, 1]
    os.kill(workers[victim], signal.SIGKILL)
    begin = time.monotonic()
    outcome = launch.finish(agent, LIMIT)
    assert time.monotonic() - begin < LIMIT
    assert outcome.code != 0
    assert not any(map(launch.is_alive, workers.values()))
    assert not (only_run() / "result.json").exists()
    assert_goes_on(then, unbroken)


@pytest.mark.parametrize(("victim", "then"), [(1, ("one",)), (0, ("fsdp",))])
def test_a_process_that_is_asked_to_stop_stops_all_at_the_same_step(
    victim: int, then: tuple[str, ...], unbroken: dict[str, Any]
) -> None:
    agent = train_until_checkpoint()
    workers = launch.ranks_of(agent)
    os.kill(workers[victim], signal.SIGTERM)
    outcome = launch.finish(agent, LIMIT)
    assert outcome.code != 0
    assert "checkpoint saved" in outcome.errors
    assert "Another process" not in outcome.errors
    stopped_at = max(int(path.name.split("-")[1]) for path in only_run().glob("checkpoints/checkpoint-*"))
    assert f"Stopped at step {stopped_at}/100" in outcome.errors
    assert not any(map(launch.is_alive, workers.values()))
    assert_goes_on(then, unbroken)


def test_a_live_run_is_refused_to_other_processes() -> None:
    endless = (*LONG[:-4], "train.num_epochs=9999", "train.max_steps=9999", *LONG[-2:])
    agent = train_until_checkpoint(*endless)
    try:
        for outcome in (
            launch.run(*endless, module="kd.train"),
            run_alone(*endless, "train.gradient_accumulation_steps=2"),
        ):
            assert outcome.code != 0
            assert "is being worked on by process" in outcome.errors
    finally:
        agent.send_signal(signal.SIGTERM)
        launch.finish(agent, LIMIT)
