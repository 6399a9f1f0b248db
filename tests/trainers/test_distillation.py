"""DistillationTrainer: the specified contract, the loss that it trains on, and the teacher's part in it."""

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd.checkpoint_files import MODEL_FILE
from kd.config import TrainingConfig
from kd.errors import Interrupted, NumericError
from kd.heads import LinearHead
from kd.losses import IGNORE_INDEX, distillation_loss
from kd.model import forward_flops_per_token, num_parameters
from kd.teacher import LiveTeacher
from kd.teacher_cache import CachedTeacher
from kd.trainers import DistillationTrainer
from kd.trainers.state import Batch

from .helpers import (
    LENGTH,
    VOCAB,
    distill,
    first_gradients,
    make_batch,
    make_batches,
    make_student,
    pretrain,
    same_tensors,
    stop_in,
    weights,
)


class CountingTeacher(nn.Module):
    """Counts its calls; gives logits as a tensor, or in a mapping."""

    def __init__(self, as_mapping: bool = False) -> None:
        super().__init__()
        self.inner = make_student(seed=77, dropout=0.5)
        self.as_mapping = as_mapping
        self.calls = 0

    def forward(self, input_ids: Tensor) -> Any:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls += 1
        logits = self.inner(input_ids)
        return {"logits": logits} if self.as_mapping else logits


class FixedTeacher:
    """No module at all, and without a head."""

    description = "fixed"
    flops_per_token = 0.0
    head = None

    def hidden(self, batch: Batch) -> Tensor:  # noqa: ARG002 - of the protocol
        raise AssertionError("there are no hidden states to ask for")

    def logits(self, batch: Batch) -> Tensor:
        ids = batch["input_ids"]
        return 3.0 * torch.nn.functional.one_hot((ids + 1) % VOCAB, VOCAB).float()


class BrokenTeacher(FixedTeacher):
    """One that was whole when training began."""

    def logits(self, batch: Batch) -> Tensor:
        return super().logits(batch) * math.nan


# --- contract ---------------------------------------------------------------------------------------------------


def test_the_constructor_takes_what_is_specified() -> None:
    names = list(inspect.signature(DistillationTrainer).parameters)
    assert names[:6] == ["student_model", "teacher_model", "train_loader", "val_loader", "config", "device"]
    config = TrainingConfig(num_epochs=1)
    student, teacher = make_student(), make_student(seed=1)
    trainer = DistillationTrainer(student, teacher, make_batches(3), make_batches(2), config, torch.device("cpu"))
    assert trainer.state == "initialized"
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert trainer.lr_scheduler.optimizer is trainer.optimizer
    history = trainer.train()
    assert {"train_loss", "val_loss", "val_ppl"} <= history.keys()
    assert trainer.state == "completed"
    assert {"val_loss", "val_ppl"} <= trainer.evaluate().keys()


def test_a_history_holds_both_terms_and_they_add_up() -> None:
    settings = {"alpha": 0.3, "temperature": 3.0, "log_interval": 2, "num_epochs": 1}
    history = distill(make_student(), make_batches(6), **settings).train()
    assert len(history["train_loss"]) == len(history["kl_loss"]) == len(history["ce_loss"]) == 3
    for total, kl, ce in zip(history["train_loss"], history["kl_loss"], history["ce_loss"], strict=True):
        assert total == pytest.approx(0.3 * kl + 0.7 * ce, rel=1e-5)  # type: ignore[operator]


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_without_a_teacher_only_alpha_zero_is_allowed(alpha: float) -> None:
    config = TrainingConfig(alpha=alpha)
    with pytest.raises(ValueError, match=rf"train\.alpha={alpha} needs a teacher_model"):
        DistillationTrainer(make_student(), None, make_batches(2), None, config, "cpu")


# --- loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_is_the_distillation_loss_of_both_models_logits(alpha: float, temperature: float) -> None:
    batch = make_batch(3, masked=(0, 5, LENGTH))
    trainer = distill(make_student(), None, alpha=alpha, temperature=temperature)
    assert isinstance(trainer.teacher, LiveTeacher)
    terms = trainer.training_step(batch)
    student = make_student()
    logits = student(batch["input_ids"])
    teacher_logits = trainer.teacher.model(batch["input_ids"])
    loss, expected = distillation_loss(logits, teacher_logits, batch["labels"], alpha, temperature)
    assert terms["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert terms["ce_loss"] == pytest.approx(float(expected["ce_loss"]), rel=1e-5)
    assert ("kl_loss" in terms) == (alpha > 0)
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, student.get_parameter(name).grad)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_training_on_a_fixed_batch_lowers_the_loss(alpha: float) -> None:
    batch = make_batch(2, masked=(0, 3))
    settings = {"alpha": alpha, "num_epochs": 60, "learning_rate": 5e-3, "log_interval": 1}
    losses = distill(make_student(), [batch], **settings).train()["train_loss"]
    assert losses[-1] < 0.5 * losses[0]  # type: ignore[operator]


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    teacher = make_student(seed=77)
    settings = {"alpha": 1.0, "temperature": 2.0, "gradient_clip": 1e9, "num_epochs": 1, "log_interval": 1}
    trainer = distill(make_student(seed=77), make_batches(2), make_batches(2), teacher=teacher, **settings)
    gradients = first_gradients(trainer)
    assert all(float(grad.abs().max()) < 1e-4 for grad in gradients.values())
    assert trainer.history.train["kl_loss"][0] == pytest.approx(0.0, abs=1e-5)
    metrics = distill(make_student(seed=77), None, make_batches(2), teacher=teacher).evaluate()
    assert metrics["val_kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["val_agreement"] == 1.0
    assert metrics["teacher_val_ppl"] == pytest.approx(metrics["val_ppl"])


def test_labels_play_no_part_at_alpha_one() -> None:
    batch = make_batch(2)
    other = {**batch, "labels": (batch["labels"] + 1) % VOCAB}
    ends = []
    for data in (batch, other):
        trainer = distill(make_student(), [data], alpha=1.0, num_epochs=3)
        trainer.train()
        ends.append(weights(trainer.model))
    assert same_tensors(*ends)


# --- the teacher ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_mapping", [False, True])
def test_the_teacher_is_frozen_and_in_eval_mode(as_mapping: bool) -> None:
    teacher = CountingTeacher(as_mapping)
    before = weights(teacher)
    trainer = distill(make_student(), make_batches(3), make_batches(2), teacher=teacher, num_epochs=1)
    trainer.train()
    assert teacher.calls == 3 + 2
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert same_tensors(before, weights(teacher))
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in trainer.model.parameters()}


def test_the_form_of_the_teachers_answer_does_not_matter() -> None:
    ends = []
    for as_mapping in (False, True):
        trainer = distill(make_student(), make_batches(3), teacher=CountingTeacher(as_mapping), num_epochs=1)
        trainer.train()
        ends.append(weights(trainer.model))
    assert same_tensors(*ends)


def test_a_teacher_need_not_be_a_module() -> None:
    settings = {"alpha": 1.0, "num_epochs": 40, "log_interval": 1, "learning_rate": 5e-3}
    trainer = distill(make_student(), [make_batch(2)], [make_batch(2)], teacher=FixedTeacher(), **settings)
    history = trainer.train()
    assert history["kl_loss"][-1] < 0.5 * history["kl_loss"][0]  # type: ignore[operator]
    assert history["val_kl"][-1] is not None


def test_a_checkpoint_holds_the_student_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    trainer = distill(make_student(), make_batches(2))
    trainer.save_checkpoint(tmp_path / "c")
    stored = load_file(tmp_path / "c" / MODEL_FILE)
    assert sum(tensor.numel() for tensor in stored.values()) == num_parameters(trainer.model)


# --- alpha 0 ----------------------------------------------------------------------------------------------------


def test_at_alpha_zero_the_teacher_is_asked_in_evaluations_only() -> None:
    teacher = CountingTeacher()
    settings = {"alpha": 0.0, "num_epochs": 2, "eval_interval": 3}
    trainer = distill(make_student(), make_batches(5), make_batches(2), teacher=teacher, **settings)
    trainer.training_step(make_batch(2))
    trainer.optimizer.zero_grad()
    assert teacher.calls == 0
    history = trainer.train()
    assert history["val_step"] == [3, 6, 9, 10]
    assert teacher.calls == 4 * 2
    assert all(value is not None for value in history["val_kl"])
    assert "kl_loss" not in history
    assert "train.alpha=0" in trainer.history.to_json()["notes"]["kl_loss"]


def test_at_alpha_zero_it_is_plain_training_bit_by_bit() -> None:
    ends = []
    for make, settings in ((pretrain, {}), (distill, {"alpha": 0.0}), (distill, {"alpha": 0.0, "temperature": 9.0})):
        trainer = make(make_student(dropout=0.2), make_batches(4), make_batches(2), num_epochs=2, **settings)
        trainer.train()
        ends.append(weights(trainer.model))
    assert same_tensors(ends[0], ends[1])
    assert same_tensors(ends[0], ends[2])


def test_at_alpha_zero_without_a_teacher_the_gaps_have_reasons() -> None:
    config = TrainingConfig(alpha=0.0, num_epochs=1)
    trainer = DistillationTrainer(make_student(), None, make_batches(2), make_batches(1), config, "cpu")
    trainer.train()
    content = trainer.history.to_json()
    for key in ("val_kl", "val_agreement", "teacher_val_ppl"):
        assert content[key] is None
        assert content["notes"][key] == "no teacher at hand"
    assert content["kl_loss"] is None
    assert content["ce_loss"] is not None


def test_the_teachers_work_is_counted_where_it_works() -> None:
    flops = {alpha: _flops(alpha) for alpha in (0.0, 0.5)}
    tokens = 2 * 2 * LENGTH
    teacher = make_student(seed=77)
    assert flops[0.5] - flops[0.0] == pytest.approx(LiveTeacher(teacher, torch.device("cpu")).flops_per_token * tokens)


def test_flops_are_of_the_sequences_there_are_and_not_of_the_longest_there_could_be(tmp_path: Path) -> None:
    """Three steps on rows of unequal length; also where a run goes on, and with a live teacher of the same family."""
    lengths = torch.tensor([[3, 8], [1, 5], [4, 4]])
    batches = []
    for number, ends in enumerate(lengths.tolist()):
        batch = make_batch(2, seed=number)
        for row, end in enumerate(ends):
            batch["labels"][row, end:] = IGNORE_INDEX
        batches.append(batch)
    config = make_student().config
    per_row = [length * forward_flops_per_token(config, length) for length in lengths.flatten().tolist()]
    trainer = distill(make_student(), batches, num_epochs=1, run_dir=tmp_path)
    stop_in(trainer, 2)
    with pytest.raises(Interrupted):
        trainer.train()
    resumed = distill(make_student(), batches, num_epochs=1, run_dir=tmp_path)
    resumed.load_checkpoint(tmp_path / "checkpoints/checkpoint-2")
    resumed.train()
    assert resumed.history.totals["flops"] == pytest.approx((3 + 1) * sum(per_row), rel=1e-12)
    assert resumed.history.totals["tokens"] == 3 * 2 * LENGTH


def _flops(alpha: float) -> float:
    trainer = distill(make_student(), make_batches(2), alpha=alpha, num_epochs=1)
    trainer.train()
    flops = trainer.history.totals["flops"]
    assert flops is not None
    return flops


# --- a teacher that is not whole --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lm_head.weight", "embedding.weight", "norm.weight", "layers.1.ffn.up_proj.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_teacher_with_a_weight_that_is_not_finite_is_refused(name: str, value: float) -> None:
    teacher = make_student(seed=5)
    with torch.no_grad():
        teacher.get_parameter(name).view(-1)[3] = value
    with pytest.raises(NumericError, match=r"teacher's weights are not all finite.*StudentModel"):
        distill(make_student(), make_batches(2), teacher=teacher)


def test_a_head_from_the_cache_that_is_not_finite_is_refused() -> None:
    weight = torch.zeros(VOCAB, 4)
    weight[7] = math.nan
    states: list[Any] = []
    with pytest.raises(NumericError, match="its head; hidden states"):
        distill(make_student(), make_batches(2), teacher=CachedTeacher(LinearHead(weight), states, torch.device("cpu")))


def test_a_bias_that_rules_a_token_out_is_none_of_these() -> None:
    bias = torch.zeros(VOCAB)
    bias[0] = -math.inf
    head = LinearHead(torch.zeros(VOCAB, 4), bias)
    assert distill(make_student(), None, teacher=CachedTeacher(head, [], torch.device("cpu"))).teacher is not None


def test_a_run_none_of_whose_steps_was_taken_is_not_done() -> None:
    trainer = distill(make_student(), make_batches(3), make_batches(1, seed=1), teacher=BrokenTeacher(), num_epochs=1)
    with pytest.raises(NumericError, match="None of the 3 optimizer steps was taken") as caught:
        trainer.train()
    assert caught.value.exit_code == 5


# --- evaluation against the teacher -----------------------------------------------------------------------------


def test_evaluation_compares_with_the_teacher_at_temperature_one() -> None:
    batches = make_batches(3)
    trainer = distill(make_student(), None, batches, temperature=5.0)
    assert isinstance(trainer.teacher, LiveTeacher)
    kl = agreement = nll = 0.0
    tokens = 0
    for batch in batches:
        with torch.no_grad():
            student = torch.log_softmax(trainer.model(batch["input_ids"]).double(), -1)
            teacher = torch.log_softmax(trainer.teacher.model(batch["input_ids"]).double(), -1)
        for row, column in (batch["labels"] != IGNORE_INDEX).nonzero().tolist():
            s, t = student[row, column], teacher[row, column]
            kl += float((t.exp() * (t - s)).sum())
            agreement += float(s.argmax() == t.argmax())
            nll -= float(t[batch["labels"][row, column]])
            tokens += 1
    metrics = trainer.evaluate()
    assert metrics["val_kl"] == pytest.approx(kl / tokens, rel=1e-5)
    assert metrics["val_agreement"] == pytest.approx(agreement / tokens)
    assert metrics["teacher_val_ppl"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)


def test_the_teachers_forward_pass_can_be_spared() -> None:
    teacher = CountingTeacher()
    trainer = distill(make_student(), None, make_batches(2), teacher=teacher)
    scores = trainer.score(with_teacher=False)
    assert teacher.calls == 0
    assert scores.kl is None
    assert scores.metrics()["val_loss"] == trainer.evaluate()["val_loss"]
