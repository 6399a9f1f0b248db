"""The path without full logits: taken where it can be, said where it cannot, and the same training either way."""

import logging
from typing import Any

import pytest
import torch
from torch import nn

from kd.config import TrainingConfig
from kd.errors import ConfigError
from kd.heads import NoLinearHeadError
from kd.losses import causal_lm_loss, distillation_loss
from kd.teacher import LiveTeacher
from kd.trainers import DistillationTrainer
from kd.trainers.linear import LinearLoss
from kd.trainers.machine import require_compiler
from tests.test_heads import make_model

from .helpers import LENGTH, distill, make_batch, make_batches, make_student, pretrain

SETTINGS: dict[str, Any] = {"num_epochs": 1, "log_interval": 1}


class OnLogits(nn.Module):
    """Hides a model's head."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.inner(input_ids)


def assert_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Compare two histories up to rounding."""
    assert one.keys() == other.keys()
    for name, values in one.items():
        if values[0] is None:
            assert values == other[name], name
        else:
            assert values == pytest.approx(other[name], rel=1e-4), name


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_both_paths_train_alike(alpha: float) -> None:
    batches, settings = make_batches(6), SETTINGS | {"alpha": alpha, "temperature": 3.0}
    fast = distill(make_student(), batches, batches[:2], **settings)
    plain = distill(OnLogits(make_student()), batches, batches[:2], teacher=make_student(seed=77), **settings)
    one, other = fast.train(), plain.train()
    assert fast.linear_loss is not None
    assert plain.linear_loss is None
    assert_alike(one, other)


@pytest.mark.parametrize("name", ["llama", "phi", "gpt2"])
def test_a_student_of_transformers_is_trained_without_logits(name: str) -> None:
    student, teacher = make_model(name), make_model("qwen2")
    batch = make_batch(3, masked=(0, 5, LENGTH))
    config = TrainingConfig(alpha=0.3, temperature=2.0)
    trainer = DistillationTrainer(student, teacher, None, [batch], config, "cpu")
    terms = trainer.training_step(batch)
    assert trainer.linear_loss is not None
    found = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    logits, wanted = student(batch["input_ids"]).logits, teacher(batch["input_ids"]).logits
    loss, _ = distillation_loss(logits, wanted, batch["labels"], 0.3, 2.0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert terms["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    for parameter, expected in student.named_parameters():
        torch.testing.assert_close(found[parameter], expected.grad, rtol=1e-4, atol=1e-6)


def test_a_soft_capped_teacher_is_exact_and_a_soft_capped_student_takes_the_plain_path() -> None:
    capped = make_model("gemma2", final_logit_softcapping=0.5)
    batch = make_batch(2)
    config = TrainingConfig(alpha=1.0, temperature=1.0)
    trainer = DistillationTrainer(make_model("llama"), capped, None, [batch], config, "cpu")
    terms = trainer.training_step(batch)
    assert trainer.linear_loss is not None
    logits = make_model("llama")(batch["input_ids"]).logits
    loss, _ = distillation_loss(logits, capped(batch["input_ids"]).logits, batch["labels"], 1.0, 1.0)
    assert terms["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    student = make_model("gemma2", final_logit_softcapping=0.5)
    with pytest.raises(NoLinearHeadError, match="for teachers only"):
        LinearLoss(student)
    assert DistillationTrainer(student, make_model("llama"), None, [batch], config, "cpu").linear_loss is None


def test_the_run_says_which_path_it_takes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    pretrain(make_student(), make_batches(1), **SETTINGS).train()
    assert "loss from hidden states" in caplog.text
    caplog.clear()
    pretrain(OnLogits(make_student()), make_batches(1), **SETTINGS).train()
    assert "loss on full logits" in caplog.text
    assert "OnLogits does not say which module is its head" in caplog.text
    caplog.clear()
    distill(make_student(), make_batches(1), teacher=LiveTeacher(OnLogits(make_student()), torch.device("cpu"))).train()
    assert "the teacher gives nothing else" in caplog.text


def test_full_logits_are_never_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the head was called as a module")

    student = make_student()
    monkeypatch.setattr(student.lm_head, "forward", refuse)
    trainer = distill(student, make_batches(2), make_batches(1), **SETTINGS)
    assert isinstance(trainer.teacher, LiveTeacher)
    monkeypatch.setattr(trainer.teacher.model, "forward", refuse)
    trainer.train()


def test_gradients_reach_a_tied_weight_from_both_ends() -> None:
    batch, student = make_batch(2), make_student()
    loss, _ = LinearLoss(student)(batch["input_ids"], batch["labels"])
    loss.backward()
    found = student.embedding.weight.grad
    assert found is not None
    student = make_student()
    causal_lm_loss(student(batch["input_ids"]), batch["labels"]).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, student.embedding.weight.grad)


# --- compiling ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_compiled_body_trains_the_same() -> None:
    batches = make_batches(4)
    compiled = distill(make_student(), batches, batches[:2], compile=True, **SETTINGS).train()
    eager = distill(make_student(), batches, batches[:2], **SETTINGS).train()
    assert_alike(compiled, eager)


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(_: Any) -> Any:
        def fail(*_: Any) -> None:
            raise RuntimeError("no compiler\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(ConfigError, match=r"cannot compile here: no compiler A CPU.*train\.compile=false"):
        require_compiler(torch.device("cpu"))


def test_compiling_where_it_has_no_effect_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.compile=true has no effect here"):
        pretrain(OnLogits(make_student()), make_batches(1), compile=True, **SETTINGS).train()
