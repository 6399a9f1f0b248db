"""What trainings in several processes must do beside plain steps; run by torchrun, every process checks for itself."""

import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kd.config import GRPOConfig
from kd.distributed import gather_objects, get_rank, process_group
from kd.errors import Interrupted, NumericError
from kd.trainers.base import BaseTrainer
from kd.trainers.state import Batch
from tests.llama import make_llama
from tests.trainers.examples import PROMPTS, cut, online
from tests.trainers.helpers import make_batches, make_student, pretrain


def is_same_everywhere(value: Any) -> bool:
    """Return whether all processes have the same value."""
    values = gather_objects(value)
    return all(other == values[0] for other in values)


def whole_weights(trainer: BaseTrainer[Any]) -> dict[str, Tensor]:
    """Return the trained weights, in the first process at least."""
    return {name: value.clone() for name, value in trainer.strategy.weights(trainer.model).items()}


def foreign_models(folder: Path, strategy: str) -> None:  # noqa: ARG001 - as the others
    """A model of transformers, with its head tied, takes the path without logits and trains like the student."""
    losses = []
    for make in (make_student, lambda: make_llama(make_student())):
        trainer = pretrain(make(), make_batches(9), strategy=strategy, num_epochs=1, log_interval=1)
        assert trainer.linear_loss is not None
        trainer.train()
        losses.append(trainer.history.train["train_loss"])
        names = whole_weights(trainer)
        if trainer.is_main:
            assert not any("lm_head" in name or name.startswith("module.") for name in names)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def bad_gradients(folder: Path, strategy: str) -> None:
    """NaN in one process is NaN for all: none of them takes the step, and all give up together."""
    trainer = pretrain(make_student(), make_batches(40), strategy=strategy, num_epochs=1, run_dir=folder)
    before = whole_weights(trainer)
    forward = trainer._forward

    def spoil(batch: Any) -> Any:
        outputs = forward(batch)
        value = outputs.value * float("nan") if get_rank() == 1 else outputs.value
        return outputs._replace(value=value)

    trainer._forward = spoil  # type: ignore[method-assign]
    with pytest.raises(NumericError, match="diverged"):
        trainer.train()
    assert trainer.step == 9
    after = whole_weights(trainer)
    assert all(torch.equal(after[name], before[name]) for name in before)


def early_stopping(folder: Path, strategy: str) -> None:
    """All stop gaining at the same evaluation, and go back to the same weights."""
    trainer = pretrain(
        make_student(),
        make_batches(12),
        make_batches(3, seed=1),
        strategy=strategy,
        num_epochs=20,
        learning_rate=0.05,
        schedule="constant",
        eval_interval=2,
        early_stopping_patience=2,
        run_dir=folder,
    )
    trainer.train()
    assert trainer.step < trainer.total_steps
    assert trainer.best_step is not None
    assert trainer.best_step < trainer.step
    assert is_same_everywhere((trainer.step, trainer.best_step, trainer.history.validation))
    final = trainer.history.validation["val_step"].index(trainer.final_step)
    assert trainer.history.validation["val_loss"][final] == pytest.approx(trainer.best_val_loss)
    assert trainer.final_scores is not None
    assert trainer.final_scores.metrics()["val_loss"] == pytest.approx(trainer.best_val_loss)


def half_precision(folder: Path, strategy: str) -> None:  # noqa: ARG001 - as the others
    """Autocast, and recomputed activations."""
    trainer = pretrain(
        make_student(),
        make_batches(8),
        strategy=strategy,
        precision="bfloat16",
        gradient_checkpointing=True,
        num_epochs=4,
        log_interval=1,
    )
    losses = trainer.train()["train_loss"]
    assert float(losses[-1] or 0) < float(losses[0] or 0) - 0.1


def sampling(folder: Path, strategy: str) -> None:
    """GRPO draws other responses in each process, and ends with the same weights."""
    if strategy == "fsdp":
        return
    trainer = online(make_student(), cut(PROMPTS, 1), num_epochs=3, optimization_epochs=2, run_dir=folder)
    drawn: list[Any] = []
    draw = trainer.rollouts.draw

    def note(batch: Batch, config: GRPOConfig) -> Batch:
        found = draw(batch, config)
        drawn.append(found["responses"].tolist())
        return found

    trainer.rollouts.draw = note  # type: ignore[method-assign]
    trainer.train()
    assert not is_same_everywhere(drawn)
    assert is_same_everywhere({name: value.tolist() for name, value in trainer.model.state_dict().items()})


def stop_in_evaluation(folder: Path, strategy: str) -> None:
    """A stop that one process is asked for while it scores ends all there, with one checkpoint."""
    trainer = pretrain(
        make_student(),
        make_batches(12),
        make_batches(5, seed=1),
        strategy=strategy,
        num_epochs=2,
        eval_interval=3,
        run_dir=folder,
    )
    score = trainer._score_batch

    def ask(*arguments: Any) -> Any:
        if get_rank() == 1:
            trainer.stop.signum = signal.SIGTERM
        return score(*arguments)

    trainer._score_batch = ask  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="step 3/12"):
        trainer.train()
    assert trainer.history.validation == {}
    assert [path.name for path in folder.glob("checkpoints/*")] == ["checkpoint-3"]


CASES: tuple[Callable[[Path, str], None], ...] = (
    foreign_models,
    bad_gradients,
    early_stopping,
    half_precision,
    sampling,
    stop_in_evaluation,
)


def main(folder: str) -> None:
    """Run all cases with both strategies."""
    torch.set_num_threads(1)
    logging.getLogger("kd").setLevel(logging.ERROR)
    with process_group("cpu"):
        for case in CASES:
            for strategy in ("ddp", "fsdp"):
                case(Path(folder) / case.__name__ / strategy, strategy)


if __name__ == "__main__":
    main(*sys.argv[1:])
