"""Mixed precision: float32 weights, half-precision products, and gradients that are measured without the loss scale."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd.errors import Interrupted, NumericError
from kd.losses import distillation_loss
from kd.model import StudentModel
from kd.teacher import LiveTeacher
from kd.trainers.precision import Precision
from kd.trainers.state import Batch

from .helpers import (
    MakeTrainer,
    checkpoints_in,
    distill,
    first_gradients,
    history_of,
    make_batches,
    make_student,
    same_tensors,
    stop_in,
    weights,
)

HALF = ("bfloat16", "float16")
SETTINGS: dict[str, Any] = {"num_epochs": 2, "log_interval": 4, "gradient_accumulation_steps": 2, "learning_rate": 3e-3}


def product_dtypes(model: nn.Module) -> set[torch.dtype]:
    """Collect what the blocks' matrix products give from now on, in training."""
    seen: set[torch.dtype] = set()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not model.get_parameter("embedding.weight"):
            module.register_forward_hook(lambda m, _i, out: seen.add(out.dtype) if m.training else None)
    return seen


@pytest.mark.parametrize("precision", HALF)
def test_products_are_in_half_precision_and_weights_are_not(make_trainer: MakeTrainer, precision: str) -> None:
    model = make_student()
    seen = product_dtypes(model)
    trainer = make_trainer(model, make_batches(4), make_batches(2, seed=1), precision=precision, **SETTINGS)
    trainer.train()
    assert seen == {getattr(torch, precision)}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", HALF)
def test_gradients_are_those_of_float32_but_for_rounding(make_trainer: MakeTrainer, precision: str) -> None:
    expected = first_gradients(make_trainer(make_student(), make_batches(4), gradient_clip=1e9, **SETTINGS))
    found = first_gradients(
        make_trainer(make_student(), make_batches(4), gradient_clip=1e9, precision=precision, **SETTINGS)
    )
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # In float16 this holds only if the loss scale was taken out again before the optimizer saw them.
        assert float((found[name] - gradient).norm() / gradient.norm()) < 0.05, name


@pytest.mark.parametrize("precision", HALF)
def test_the_clip_sees_gradients_without_the_loss_scale(make_trainer: MakeTrainer, precision: str) -> None:
    norms = []
    for name in ("float32", precision):
        trainer = make_trainer(make_student(), make_batches(8), precision=name, **SETTINGS | {"log_interval": 1})
        trainer.train()
        norms.append(torch.tensor(trainer.history.train["grad_norm"][:3]))
    torch.testing.assert_close(norms[1], norms[0], rtol=0.05, atol=0)


def test_a_loss_scale_that_overflows_is_lowered_and_nothing_else(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(make_student(), make_batches(40), precision="float16", **SETTINGS)
    trainer.precision.load_state_dict(trainer.precision.state_dict() | {"scale": 2.0**40})
    with caplog.at_level(logging.INFO, logger="kd"):
        trainer.train()
    assert "float16 gradients overflowed" in caplog.text
    assert "not finite" not in caplog.text
    assert trainer.precision.scale_factor < 2.0**40
    assert all(bool(torch.isfinite(value).all()) for value in weights(trainer.model).values())


def test_float16_gradients_that_no_scale_makes_finite_end_the_run(make_trainer: MakeTrainer) -> None:
    model = make_student()

    def spoil(gradient: Tensor) -> Tensor:
        return torch.full_like(gradient, float("nan"))

    model.layers[0].ffn.up_proj.weight.register_hook(spoil)
    trainer = make_trainer(model, make_batches(100), precision="float16", **SETTINGS)
    with pytest.raises(NumericError, match="diverged"):
        trainer.train()


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_norm_that_overflows_though_no_gradient_does_ends_the_run(
    make_trainer: MakeTrainer, precision: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_student()
    trainer = make_trainer(model, make_batches(100), precision=precision, **SETTINGS)

    def enlarge(gradient: Tensor) -> Tensor:  # finite with the loss scale, and without
        return torch.full_like(gradient, 1e30)

    model.layers[0].ffn.up_proj.weight.register_hook(enlarge)
    with caplog.at_level(logging.WARNING, logger="kd"), pytest.raises(NumericError, match="diverged"):
        trainer.train()
    assert "their norm overflows" in caplog.text


def test_a_float16_run_whose_every_step_overflows_is_not_done(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(make_student(), make_batches(4), precision="float16", run_dir=tmp_path, **SETTINGS)
    trainer.precision.load_state_dict(trainer.precision.state_dict() | {"scale": 2.0**127})
    with pytest.raises(NumericError, match="None of the 4 optimizer steps was taken"):
        trainer.train()
    assert checkpoints_in(tmp_path) == []


def test_a_stopped_float16_run_ends_with_the_same_bits(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def fresh(run_dir: Path) -> Any:
        student = make_student(dropout=0.2)
        return make_trainer(student, make_batches(10), run_dir=run_dir, precision="float16", **SETTINGS)

    unstopped = fresh(tmp_path / "a")
    unstopped.train()
    again = fresh(tmp_path / "b")
    stop_in(again, 4)
    with pytest.raises(Interrupted):
        again.train()
    resumed = fresh(tmp_path / "b")
    resumed.load_checkpoint(tmp_path / "b" / "checkpoints" / "checkpoint-4")
    assert resumed.precision.state_dict() == again.precision.state_dict()
    resumed.train()
    assert resumed.precision.state_dict() == unstopped.precision.state_dict()
    assert same_tensors(weights(resumed.model), weights(unstopped.model))
    assert history_of(resumed) == history_of(unstopped)


def test_a_live_teacher_keeps_its_own_precision() -> None:
    teacher = LiveTeacher(make_student(seed=5), torch.device("cpu"))
    batch = make_batches(1)[0]
    expected = teacher.hidden(batch), teacher.logits(batch)
    with Precision("bfloat16", torch.device("cpu")).autocast():
        found = teacher.hidden(batch), teacher.logits(batch)
    assert same_tensors(dict(enumerate(found)), dict(enumerate(expected)))  # type: ignore[arg-type]


class LogitsOnly:
    """A teacher that gives logits alone, by a head of its own; as one from the cache to a student without one."""

    description, flops_per_token, head = "a test", 0.0, None

    def __init__(self, model: StudentModel) -> None:
        self.live = LiveTeacher(model, torch.device("cpu"))

    def hidden(self, batch: Batch) -> Tensor:
        return self.live.hidden(batch)

    def logits(self, batch: Batch) -> Tensor:
        assert self.live.head is not None
        return self.live.head.logits(self.hidden(batch))


@pytest.mark.parametrize("precision", HALF)
def test_with_and_without_logits_a_loss_in_half_precision_is_the_same(precision: str) -> None:
    """Both round the student's products and leave the teacher's alone."""
    batch, model = make_batches(1)[0], make_student(seed=5)
    teacher_logits = LiveTeacher(model, torch.device("cpu")).logits(batch)
    student = make_student()
    with torch.autocast("cpu", getattr(torch, precision)):
        expected, terms = distillation_loss(student(batch["input_ids"]), teacher_logits, batch["labels"], 0.9, 2.0)
    expected.backward()  # type: ignore[no-untyped-call]
    for teacher in (model, LogitsOnly(model)):
        trainer = distill(make_student(), [batch], teacher=teacher, precision=precision, alpha=0.9, temperature=2.0)
        assert (trainer.linear_loss is None) == isinstance(teacher, LogitsOnly)
        found = trainer.training_step(batch)
        for name in ("kl_loss", "ce_loss"):
            assert found[name] == pytest.approx(float(terms[name]), rel=2e-5), name
        for (name, ours), theirs in zip(trainer.model.named_parameters(), student.parameters(), strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            difference = ours.grad / trainer.precision.scale_factor - theirs.grad
            assert float(difference.norm() / theirs.grad.norm()) < 0.01, name


@pytest.mark.parametrize("precision", HALF)
def test_evaluations_are_in_float32_whatever_trains(make_trainer: MakeTrainer, precision: str) -> None:
    """So that runs of different precision compare."""
    batches = make_batches(3, seed=1)
    expected = make_trainer(make_student(), None, batches).evaluate()
    trainer = make_trainer(make_student(), None, batches, precision=precision)
    assert trainer.evaluate() == expected
    with trainer.precision.autocast():
        assert trainer.evaluate() == expected
