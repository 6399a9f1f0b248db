"""The tutorial's optimizers are torch's: same trajectories, same places where an optimizer can stand."""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from kd.config import PretrainConfig
from kd.model import StudentModel
from kd.optim import get_parameter_groups
from kd.trainers import PretrainTrainer
from kd.tutorial import AdamWFromScratch, SGDFromScratch
from kd.tutorial.optimizer_from_scratch import descend, distance, what_decay_leaves
from tests.trainers.helpers import make_batches, make_student, weights

from .networks import VOCAB, furthest, make_batch, make_model

STEPS = 100
Make = Callable[..., Optimizer]
ADAMW: list[dict[str, Any]] = [
    {},
    {"lr": 1e-2, "weight_decay": 0.0},
    {"lr": 3e-3, "weight_decay": 0.3},
    {"betas": (0.8, 0.95), "eps": 1e-4},
    {"betas": (0.0, 0.5), "lr": 1e-3, "eps": 1e-3},
]
SGD: list[dict[str, Any]] = [
    {"lr": 0.1},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.1},
    {"lr": 0.1, "weight_decay": 0.01},
]
CASES: list[tuple[Any, Any, dict[str, Any]]] = [(AdamWFromScratch, torch.optim.AdamW, settings) for settings in ADAMW]
CASES += [(SGDFromScratch, torch.optim.SGD, settings) for settings in SGD]
IDS = [f"{theirs.__name__}-{number}" for number, (_, theirs, _) in enumerate(CASES)]


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    groups = get_parameter_groups(model, weight_decay=0.2)
    groups[1]["lr"] = 0.02
    return groups


def train(model: nn.Module, optimizer: Optimizer, steps: Iterable[int] = range(STEPS)) -> None:
    for step in steps:
        batch = make_batch(step % 7)
        optimizer.zero_grad()
        logits = model(batch["input_ids"])
        F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("ours", "theirs", "settings"), CASES, ids=IDS)
def test_100_steps_are_torchs(ours: Make, theirs: Make, settings: dict[str, Any], dtype: torch.dtype) -> None:
    first, second, start = (make_model(dtype=dtype) for _ in range(3))
    train(first, partial(ours, **settings)(first.parameters()))
    train(second, partial(theirs, **settings)(second.parameters()))
    assert furthest(first, second) < (1e-6 if dtype == torch.float32 else 1e-12)
    assert furthest(first, start) > 1e-2  # they went somewhere


@pytest.mark.parametrize(("ours", "theirs"), [(AdamWFromScratch, torch.optim.AdamW), (SGDFromScratch, torch.optim.SGD)])
def test_parameter_groups_and_a_schedule_are_followed(ours: Make, theirs: Make) -> None:
    models = [make_model(dtype=torch.float64) for _ in range(3)]
    for model, make in zip(models, (ours, theirs), strict=False):
        optimizer = partial(make, lr=0.01)(two_groups(model))
        scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(STEPS):
            train(model, optimizer, [step])
            scheduler.step()
    assert furthest(models[0], models[1]) < 1e-12
    assert furthest(models[0], models[2]) > 1e-2


@pytest.mark.parametrize(("ours", "theirs", "settings"), [CASES[2], CASES[7]], ids=["AdamW", "SGD"])
def test_restored_state_goes_on_as_if_never_stopped(
    ours: Make, theirs: Make, settings: dict[str, Any], tmp_path: Path
) -> None:
    del theirs
    whole, stopped = make_model(), make_model()
    train(whole, partial(ours, **settings)(whole.parameters()), range(20))
    first = partial(ours, **settings)(stopped.parameters())
    train(stopped, first, range(9))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = ours(stopped.parameters())
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(stopped, second, range(9, 20))
    assert furthest(whole, stopped) == 0


def test_parameters_without_a_gradient_stay_and_make_no_step() -> None:
    models = [make_model(dtype=torch.float64) for _ in range(2)]
    before = copy.deepcopy(models[0].hidden.weight)
    for model, make in zip(models, (AdamWFromScratch, torch.optim.AdamW), strict=True):
        model.hidden.requires_grad_(False)
        optimizer = make(model.parameters(), lr=0.01)
        train(model, optimizer, range(10))
        model.hidden.requires_grad_(True)
        train(model, optimizer, range(10, 11))
    assert not torch.equal(models[0].hidden.weight, before)
    assert furthest(models[0], models[1]) < 1e-12


def test_a_closure_is_called_once_with_gradients_and_its_value_returned() -> None:
    theta = nn.Parameter(torch.tensor([2.0]))
    optimizer = SGDFromScratch([theta], lr=0.5)

    def closure() -> float:
        loss = (theta**2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    assert optimizer.step(closure) == 4.0
    assert theta.item() == 0.0  # 2 - 0.5 * 4


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: SGDFromScratch([nn.Parameter(torch.ones(1))], lr=-1.0), "lr=-1.0"),
        (lambda: SGDFromScratch([nn.Parameter(torch.ones(1))], momentum=1.0), "momentum=1.0"),
        (lambda: SGDFromScratch([nn.Parameter(torch.ones(1))], weight_decay=-0.1), "weight_decay=-0.1"),
        (lambda: AdamWFromScratch([nn.Parameter(torch.ones(1))], lr=float("nan")), "lr=nan"),
        (lambda: AdamWFromScratch([nn.Parameter(torch.ones(1))], betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\)"),
        (lambda: AdamWFromScratch([nn.Parameter(torch.ones(1))], eps=-1.0), "eps=-1.0"),
        (lambda: AdamWFromScratch([nn.Parameter(torch.ones(1))], weight_decay=-1.0), "weight_decay=-1.0"),
    ],
)
def test_values_out_of_range_are_refused_by_name(make: Callable[[], Optimizer], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make()


# --- what the file shows ------------------------------------------------------------------------------------------


def test_the_tables_are_what_a_pocket_calculator_gives() -> None:
    rows = descend(lambda params: SGDFromScratch(params, lr=0.1, momentum=0.9), 3)
    assert [row["velocity"] for row in rows] == pytest.approx([1.0, 1.8, 2.34])
    assert [row["theta"] for row in rows] == pytest.approx([0.9, 0.72, 0.486])
    row = descend(lambda params: AdamWFromScratch(params, lr=0.1, weight_decay=0.0), 1)[0]
    assert row == pytest.approx({"g": 1, "step": 1, "first_moment": 0.1, "second_moment": 1e-3, "theta": 0.9})


def test_decoupled_decay_does_not_depend_on_the_gradient_and_decay_in_the_gradient_does() -> None:
    bare = what_decay_leaves(lambda params: AdamWFromScratch(params, lr=0.01, weight_decay=0.0))
    coupled = what_decay_leaves(lambda params: torch.optim.Adam(params, lr=0.01, weight_decay=0.1))
    decoupled = what_decay_leaves(lambda params: AdamWFromScratch(params, lr=0.01, weight_decay=0.1))
    assert decoupled / bare == pytest.approx(0.999**100, abs=1e-3)
    assert coupled / bare == pytest.approx(0.9999**100, abs=1e-3)


def test_the_shown_distance_from_torch_is_rounding() -> None:
    assert distance(AdamWFromScratch, torch.optim.AdamW, torch.float64) < 1e-12
    assert distance(AdamWFromScratch, lambda p: torch.optim.AdamW(p, weight_decay=0.02), torch.float64) > 1e-6


# --- in the real trainers -----------------------------------------------------------------------------------------


def pretrain(model: StudentModel, make: Make, run_dir: Path, **settings: Any) -> PretrainTrainer:
    config = PretrainConfig(warmup_steps=3, num_epochs=5, eval_interval=4, log_interval=4, **settings)
    optimizer = make(get_parameter_groups(model, weight_decay=0.1))
    batches = make_batches(8)
    return PretrainTrainer(model, optimizer, batches[:6], batches[6:], config=config, device="cpu", run_dir=run_dir)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (partial(AdamWFromScratch, lr=3e-3), partial(torch.optim.AdamW, lr=3e-3)),
        (partial(SGDFromScratch, lr=0.05, momentum=0.9), partial(torch.optim.SGD, lr=0.05, momentum=0.9)),
    ],
    ids=["AdamW", "SGD"],
)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_real_trainer_takes_them_as_torchs(ours: Make, theirs: Make, precision: str, tmp_path: Path) -> None:
    models, histories = [make_student() for _ in range(3)], []
    for model, make, name in zip(models, (ours, theirs), ("ours", "theirs"), strict=False):
        histories.append(pretrain(model, make, tmp_path / name, precision=precision).train())
    tolerance = 1e-5 if precision == "float32" else 1e-3  # half precision rounds what rounding made differ
    assert furthest(models[0], models[1]) < tolerance < furthest(models[0], models[2]) / 10
    assert histories[0]["val_step"] == histories[1]["val_step"] != []
    for key in ("train_loss", "val_loss", "learning_rate", "grad_norm"):
        assert histories[0][key] == pytest.approx(histories[1][key], rel=100 * tolerance), key


def test_the_real_trainers_checkpoint_restores_them(tmp_path: Path) -> None:
    make = partial(AdamWFromScratch, lr=3e-3)
    whole, stopped = make_student(), make_student()
    pretrain(whole, make, tmp_path / "whole", save_interval=13).train()
    trainer = pretrain(stopped, make, tmp_path / "stopped")
    trainer.load_checkpoint(tmp_path / "whole" / "checkpoints" / "checkpoint-13")
    trainer.train()
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(stopped).items())


def test_the_data_have_every_token() -> None:
    """Or some rows of the embedding would compare as equal because nothing touches them."""
    seen = torch.cat([make_batch(seed)["input_ids"] for seed in range(7)])
    assert len(set(seen.flatten().tolist())) == VOCAB
