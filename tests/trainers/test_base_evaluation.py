"""Evaluation against an independent computation, and what happens where a run diverges."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd.data.blocks import PackedBlocks
from kd.data.loaders import eval_loader
from kd.errors import NumericError
from kd.trainers import PretrainTrainer, progress
from kd.trainers.base import MAX_BAD_STEPS
from kd.trainers.state import Batch

from .helpers import (
    BYTES,
    LENGTH,
    MakeTrainer,
    make_batch,
    make_batches,
    make_student,
    pretrain,
    same_tensors,
    split,
    summed_nll,
    weights,
)

BAD_WEIGHT = "layers.1.ffn.down_proj.weight"


# --- evaluation -------------------------------------------------------------------------------------------------


def test_evaluate_is_summed_nll_over_tokens() -> None:
    batches = [*make_batches(4, rows=3), make_batch(1, seed=9, masked=(LENGTH,))]
    model = make_student()
    nll, tokens = summed_nll(model, batches)
    metrics = pretrain(model, None, batches).evaluate()
    assert metrics["val_loss"] == pytest.approx(nll / tokens, rel=1e-6)
    assert metrics["val_ppl"] == pytest.approx(math.exp(nll / tokens), rel=1e-6)
    assert metrics["val_kl"] is None
    other = make_batches(2, seed=5)
    nll, tokens = summed_nll(model, other)
    assert pretrain(model, None, batches).evaluate(other)["val_loss"] == pytest.approx(nll / tokens, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_leaves_everything_as_it_was(make_trainer: MakeTrainer, store: Path, training: bool) -> None:
    model = make_student(dropout=0.5, vocab_size=BYTES)
    trainer = make_trainer(model, None, eval_loader(PackedBlocks(store, "validation"), 2))
    model.train(training)
    before, random_state = weights(model), torch.get_rng_state()
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first == second  # without dropout
    assert same_tensors(before, weights(model))
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training is training for module in model.modules())
    assert trainer.state == "initialized"


def test_eval_blocks_bounds_evaluations_on_the_way_and_the_best_compares_on_the_same_blocks() -> None:
    # The first two blocks are noise, and stay bad; the others are what is trained on.
    familiar = make_batch(2, seed=3)
    validation = [make_batch(1, seed=50), make_batch(1, seed=51), *([familiar] * 4)]
    settings = {"num_epochs": 8, "eval_interval": 2, "eval_blocks": 2, "learning_rate": 3e-3}
    trainer = pretrain(make_student(), [familiar], validation, **settings)
    seen: list[int] = []
    score = trainer._score_batch

    def counted(batch: Batch, with_teacher: bool) -> Any:
        seen.append(len(batch["labels"]))
        return score(batch, with_teacher)

    trainer._score_batch = counted  # type: ignore[method-assign]
    losses = trainer.train()["val_loss"]
    assert seen == [1, 1] * 3 + [1, 1, 2, 2, 2, 2]
    bounded = [*losses[:-1], trainer.evaluate(max_blocks=2)["val_loss"]]
    assert all(loss is not None for loss in bounded)
    best = min(range(4), key=lambda i: bounded[i])  # type: ignore[arg-type, return-value]
    assert trainer.best_val_loss == bounded[best]
    assert trainer.best_step == 2 * (best + 1)
    assert losses[-1] == trainer.evaluate()["val_loss"]
    assert losses[-1] < trainer.best_val_loss  # type: ignore[operator]  # the full set is the easier one


def test_a_long_evaluation_is_seen(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "SECONDS", -1)
    with caplog.at_level(logging.INFO, logger="kd"):
        pretrain(make_student(), make_batches(2), make_batches(4, seed=1), num_epochs=1).train()
    lines = [record.getMessage() for record in caplog.records]
    assert "Final evaluation, on the whole validation set" in lines
    assert [line for line in lines if line.startswith("Evaluation: 3 of 4 batches, 0:00 left")]


def test_max_blocks_may_end_within_a_batch() -> None:
    batch = make_batch(5, seed=4)
    model = make_student()
    nll, tokens = summed_nll(model, split(batch, 1)[:3])
    metrics = pretrain(model, None, split(batch, 2)).evaluate(max_blocks=3)
    assert metrics["val_loss"] == pytest.approx(nll / tokens, rel=1e-6)


# --- divergence -------------------------------------------------------------------------------------------------


def poison(model: nn.Module, value: float, steps: range | set[int], trainer: PretrainTrainer) -> None:
    """Give one parameter a gradient that is not finite in the given optimizer steps."""

    def spoil(grad: Tensor) -> Tensor:
        return torch.full_like(grad, value) if trainer.step + 1 in steps else grad

    dict(model.named_parameters())[BAD_WEIGHT].register_hook(spoil)  # type: ignore[no-untyped-call]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_without_finite_gradients_is_not_taken(
    value: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_student()
    trainer = pretrain(model, make_batches(5), num_epochs=1, log_interval=1, save_interval=1, run_dir=tmp_path)
    poison(model, value, {3}, trainer)
    with caplog.at_level(logging.WARNING, "kd"):
        history = trainer.train()
    (message,) = [record.getMessage() for record in caplog.records]
    assert "step 3" in message
    assert BAD_WEIGHT in message
    assert f"loss {history['train_loss'][2]:g}" in message
    assert "ce_loss" in message
    found = {
        step: (tmp_path / f"checkpoints/checkpoint-{step}/model.safetensors").read_bytes() for step in (1, 2, 3, 4)
    }
    assert found[3] == found[2]
    assert found[2] != found[1]
    assert found[4] != found[3]
    assert history["grad_norm"][2] is None
    assert all(history["grad_norm"][i] for i in (0, 1, 3, 4))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_ten_bad_steps_in_a_row_end_the_run() -> None:
    model = make_student()
    trainer = pretrain(model, make_batches(30), num_epochs=1)
    poison(model, math.nan, range(5, 40), trainer)
    with pytest.raises(NumericError, match=r"diverged.*train\.learning_rate=0\.01") as caught:
        trainer.train()
    assert caught.value.exit_code == 5
    assert "grad_norm" not in str(caught.value)  # the last one that was measured is an earlier step's
    assert trainer.step == 4 + MAX_BAD_STEPS - 1
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_bad_steps_that_are_not_in_a_row_do_not_add_up() -> None:
    model = make_student()
    trainer = pretrain(model, make_batches(24), num_epochs=1)
    poison(model, math.nan, {*range(2, 11), *range(12, 21)}, trainer)
    trainer.train()
    assert trainer.state == "completed"


class BlindModel(nn.Module):
    """Gives NaN wherever it is evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_student()

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.inner(input_ids)
        return logits if self.training else logits * math.nan


def test_a_final_loss_that_is_not_finite_ends_the_run() -> None:
    trainer = pretrain(BlindModel(), make_batches(2), make_batches(1), num_epochs=1, eval_interval=1)
    with pytest.raises(NumericError, match="final validation loss"):
        trainer.train()
    assert trainer.best_val_loss is None
    assert trainer.history.to_json()["val_loss"] is None
    assert "nan" in trainer.history.to_json()["notes"]["val_loss"]
