"""What can be switched on in every trainer: schedules, early stopping, recomputed activations, losses of parts."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from kd.attempt import _summarise
from kd.checkpoint import load_weights
from kd.config import PretrainConfig
from kd.errors import ConfigError, Interrupted
from kd.losses import IGNORE_INDEX
from kd.trainers import PretrainTrainer
from kd.trainers.base import Terms
from kd.trainers.state import Batch

from .helpers import (
    LENGTH,
    VOCAB,
    MakeTrainer,
    checkpoints_in,
    first_gradients,
    history_of,
    make_batch,
    make_batches,
    make_student,
    pretrain,
    same_tensors,
    split,
    stop_in,
    weights,
)

# --- schedule and optimizer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_the_schedule_of_the_config_is_the_one_that_runs(make_trainer: MakeTrainer, schedule: str) -> None:
    settings = {"warmup_steps": 2, "log_interval": 1, "num_epochs": 1, "learning_rate": 1e-2}
    trainer = make_trainer(make_student(), make_batches(10), schedule=schedule, **settings)
    trainer.train()
    rates = trainer.history.train["learning_rate"]
    expected = {
        "cosine": [0.5e-2, 1e-2, 1e-2, 0.9619e-2],
        "linear": [0.5e-2, 1e-2, 1e-2, 0.875e-2],
        "constant": [0.5e-2, 1e-2, 1e-2, 1e-2],
        "wsd": [0.5e-2, 1e-2, 1e-2, 1e-2],
    }
    assert rates[:4] == pytest.approx(expected[schedule], rel=1e-3)
    last = {"cosine": 0.0381e-2, "linear": 0.125e-2, "constant": 1e-2, "wsd": 1e-2}
    assert rates[-1] == pytest.approx(last[schedule], rel=2e-2)


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)])
def test_the_optimizer_of_the_config_is_built(name: str, kind: type[torch.optim.Optimizer]) -> None:
    assert isinstance(pretrain(make_student(), make_batches(2), optimizer=name).optimizer, kind)


# --- early stopping ---------------------------------------------------------------------------------------------

MEMORISED = {"learning_rate": 0.05, "num_epochs": 40, "eval_interval": 2, "log_interval": 10, "schedule": "constant"}
"""Two batches, again and again: the loss on other text soon rises."""


def overfit(run_dir: Path, **settings: Any) -> PretrainTrainer:
    model = make_student(dropout=0.1)
    return pretrain(model, make_batches(2), make_batches(4, seed=9), run_dir=run_dir, **{**MEMORISED, **settings})


def test_early_stopping_ends_with_the_weights_of_the_lowest_loss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = overfit(tmp_path, early_stopping_patience=3)
    with caplog.at_level(logging.INFO, logger="kd"):
        trainer.train()
    assert trainer.total_steps == 80
    assert trainer.best_step is not None
    assert trainer.step == trainer.best_step + 6
    said = f"Stopped early at step {trainer.step} of 80: 3 evaluations in a row"
    assert said in caplog.text
    assert f"below that of step {trainer.best_step}, the best" in caplog.text
    losses, steps = trainer.history.validation["val_loss"], trainer.history.validation["val_step"]
    assert steps == list(range(2, trainer.step + 1, 2))
    assert trainer.final_step == trainer.history.totals["final_step"] == trainer.best_step
    assert losses[steps.index(trainer.best_step)] == min(losses) == trainer.best_val_loss
    assert losses.count(trainer.best_val_loss) == 1  # what was measured after it stands too
    assert trainer.final_scores is not None
    assert trainer.final_scores.metrics()["val_loss"] == trainer.best_val_loss
    kept = make_student()
    load_weights(tmp_path / "checkpoints" / f"checkpoint-{trainer.best_step}", kept)
    assert same_tensors(weights(kept), weights(trainer.model))
    assert trainer.state == "completed"


def test_without_patience_the_same_run_goes_to_its_end(tmp_path: Path) -> None:
    trainer = overfit(tmp_path)
    trainer.train()
    assert trainer.step == 80
    losses = trainer.history.validation["val_loss"]
    assert losses[-1] > min(losses)
    assert checkpoints_in(tmp_path) == [80]


def test_patience_that_never_runs_out_still_returns_to_the_best(tmp_path: Path) -> None:
    trainer = overfit(tmp_path, early_stopping_patience=1000)
    trainer.train()
    assert trainer.step == 80
    assert trainer.final_step == trainer.best_step
    assert trainer.history.validation["val_step"][-1] == 80
    assert trainer.final_scores is not None
    assert trainer.final_scores.metrics()["val_loss"] == trainer.best_val_loss


def test_an_end_that_is_loaded_again_gives_the_same_history(tmp_path: Path) -> None:
    trainer = overfit(tmp_path, early_stopping_patience=3, eval_blocks=3)
    trainer.train()
    again = overfit(tmp_path, early_stopping_patience=3, eval_blocks=3)
    again.load_checkpoint(tmp_path / "checkpoints" / f"checkpoint-{trainer.step}")
    again.train()
    assert history_of(again) == history_of(trainer)
    assert again.final_scores is not None
    assert len(again.final_scores) > 3
    assert _summarise(again)["val_loss"] == again.final_scores.metrics()["val_loss"]
    final = again.history.validation["val_step"].index(again.final_step)
    assert again.history.validation["val_loss"][final] == again.final_scores.metrics()["val_loss"]


def test_a_stopped_run_counts_its_patience_on(tmp_path: Path) -> None:
    whole = overfit(tmp_path / "a", early_stopping_patience=3)
    whole.train()
    assert whole.best_step is not None
    stopped = overfit(tmp_path / "b", early_stopping_patience=3)
    stop_in(stopped, whole.best_step + 3)
    with pytest.raises(Interrupted):
        stopped.train()
    resumed = overfit(tmp_path / "b", early_stopping_patience=3)
    resumed.load_checkpoint(tmp_path / "b" / "checkpoints" / f"checkpoint-{whole.best_step + 3}")
    resumed.train()
    assert resumed.step == whole.step
    assert same_tensors(weights(resumed.model), weights(whole.model))
    assert history_of(resumed) == history_of(whole)


# --- recomputed activations -------------------------------------------------------------------------------------


def llama() -> nn.Module:
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCAB,
            max_position_embeddings=LENGTH,
            attention_dropout=0.1,
        )
    )


@pytest.mark.parametrize("make_model", [lambda: make_student(dropout=0.2), llama], ids=["student", "transformers"])
def test_recomputed_activations_give_the_same_gradients(
    make_trainer: MakeTrainer, make_model: Callable[[], nn.Module]
) -> None:
    gradients = []
    for recompute in (False, True):
        teacher = {} if make_trainer is pretrain else {"teacher": make_student(seed=77)}
        trainer = make_trainer(make_model(), make_batches(2), gradient_checkpointing=recompute, **teacher)
        torch.manual_seed(1)
        gradients.append(first_gradients(trainer))
    assert same_tensors(*gradients)


def test_recomputing_keeps_fewer_activations() -> None:
    def kept(recompute: bool) -> int:
        model = make_student()
        trainer = pretrain(model, None, gradient_checkpointing=recompute)
        model.train()
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trainer._forward(make_batch(8))
        return sum(sizes)

    assert kept(recompute=True) < 0.5 * kept(recompute=False)


def test_a_model_that_cannot_recompute_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.gradient_checkpointing=true, but Linear"):
        pretrain(nn.Linear(2, 2), None, gradient_checkpointing=True)


# --- a loss of parts with units of their own ----------------------------------------------------------------------


class TwoParts(PretrainTrainer):
    """Cross-entropy per token, plus a penalty per row."""

    loss_terms = ("ce_loss",)

    def _compute_loss(self, outputs: Any, batch: Batch) -> tuple[Tensor, Terms]:
        loss, terms = super()._compute_loss(outputs, batch)
        penalty = self.model(batch["input_ids"]).float().logsumexp(-1).mean(-1).square().mean()
        return torch.stack([loss, 0.1 * penalty]), terms

    def _count_units(self, batch: Batch) -> Tensor:
        return torch.stack([(batch["labels"] != IGNORE_INDEX).sum(), torch.tensor(len(batch["labels"]))])


def test_each_part_of_a_loss_is_a_mean_over_its_own_units() -> None:
    whole = make_batch(8, masked=(0, 3, LENGTH, LENGTH, 7, 1, 0, 5))
    results = []
    for rows in (1, 2, 8):
        config = PretrainConfig(
            batch_size=rows, gradient_accumulation_steps=8 // rows, num_epochs=1, gradient_clip=1e9, warmup_steps=0
        )
        trainer = TwoParts(make_student(), train_loader=split(whole, rows), config=config, device="cpu")
        results.append((first_gradients(trainer), trainer.history.train["train_loss"][0]))
    for gradients, loss in results[:2]:
        torch.testing.assert_close(gradients, results[2][0], rtol=1e-5, atol=1e-6)
        assert loss == pytest.approx(results[2][1], rel=1e-6)
