"""The command line under torchrun, on one machine and on two."""

import re
import socket

import pytest
import torch

from kd.checkpoint_files import MERGED, MODEL_FILE, QUANTIZED
from kd.student import load_student
from tests.commands import REPOSITORY, TINY, only_run, strict_json
from tests.commands import run as run_alone
from tests.extras import extra

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


@pytest.mark.parametrize(
    ("override", "package", "folder", "tolerance"),
    [
        ("adapter=lora", ("peft", "lora"), MERGED, 1e-4),
        ("quantization=int8", ("torchao", "qat"), QUANTIZED, 1e-2),  # a last digit may decide what is rounded up
    ],
)
def test_what_a_run_gives_at_its_end_is_what_one_process_gives(
    override: str, package: tuple[str, str], folder: str, tolerance: float
) -> None:
    extra(*package)
    outcome = launch.run(*TINY, override, "name=two", module="kd.train")
    assert outcome.code == 0, outcome.errors
    assert run_alone(*TINY, override, "name=one", "train.gradient_accumulation_steps=2").code == 0
    one, two = (only_run(name) for name in ("one", "two"))
    assert one.name == two.name
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    assert (two / folder / MODEL_FILE).is_file()
    expected, found = (strict_json(run / "result.json") for run in (one, two))
    assert expected.keys() == found.keys()
    for key in [key for key in expected if key.endswith(("loss", "steps", "parameters", "flops"))]:
        assert found[key] == pytest.approx(expected[key], rel=tolerance), key
    ids = torch.arange(20).unsqueeze(0)
    logits = [load_student(run).model(ids) for run in (one, two)]
    torch.testing.assert_close(logits[1], logits[0], rtol=tolerance, atol=10 * tolerance)


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
