"""The loop: gradients that do not depend on how a step is cut, schedule, records, and what may be trained."""

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd.config import PretrainConfig, TrainerConfig
from kd.data.blocks import PackedBlocks
from kd.data.loaders import eval_loader, train_loader
from kd.losses import IGNORE_INDEX
from kd.trainers import BaseTrainer, PretrainTrainer
from kd.trainers.state import Batch

from .helpers import (
    BYTES,
    LENGTH,
    VOCAB,
    MakeTrainer,
    checkpoints_in,
    first_gradients,
    make_batch,
    make_batches,
    make_student,
    pretrain,
    same_tensors,
    split,
    summed_nll,
    weights,
)

# --- gradients --------------------------------------------------------------------------------------------------

WHOLE = make_batch(8, masked=(0, 3, LENGTH, LENGTH, 7, 1, 0, 5))
"""Rows 2 and 3 have no valid target, so that a micro-batch of one row, and one of two, has none."""


def step_gradients(make_trainer: MakeTrainer, rows: int) -> dict[str, Tensor]:
    """Gradients of one optimizer step over WHOLE, cut into micro-batches of `rows` rows."""
    settings = {"batch_size": rows, "gradient_accumulation_steps": 8 // rows, "num_epochs": 1, "gradient_clip": 1e9}
    trainer = make_trainer(make_student(), split(WHOLE, rows), **settings)
    assert trainer.total_steps == 1
    return first_gradients(trainer)


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_accumulation_does_not_change_the_gradient(make_trainer: MakeTrainer, rows: int) -> None:
    torch.testing.assert_close(
        step_gradients(make_trainer, rows), step_gradients(make_trainer, 8), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("rows", [1, 2])
def test_the_mean_of_the_micro_batches_means_is_another_gradient(make_trainer: MakeTrainer, rows: int) -> None:
    """Without this, the test above could pass although every micro-batch counted the same."""
    trainer = make_trainer(make_student(), None)
    for part in split(WHOLE, rows):
        trainer.training_step(part)
    ours = step_gradients(make_trainer, rows)
    for name in ("layers.0.ffn.down_proj.weight", "embedding.weight"):
        naive = trainer.model.get_parameter(name).grad
        assert naive is not None
        assert float((ours[name] - naive * rows / 8).norm() / ours[name].norm()) > 0.05


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_the_gradient_is_that_of_the_mean_over_all_units(rows: int) -> None:
    model = make_student()
    logits, labels = model(WHOLE["input_ids"]).view(-1, VOCAB), WHOLE["labels"].view(-1)
    total = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX)
    (total / (labels != IGNORE_INDEX).sum()).backward()  # type: ignore[no-untyped-call]
    expected = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(step_gradients(pretrain, rows), expected, rtol=1e-5, atol=1e-6)


def test_a_window_without_any_unit_changes_nothing_but_decay(make_trainer: MakeTrainer) -> None:
    batch = make_batch(2, masked=(LENGTH, LENGTH))
    trainer = make_trainer(make_student(), [batch], num_epochs=1, weight_decay=0.0)
    before = weights(trainer.model)
    trainer.train()
    assert same_tensors(before, weights(trainer.model))


def test_the_gradient_is_clipped_to_its_global_norm() -> None:
    gradients = first_gradients(pretrain(make_student(), [WHOLE], num_epochs=1, gradient_clip=1e-3))
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in gradients.values()))
    assert norm == pytest.approx(1e-3, rel=1e-4)


def test_training_step_adds_one_gradient_and_takes_no_step(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(make_student(), [WHOLE], gradient_clip=1e9, num_epochs=1)
    expected = step_gradients(make_trainer, 8)
    before = weights(trainer.model)
    terms = trainer.training_step(WHOLE)
    assert all(isinstance(value, float) for value in terms.values())
    assert {"loss", *trainer.loss_terms} == set(terms)
    found = {name: p.grad for name, p in trainer.model.named_parameters()}
    torch.testing.assert_close(found, expected)
    assert same_tensors(before, weights(trainer.model))
    units = (WHOLE["labels"] != IGNORE_INDEX).sum()
    trainer.model.zero_grad()
    for part in split(WHOLE, 2):
        trainer.training_step(part, units)
    found = {name: p.grad for name, p in trainer.model.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# --- schedule and records ---------------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_and_follows_a_cosine() -> None:
    settings = {"num_epochs": 4, "warmup_steps": 5, "learning_rate": 2e-3, "log_interval": 1}
    history = pretrain(make_student(), make_batches(5), **settings).train()
    expected = [2e-3 * (s + 1) / 5 for s in range(5)]
    expected += [1e-3 * (1 + math.cos(math.pi * (s - 5) / 15)) for s in range(5, 20)]
    assert history["train_step"] == list(range(1, 21))
    assert history["learning_rate"] == pytest.approx(expected)


def test_a_logged_loss_is_the_mean_over_the_tokens_of_its_interval() -> None:
    batches = make_batches(7)
    settings = {"num_epochs": 1, "learning_rate": 1e-12, "log_interval": 3, "gradient_accumulation_steps": 2}
    history = pretrain(make_student(), batches, **settings).train()
    model = make_student()
    assert history["train_step"] == [3, 4]
    for logged, members in zip(history["train_loss"], (batches[:6], batches[6:]), strict=True):
        assert logged == pytest.approx(summed_nll(model, members)[0] / summed_nll(model, members)[1], rel=1e-5)


def test_logs_evaluations_and_checkpoints_come_at_their_intervals(tmp_path: Path) -> None:
    settings = {"num_epochs": 2, "log_interval": 4, "eval_interval": 3, "save_interval": 5}
    trainer = pretrain(make_student(), make_batches(7), make_batches(2, seed=1), run_dir=tmp_path, **settings)
    history = trainer.train()
    assert history["train_step"] == [4, 8, 12, 14]
    assert history["val_step"] == [3, 6, 9, 12, 14]
    assert checkpoints_in(tmp_path) == [5, 10, 14]
    assert len(history["train_loss"]) == 4
    assert len(history["val_loss"]) == len(history["val_ppl"]) == 5
    for loss, perplexity in zip(history["val_loss"], history["val_ppl"], strict=True):
        assert loss is not None
        assert perplexity == pytest.approx(math.exp(loss))
    assert trainer.current_loss == history["train_loss"][-1]


def test_an_evaluation_due_at_the_last_step_is_done_once() -> None:
    settings = {"num_epochs": 1, "eval_interval": 2, "log_interval": 2, "save_interval": 2}
    history = pretrain(make_student(), make_batches(4), make_batches(2, seed=1), **settings).train()
    assert history["val_step"] == [2, 4]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"num_epochs": 3}, 21),
        ({"num_epochs": 3, "gradient_accumulation_steps": 2}, 12),
        ({"num_epochs": 3, "max_steps": 5}, 5),
        ({"num_epochs": 1, "max_steps": 50}, 7),
    ],
)
def test_the_number_of_steps(settings: dict[str, int], steps: int) -> None:
    trainer = pretrain(make_student(), make_batches(7), **settings)
    assert trainer.total_steps == steps
    trainer.train()
    assert trainer.step == steps


def test_history_json_is_strict_and_is_the_history(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    settings = {"num_epochs": 1, "log_interval": 2, "eval_interval": 2, "run_dir": tmp_path}
    trainer = make_trainer(make_student(), make_batches(5), make_batches(2, seed=1), **settings)
    trainer.train()

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    content = json.loads((tmp_path / "history.json").read_text(), parse_constant=refuse)
    assert content == json.loads(json.dumps(trainer.history.to_json()))
    assert content["tokens"] == 5 * 2 * LENGTH
    assert content["parameters"] == sum(p.numel() for p in trainer.model.parameters())
    assert content["flops"] > 0
    assert len(content["grad_norm"]) == len(content["train_step"]) == 3
    assert set(content["timing"]) == {"tokens_per_second", "wall_seconds", "peak_memory_bytes"}


def test_bits_per_byte_compares_with_the_raw_text(store: Path) -> None:
    validation = eval_loader(PackedBlocks(store, "validation"), 2)
    training = train_loader(PackedBlocks(store, "train"), 2, seed=0)
    trainer = pretrain(make_student(vocab_size=BYTES), training, validation, num_epochs=1)
    history = trainer.train()
    # Every byte is a token here, and one end-of-text token follows.
    bits = history["val_loss"][-1] / math.log(2) * (5 * LENGTH + 1) / (5 * LENGTH)  # type: ignore[operator]
    assert history["val_bits_per_byte"][-1] == pytest.approx(bits)


def test_a_warm_up_beyond_the_end_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "kd"):
        pretrain(make_student(), make_batches(2), num_epochs=1, warmup_steps=8).train()
    assert [record.getMessage() for record in caplog.records if "train.warmup_steps=8" in record.getMessage()]


# --- models, loaders, hooks ---------------------------------------------------------------------------------------


class Output:
    """An object with logits, as Hugging Face's models return one."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Wrapped(nn.Module):
    """Gives a student's logits in another form."""

    def __init__(self, form: type) -> None:
        super().__init__()
        self.inner = make_student()
        self.form = form

    def forward(self, input_ids: Tensor) -> Any:
        logits = self.inner(input_ids)
        return {"logits": logits} if self.form is dict else Output(logits)


@pytest.mark.parametrize("form", [Output, dict])
def test_any_module_that_gives_logits_can_be_trained(form: type) -> None:
    plain = pretrain(make_student(), make_batches(3), make_batches(2), num_epochs=1)
    wrapped = pretrain(Wrapped(form), make_batches(3), make_batches(2), num_epochs=1)
    assert plain.linear_loss is not None
    assert wrapped.linear_loss is None
    assert wrapped.train()["val_loss"] == pytest.approx(plain.train()["val_loss"], rel=1e-5)


def test_a_torch_data_loader_will_do() -> None:
    rows = [{name: x[0] for name, x in batch.items()} for batch in split(make_batch(6), 1)]
    loader: DataLoader[dict[str, Tensor]] = DataLoader(rows, batch_size=2)  # type: ignore[arg-type]
    plain = pretrain(make_student(), split(make_batch(6), 2), split(make_batch(6), 2), num_epochs=2)
    trainer = pretrain(make_student(), loader, loader, num_epochs=2)
    assert trainer.train()["val_loss"] == plain.train()["val_loss"]
    assert trainer.history.totals["tokens"] == 2 * 6 * LENGTH


def test_without_a_validation_loader_it_trains_and_saves(tmp_path: Path) -> None:
    history = pretrain(make_student(), make_batches(3), num_epochs=1, eval_interval=1, run_dir=tmp_path).train()
    assert history["val_loss"] == history["val_ppl"] == []
    assert checkpoints_in(tmp_path) == [3]


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="train_loader"):
        pretrain(make_student(), None).train()
    with pytest.raises(ValueError, match="val_loader"):
        pretrain(make_student(), None).evaluate()
    with pytest.raises(ValueError, match="empty"):
        pretrain(make_student(), None, []).evaluate()
    with pytest.raises(ValueError, match=r"generator.*has no length"):
        pretrain(make_student(), (batch for batch in make_batches(2)))


def test_optimizer_schedule_and_device_may_be_given_or_left_out() -> None:
    model = make_student()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    config = PretrainConfig(num_epochs=1, log_interval=1)
    trainer = PretrainTrainer(model, optimizer, make_batches(3), lr_scheduler=schedule, config=config)
    assert trainer.train()["learning_rate"] == [0.5, 0.25, 0.125]
    assert trainer.device == torch.device("cpu")
    built = PretrainTrainer(model)
    assert isinstance(built.optimizer, torch.optim.AdamW)
    assert built.config == PretrainConfig()


def test_the_base_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        BaseTrainer(make_student())  # type: ignore[abstract]


class Watching(PretrainTrainer):
    """Notes its state wherever a subclass may look."""

    seen: list[str]
    restored: Any = None

    def _forward(self, batch: Batch) -> Any:
        self.seen.append(self.state)
        return super()._forward(batch)

    def _score_batch(self, batch: Batch, with_teacher: bool) -> Any:
        self.seen.append(self.state)
        return super()._score_batch(batch, with_teacher)

    def _get_extra_checkpoint_state(self) -> dict[str, Any]:
        self.seen.append(self.state)
        return {"seen": list(self.seen)}

    def _load_extra_checkpoint_state(self, state: dict[str, Any]) -> None:
        self.restored = state

    def _get_extra_log_info(self, batch: Batch) -> str:
        return f"  rows {len(batch['labels'])}"

    def _get_extra_config_info(self) -> dict[str, Any]:
        return {"watching": "yes"}


def test_states_and_hooks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = PretrainConfig(num_epochs=1, eval_interval=1, save_interval=1, log_interval=1)
    trainer = Watching(make_student(), None, make_batches(2), make_batches(1), config=config, run_dir=tmp_path)
    trainer.seen = []
    assert trainer.state == "initialized"
    with caplog.at_level(logging.INFO, "kd"):
        trainer.train()
    step = ["training", "evaluating", "checkpointing"]
    assert trainer.seen == step * 2
    assert trainer.state == "completed"
    trainer.load_checkpoint(tmp_path / "checkpoints/checkpoint-2")
    assert trainer.restored == {"seen": trainer.seen}
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "watching yes" in text
    assert "rows 2" in text


class MinimalTrainer(BaseTrainer[TrainerConfig]):
    """The three methods and nothing more: the mean square of a linear model's output."""

    def _prepare_batch(self, batch: Batch) -> Batch:
        return batch

    def _forward(self, batch: Batch) -> Tensor:
        output: Tensor = self.model(batch["input_ids"].float())
        return output

    def _compute_loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: ARG002
        return outputs.square().mean(), {}


def test_three_methods_make_a_trainer() -> None:
    model = nn.Linear(LENGTH, 3)
    config = TrainerConfig(num_epochs=20, warmup_steps=0, learning_rate=0.05, log_interval=1)
    trainer = MinimalTrainer(model, train_loader=make_batches(3), config=config)
    losses = trainer.train()["train_loss"]
    assert losses[-1] < 0.1 * losses[0]  # type: ignore[operator]
    with pytest.raises(NotImplementedError, match="MinimalTrainer cannot evaluate"):
        trainer.evaluate(make_batches(1))


def test_a_loader_is_read_anew_in_each_epoch() -> None:
    class Counting(list[Batch]):
        openings = 0

        def __iter__(self) -> Iterator[Batch]:
            Counting.openings += 1
            return super().__iter__()

    pretrain(make_student(), Counting(make_batches(3)), num_epochs=4).train()
    assert Counting.openings == 4
