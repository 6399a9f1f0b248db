"""A run that was stopped ends like one that was not: the same bits in weights, optimizer and history."""

import json
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kd.checkpoint import load_state
from kd.data.blocks import PackedBlocks
from kd.data.loaders import BlockLoader, eval_loader, train_loader
from kd.errors import IntegrityError, Interrupted, NumericError
from kd.stop import StopSignal, signals_to

from .helpers import (
    BYTES,
    AnyTrainer,
    MakeTrainer,
    checkpoints_in,
    history_of,
    make_batches,
    make_student,
    pretrain,
    same_tensors,
    stop_in,
    weights,
)

# 11 batches give 6 windows an epoch, the last of one batch; 12 steps in all.
SETTINGS: dict[str, Any] = {
    "num_epochs": 2,
    "gradient_accumulation_steps": 2,
    "batch_size": 2,
    "warmup_steps": 3,
    "log_interval": 4,
    "eval_interval": 3,
    "eval_blocks": 3,
    "save_interval": 1000,
}
TOTAL = 12
STOPS = (1, 3, 5, 6, 7, 11, 12)
"""Among them: amid a log interval (1, 5), at an evaluation (3), at the end of an epoch (6) and of the run (12)."""


def block_loaders(store: Path, num_workers: int = 0) -> tuple[BlockLoader, BlockLoader]:
    train, validation = PackedBlocks(store, "train"), PackedBlocks(store, "validation")
    return train_loader(train, 2, seed=3, num_workers=num_workers), eval_loader(validation, 2, num_workers)


def block_trainer(
    make_trainer: MakeTrainer, store: Path, run_dir: Path, seed: int = 0, num_workers: int = 0
) -> AnyTrainer:
    """Return a trainer with dropout on packed blocks; weights and random numbers follow the seed."""
    model = make_student(seed, dropout=0.2, vocab_size=BYTES)
    return make_trainer(model, *block_loaders(store, num_workers), run_dir=run_dir, **SETTINGS)


def list_trainer(make_trainer: MakeTrainer, run_dir: Path, seed: int = 0) -> AnyTrainer:
    """Return the same on plain lists, which can only be fast-forwarded."""
    loaders = make_batches(11), make_batches(3, seed=1)
    return make_trainer(make_student(seed, dropout=0.2), *loaders, run_dir=run_dir, **SETTINGS)


def assert_same_end(trainer: AnyTrainer, expected: AnyTrainer) -> None:
    """Compare two finished runs bit by bit."""
    assert trainer.state == expected.state == "completed"
    assert same_tensors(weights(trainer.model), weights(expected.model))
    ours, theirs = trainer.optimizer.state_dict(), expected.optimizer.state_dict()
    assert json.dumps(ours["param_groups"]) == json.dumps(theirs["param_groups"])  # a tuple may come back as a list
    assert ours["state"].keys() == theirs["state"].keys()
    assert all(same_tensors(ours["state"][key], theirs["state"][key]) for key in ours["state"])
    assert trainer.lr_scheduler.state_dict() == expected.lr_scheduler.state_dict()
    assert history_of(trainer) == history_of(expected)
    positions = [(x.step, x.epoch, x.current_loss, x.best_val_loss, x.best_step) for x in (trainer, expected)]
    assert positions[0] == positions[1]


def interrupt(trainer: AnyTrainer, step: int) -> Path:
    """Train until a stop is asked for in the given step; return the checkpoint that this leaves."""
    stop_in(trainer, step)
    with pytest.raises(Interrupted, match=f"step {step}/{TOTAL}") as caught:
        trainer.train()
    assert caught.value.exit_code == 143
    assert trainer.run_dir is not None
    assert checkpoints_in(trainer.run_dir) == [step]
    return trainer.run_dir / "checkpoints" / f"checkpoint-{step}"


@pytest.mark.parametrize(("step", "num_workers"), [*((step, 0) for step in STOPS), (1, 2), (7, 2)])
def test_a_stopped_run_ends_with_the_same_bits(
    make_trainer: MakeTrainer, store: Path, tmp_path: Path, step: int, num_workers: int
) -> None:
    """With loading processes too; and they change nothing themselves."""
    unstopped = block_trainer(make_trainer, store, tmp_path / "a")
    unstopped.train()
    checkpoint = interrupt(block_trainer(make_trainer, store, tmp_path / "b", num_workers=num_workers), step)
    resumed = block_trainer(make_trainer, store, tmp_path / "b", seed=999, num_workers=num_workers)
    resumed.load_checkpoint(checkpoint)
    assert resumed.step == step
    resumed.train()
    assert_same_end(resumed, unstopped)
    assert checkpoints_in(tmp_path / "b") == sorted({step, TOTAL})


@pytest.mark.parametrize("step", [1, 6, 7])
def test_so_it_does_on_a_loader_that_knows_no_position(make_trainer: MakeTrainer, tmp_path: Path, step: int) -> None:
    unstopped = list_trainer(make_trainer, tmp_path / "a")
    unstopped.train()
    checkpoint = interrupt(list_trainer(make_trainer, tmp_path / "b"), step)
    resumed = list_trainer(make_trainer, tmp_path / "b", seed=999)
    resumed.load_checkpoint(checkpoint)
    resumed.train()
    assert_same_end(resumed, unstopped)


def test_a_run_stopped_in_every_step_ends_with_the_same_bits(store: Path, tmp_path: Path) -> None:
    unstopped = block_trainer(pretrain, store, tmp_path / "a")
    unstopped.train()
    for step in range(1, TOTAL + 1):
        trainer = block_trainer(pretrain, store, tmp_path / str(step), seed=step if step > 1 else 0)
        if step > 1:
            trainer.load_checkpoint(tmp_path / str(step - 1) / "checkpoints" / f"checkpoint-{step - 1}")
        interrupt(trainer, step)
    last = block_trainer(pretrain, store, tmp_path / "last", seed=99)
    last.load_checkpoint(tmp_path / str(TOTAL) / "checkpoints" / f"checkpoint-{TOTAL}")
    last.train()
    assert_same_end(last, unstopped)


def test_the_random_numbers_of_dropout_matter_here(store: Path, tmp_path: Path) -> None:
    """Without this, the tests above could pass although dropout did nothing."""
    ends = []
    for seed in (0, 1):
        trainer = block_trainer(pretrain, store, tmp_path / str(seed))
        torch.manual_seed(seed)
        trainer.train()
        ends.append(weights(trainer.model))
    assert not same_tensors(*ends)


def test_a_finished_run_that_is_loaded_has_nothing_left_to_do(store: Path, tmp_path: Path) -> None:
    first = block_trainer(pretrain, store, tmp_path)
    first.train()
    again = block_trainer(pretrain, store, tmp_path, seed=5)
    again.load_checkpoint(tmp_path / "checkpoints" / f"checkpoint-{TOTAL}")
    again.train()
    assert_same_end(again, first)


def test_a_checkpoint_on_the_way_is_as_good_as_one_of_a_stop(store: Path, tmp_path: Path) -> None:
    trainer = block_trainer(pretrain, store, tmp_path)
    trainer.config.save_interval = 5
    trainer.train()
    assert checkpoints_in(tmp_path) == [5, 10, TOTAL]
    for step in (5, 10):
        resumed = block_trainer(pretrain, store, tmp_path / "other", seed=step)
        resumed.load_checkpoint(tmp_path / "checkpoints" / f"checkpoint-{step}")
        resumed.train()
        assert_same_end(resumed, trainer)


class StopsWhileRead(list[Any]):
    """Validation batches that ask for a stop while they are read for the `turn`-th time."""

    def __init__(self, batches: list[Any], turn: int) -> None:
        super().__init__(batches)
        self.turn = turn
        self.stop = StopSignal()

    def __iter__(self) -> Iterator[Any]:
        self.turn -= 1
        for batch in super().__iter__():
            if self.turn == 0:
                self.stop.signum = signal.SIGTERM
            yield batch


@pytest.mark.parametrize(("turn", "step"), [(2, 6), (4, TOTAL)])
def test_a_stop_amid_an_evaluation_repeats_the_evaluation(tmp_path: Path, turn: int, step: int) -> None:
    unstopped = list_trainer(pretrain, tmp_path / "a")
    unstopped.train()
    stopped = list_trainer(pretrain, tmp_path / "b")
    loader = StopsWhileRead(make_batches(3, seed=1), turn)
    stopped.val_loader, loader.stop = loader, stopped.stop
    with pytest.raises(Interrupted):
        stopped.train()
    assert stopped.step == step
    assert stopped.history.validation["val_step"] == list(range(3, step, 3))
    resumed = list_trainer(pretrain, tmp_path / "b", seed=9)
    resumed.load_checkpoint(tmp_path / "b/checkpoints" / f"checkpoint-{step}")
    resumed.train()
    assert_same_end(resumed, unstopped)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_bad_steps_are_counted_across_a_stop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def diverging(run_dir: Path, stop_at: int) -> AnyTrainer:
        trainer = pretrain(make_student(), make_batches(20), num_epochs=1, run_dir=run_dir)

        def spoil(grad: Tensor) -> Tensor:
            if trainer.step + 1 == stop_at:
                trainer.stop.signum = signal.SIGTERM
            return grad * float("nan")

        trainer.model.get_parameter("norm.weight").register_hook(spoil)  # type: ignore[no-untyped-call]
        return trainer

    with caplog.at_level(logging.ERROR, "kd"), pytest.raises(Interrupted):
        diverging(tmp_path, stop_at=6).train()
    second = diverging(tmp_path, stop_at=-1)
    second.load_checkpoint(tmp_path / "checkpoints/checkpoint-6")
    with pytest.raises(NumericError, match="up to step 10"):
        second.train()


# --- what a checkpoint restores ---------------------------------------------------------------------------------


def test_everything_is_restored(make_trainer: MakeTrainer, store: Path, tmp_path: Path) -> None:
    trainer = block_trainer(make_trainer, store, tmp_path)
    checkpoint = interrupt(trainer, 7)
    model = make_student(seed=4, dropout=0.2, vocab_size=BYTES)
    other = make_trainer(model, *block_loaders(store), run_dir=tmp_path, learning_rate=0.5, num_epochs=9)
    other.load_checkpoint(checkpoint)
    assert same_tensors(weights(other.model), weights(trainer.model))
    assert other.config == trainer.config
    assert other.total_steps == trainer.total_steps == TOTAL
    assert (other.epoch, other.batch_in_epoch, other.step) == (1, 2, 7)
    assert (other.current_loss, other.best_val_loss) == (trainer.current_loss, trainer.best_val_loss)
    assert other.current_loss is not None
    assert other.best_val_loss is not None
    assert history_of(other) == history_of(trainer)
    assert other.lr_scheduler.get_last_lr() == trainer.lr_scheduler.get_last_lr()


def test_a_checkpoint_holds_what_is_specified(store: Path, tmp_path: Path) -> None:
    state = load_state(interrupt(block_trainer(pretrain, store, tmp_path), 5))
    assert {"optimizer", "scheduler", "epoch", "step", "current_loss", "best_val_loss", "config"} <= state.keys()
    assert (state["epoch"], state["step"]) == (0, 5)
    assert state["config"]["gradient_accumulation_steps"] == 2


def test_weights_only_restores_the_weights_alone(store: Path, tmp_path: Path) -> None:
    trainer = block_trainer(pretrain, store, tmp_path)
    checkpoint = interrupt(trainer, 5)
    other = block_trainer(pretrain, store, tmp_path / "b", seed=8)
    config = other.config
    other.load_checkpoint(str(checkpoint), weights_only=True)
    assert same_tensors(weights(other.model), weights(trainer.model))
    assert (other.step, other.epoch, other.current_loss, other.best_val_loss) == (0, 0, None, None)
    assert other.config is config
    assert not other.optimizer.state_dict()["state"]
    assert other.train()["train_step"][-1] == TOTAL


def test_a_path_may_be_a_string_anywhere(tmp_path: Path) -> None:
    trainer = pretrain(make_student(), make_batches(2))
    trainer.save_checkpoint(str(tmp_path / "mine" / "now"))
    other = pretrain(make_student(seed=3), make_batches(2))
    other.load_checkpoint(str(tmp_path / "mine" / "now"))
    assert same_tensors(weights(other.model), weights(trainer.model))
    assert trainer.state == "initialized"


def test_another_architecture_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    pretrain(make_student(), make_batches(2)).save_checkpoint(tmp_path / "c")
    other = pretrain(make_student(vocab_size=BYTES), make_batches(2))
    before = weights(other.model)
    with pytest.raises(IntegrityError, match=r"embedding\.weight"):
        other.load_checkpoint(tmp_path / "c")
    assert same_tensors(before, weights(other.model))
    assert other.step == 0


# --- signals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_real_signal_ends_training_with_a_checkpoint(tmp_path: Path, number: int, code: int) -> None:
    before = signal.getsignal(number)
    trainer = pretrain(make_student(), make_batches(9), num_epochs=1, run_dir=tmp_path)

    def kill(*_: Any) -> None:
        if trainer.step == 3:
            os.kill(os.getpid(), number)

    trainer.optimizer.register_step_post_hook(kill)
    with pytest.raises(Interrupted, match="The same command continues") as caught, signals_to(trainer.stop.request):
        trainer.train()
    assert caught.value.exit_code == code
    assert checkpoints_in(tmp_path) == [4]
    assert signal.getsignal(number) is before


def test_a_second_request_of_a_person_does_not_wait_and_says_what_is_lost() -> None:
    stop = StopSignal()
    with stop.listening():
        stop.request(signal.SIGTERM)
        with pytest.raises(Interrupted, match="after the last checkpoint is lost") as caught:
            stop.request(signal.SIGINT)
    assert caught.value.exit_code == 130


def test_a_signal_that_comes_again_lets_the_save_finish(tmp_path: Path) -> None:
    """As torchrun and SLURM send it: to the whole group, and then each passes it on."""
    trainer = pretrain(make_student(), make_batches(9), num_epochs=1, run_dir=tmp_path)
    trainer.optimizer.register_step_post_hook(lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    save = trainer.save_checkpoint

    def asked_again(path: str | Path) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(path)

    trainer.save_checkpoint = asked_again  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="checkpoint saved") as caught, signals_to(trainer.stop.request):
        trainer.train()
    assert caught.value.exit_code == 143
    assert checkpoints_in(tmp_path) == [1]


def test_a_stop_during_the_final_save_ends_as_a_stop_and_the_rest_is_done_later(tmp_path: Path) -> None:
    unstopped = list_trainer(pretrain, tmp_path / "a")
    unstopped.train()
    trainer = list_trainer(pretrain, tmp_path / "b")
    save = trainer.save_checkpoint

    def asked(path: str | Path) -> None:
        save(path)
        os.kill(os.getpid(), signal.SIGTERM)

    trainer.save_checkpoint = asked  # type: ignore[method-assign]
    with pytest.raises(Interrupted) as caught, signals_to(trainer.stop.request):
        trainer.train()
    assert caught.value.exit_code == 143
    resumed = list_trainer(pretrain, tmp_path / "b", seed=9)
    resumed.load_checkpoint(tmp_path / "b/checkpoints" / f"checkpoint-{TOTAL}")
    resumed.train()
    assert_same_end(resumed, unstopped)


def test_a_stop_while_another_part_is_scored_is_an_interruption() -> None:
    trainer = pretrain(make_student(), make_batches(2))
    trainer.stop.signum = signal.SIGTERM
    with pytest.raises(Interrupted, match="Stopped") as caught:
        trainer.score(make_batches(3))
    assert caught.value.exit_code == 143


def test_a_request_after_that_of_another_process_is_the_first() -> None:
    stop = StopSignal()
    with stop.listening():
        stop.signum = signal.SIGTERM  # as all agreed
        stop.request(signal.SIGINT)  # while a checkpoint is saved
        with pytest.raises(Interrupted):
            stop.request(signal.SIGINT)


def test_where_nothing_listens_a_request_ends_at_once() -> None:
    stop = StopSignal()
    with pytest.raises(Interrupted) as caught:
        stop.request(signal.SIGTERM)
    assert caught.value.exit_code == 143


def test_a_trainers_checkpoints_go_to_any_folder_that_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    trainer = pretrain(
        make_student(), make_batches(2), run_dir=tmp_path / "run", checkpoint_dir=str(folder), num_epochs=1
    )
    trainer.train()
    assert [path.name for path in folder.iterdir()] == [trainer.last_checkpoint.name] == ["checkpoint-2"]
    assert not list((tmp_path / "run").glob("**/checkpoint-*"))
