"""The command line under torchrun, on one machine and on two."""

import re
import socket

import pytest

from tests.commands import REPOSITORY, TINY, only_run, strict_json
from tests.commands import run as run_alone

from . import launch

pytestmark = pytest.mark.slow
EXAMPLE = REPOSITORY / "experiments" / "examples" / "distributed_training.py"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def test_a_run_in_two_processes_is_the_run_of_one_with_twice_the_accumulation() -> None:
    outcome = launch.run(*TINY, module="kd.train")
    assert outcome.code == 0, outcome.errors
    assert outcome.output.count("Training the embedded teacher") == 1  # one makes it, and one speaks
    assert "x 2 processes (ddp)" in outcome.output
    run = only_run()
    before = (run / "result.json").read_text()
    for again in (
        launch.run(*TINY, "train.strategy=fsdp", module="kd.train"),
        run_alone(*TINY, "train.gradient_accumulation_steps=2"),
    ):
        assert again.code == 0, again.errors
        assert again.output.count("Already done") == 1
    assert (run / "result.json").read_text() == before
    names = {path.name for path in run.iterdir()}
    assert {"history.json", "val_blocks.npy", "test_blocks.npy", "samples.txt", "train.log"} <= names


def test_a_run_with_parts_of_weights_ends_like_one_process() -> None:
    for arguments in ((*TINY, "name=parts", "train.strategy=fsdp"), (*TINY, "name=whole")):
        outcome = launch.run(*arguments, module="kd.train")
        assert outcome.code == 0, outcome.errors
    assert run_alone(*TINY, "name=one", "train.gradient_accumulation_steps=2").code == 0
    results = [strict_json(only_run(name) / "result.json") for name in ("one", "whole", "parts")]
    for result in results[1:]:
        for key in ("steps", "tokens", "val_loss", "test_loss", "val_kl", "best_step", "flops", "parameters"):
            assert result[key] == pytest.approx(results[0][key], rel=1e-5), key
    samples = [(only_run(name) / "samples.txt").read_text() for name in ("one", "whole", "parts")]
    assert samples[0].count("===") == samples[1].count("===") == samples[2].count("===") > 0


def test_two_machines() -> None:
    """Rehearsed on one, by two agents that meet at the loopback address."""
    meeting = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}")
    agents = [launch.start_agent(*meeting, f"--node-rank={node}", "-m", "kd.train", *TINY) for node in range(2)]
    outcomes = [launch.finish(agent) for agent in agents]
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert "x 2 processes" in "".join(outcome.output for outcome in outcomes)
    assert (only_run() / "result.json").is_file()


def test_the_example_shows_its_result_alone_and_in_two_processes() -> None:
    figures = []
    for outcome in (
        launch.finish(launch.start_agent("--standalone", "--nproc-per-node=2", str(EXAMPLE))),
        launch.finish(launch.start_agent("--standalone", "--nproc-per-node=2", str(EXAMPLE), "fsdp")),
    ):
        assert outcome.code == 0, outcome.errors
        figures.append([float(x) for x in re.findall(r"\d+\.\d{3}", outcome.output)])
    assert figures[0][-1] < figures[0][0] / 2
    assert figures[1] == pytest.approx(figures[0], abs=0.02)
