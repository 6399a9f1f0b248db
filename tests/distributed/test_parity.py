"""Two processes do what one does with twice the accumulation, and either goes on where the other stopped."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kd.checkpoint_files import ADAPTER_FILE, MODEL_FILE
from tests.extras import extra

from . import launch
from .jobs import ADAPTED, FOR_FSDP, JOBS, SAVED_AT, STEPS, continue_job, do_job, make_trainer

TOLERANCE = 1e-5
FOR_ADAPTERS = 1e-4
"""They begin at 0, so that all of a weight is what rounding differs in."""
MODULE = "tests.distributed.jobs"


class Ends:
    """The runs of some jobs, in one process and in two with each strategy."""

    def __init__(self, folder: Path, names: tuple[str, ...]) -> None:
        self.folder = folder
        outcome = launch.run("train", str(folder), *names, module=MODULE)
        assert outcome.code == 0, outcome.errors
        for name in names:
            do_job(name, folder / "one" / name)

    def history(self, *place: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.folder.joinpath(*place, "history.json").read_text())
        return content

    def weights(self, *place: str) -> dict[str, torch.Tensor]:
        checkpoint = self.folder.joinpath(*place, "checkpoints", f"checkpoint-{STEPS}")
        return load_file(checkpoint / (ADAPTER_FILE if place[1] in ADAPTED else MODEL_FILE))


def assert_same_curve(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert len(expected["train_loss"]) == STEPS
    for key, column in expected.items():
        if isinstance(column, list):
            assert found[key] == pytest.approx(column, rel=tolerance, abs=tolerance / 10), key
        elif key != "timing":
            assert found[key] == column, key


def assert_same_end(ends: Ends, *place: str, name: str) -> None:
    tolerance = FOR_ADAPTERS if name in ADAPTED else TOLERANCE
    expected, found = ends.weights("one", name), ends.weights(*place)
    assert expected.keys() == found.keys()
    assert not any(key.startswith("module.") for key in found)
    for key, value in expected.items():
        assert float((found[key] - value).norm() / value.norm()) < tolerance, key
    assert_same_curve(ends.history(*place), ends.history("one", name), tolerance)


def test_two_processes_pretrain_like_one(tmp_path: Path) -> None:
    ends = Ends(tmp_path, ("pretrain",))
    losses = ends.history("one", "pretrain")["train_loss"]
    assert abs(losses[-1] / losses[0] - 1) > 0.05
    for strategy in ("ddp", "fsdp"):
        assert_same_end(ends, strategy, "pretrain", name="pretrain")
        scores = [tmp_path / place / "pretrain" / "scores.json" for place in ("one", strategy)]
        assert scores[0].read_text() == scores[1].read_text()


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Ends:
    return Ends(tmp_path_factory.mktemp("ends"), tuple(JOBS))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "strategy"), [*((x, "ddp") for x in JOBS), *((x, "fsdp") for x in FOR_FSDP)])
def test_every_trainer_in_two_processes_is_as_in_one(ends: Ends, name: str, strategy: str) -> None:
    losses = ends.history("one", name)["train_loss"]
    assert abs(losses[-1] - losses[0]) > 0.05
    assert_same_end(ends, strategy, name, name=name)


@pytest.mark.slow
def test_the_tolerance_tells_a_lost_micro_batch(ends: Ends, tmp_path: Path) -> None:
    """Without this, the tests above could pass because nothing in these runs matters."""
    trainer = make_trainer("pretrain", tmp_path)
    assert isinstance(trainer.train_loader, list)
    trainer.train_loader[-1] = trainer.train_loader[0]
    trainer.train()
    losses = ends.history("one", "pretrain")["train_loss"]
    assert trainer.history.train["train_loss"] != pytest.approx(losses, rel=10 * TOLERANCE)


@pytest.mark.slow
def test_a_checkpoint_goes_on_anywhere(ends: Ends) -> None:
    """From one process, from whole models, from parts of one: to each of the three."""
    assert_goes_on_anywhere(ends)


def assert_goes_on_anywhere(ends: Ends) -> None:
    outcome = launch.run("go_on", str(ends.folder), module=MODULE)
    assert outcome.code == 0, outcome.errors
    for run in sorted(ends.folder.glob("*/*")):
        name = run.name
        continue_job(name, run / "checkpoints" / f"checkpoint-{SAVED_AT}", run / "to-one")
        ways = ("one", "ddp", "fsdp") if name in FOR_FSDP else ("one", "ddp")
        for way in ways:
            assert_same_end(ends, run.parent.name, name, f"to-{way}", name=name)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Ends:
    extra("peft", "lora")
    return Ends(tmp_path_factory.mktemp("adapted"), tuple(ADAPTED))


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_in_two_processes_are_as_in_one(adapted: Ends, name: str) -> None:
    losses = adapted.history("one", name)["train_loss"]
    assert abs(losses[-1] - losses[0]) > 0.01
    assert all(".lora_" in key for key in adapted.weights("ddp", name))
    assert_same_end(adapted, "ddp", name, name=name)


@pytest.mark.slow
def test_a_checkpoint_of_adapters_goes_on_anywhere(adapted: Ends) -> None:
    assert_goes_on_anywhere(adapted)


@pytest.mark.slow
def test_loaders_of_ones_own_give_the_same_losses(tmp_path: Path) -> None:
    from .jobs import own_loaders

    outcome = launch.run("own_loaders", str(tmp_path / "two"), module=MODULE)
    assert outcome.code == 0, outcome.errors
    own_loaders(str(tmp_path / "one"))
    losses = {
        str(path.relative_to(tmp_path).parent): json.loads(path.read_text())["train_loss"]
        for path in tmp_path.glob("*/*/history.json")
    }
    # Without shuffling the sampler deals row by row, as the trainer does.
    for name in ("plain", "dealing", "in order 0", "in order 2"):
        assert losses[f"two/{name}"] == pytest.approx(losses["one/plain"], rel=TOLERANCE), name
    for name in ("two/shuffled 0", "two/shuffled 2", "one/shuffled 2"):
        assert losses[name] == pytest.approx(losses["one/shuffled 0"], rel=TOLERANCE), name
    assert losses["one/shuffled 0"] != pytest.approx(losses["one/plain"], rel=100 * TOLERANCE)


@pytest.mark.slow
def test_processes_drop_different_activations(tmp_path: Path) -> None:
    outcome = launch.run("dropout", str(tmp_path), module=MODULE)
    assert outcome.code == 0, outcome.errors
    assert (tmp_path / "rank0").read_text() != (tmp_path / "rank1").read_text()
