"""DPO and ORPO: losses by hand, the reference, and what becomes of the pairs that are trained on."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import IntegrityError, Interrupted
from kd.model import StudentModel
from kd.trainers import DPOTrainer
from kd.trainers.base import BaseTrainer
from kd.trainers.state import Batch

from .examples import cut, dpo, draw, make_pairs, orpo, pairs_batch
from .helpers import checkpoints_in, history_of, make_student, same_tensors, stop_in, weights

PROMPTS, CHOSEN, REJECTED = draw([2, 1, 3], 4), draw([3, 1, 4], 5), draw([1, 5, 2], 6)
BOTH = pytest.mark.parametrize("make", [dpo, orpo])


def batch_of(sides: tuple[str, str] = ("left", "right")) -> Batch:
    return pairs_batch(PROMPTS, CHOSEN, REJECTED, sides)


def summed(model: nn.Module, answers: list[list[int]]) -> Tensor:
    """Return each answer's log-probability by its model, token by token, in float64."""
    totals = []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        with torch.no_grad():
            log_p = model(torch.tensor([prompt + answer]))[0].double().log_softmax(-1)
        rows = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        totals.append(sum(log_p[row, token] for row, token in zip(rows, answer, strict=True)))
    return torch.stack([torch.as_tensor(total) for total in totals])


def counted(model: nn.Module) -> list[int]:
    """Count the rows that a model's embedding reads from now on, call by call."""
    rows: list[int] = []
    model.get_submodule("embedding").register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    return rows


def gradients(trainer: BaseTrainer[Any], batch: Batch) -> dict[str, Tensor | None]:
    trainer.training_step(batch)
    return {name: p.grad for name, p in trainer.model.named_parameters()}


# --- both -------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("sides", [("left", "left"), ("right", "left"), ("right", "right")])
def test_the_side_of_the_padding_does_not_matter(make: Callable[..., Any], sides: tuple[str, str]) -> None:
    reference = {"ref_model": make_student(seed=3)} if make is dpo else {}
    found, expected = (gradients(make(make_student(), **reference), batch_of(s)) for s in (sides, ("left", "right")))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@BOTH
def test_overfitted_pairs_are_ranked_right(make: Callable[..., Any]) -> None:
    batch = make_pairs(6)
    before = make(make_student(), val=[batch]).evaluate()
    trainer = make(make_student(), [batch], [batch], num_epochs=40, beta=0.5, learning_rate=3e-3, log_interval=5)
    history = trainer.train()
    assert history["reward_accuracy"][-1] == history["val_reward_accuracy"][-1] == 1.0
    assert history["reward_margin"][-1] > history["reward_margin"][0] + 0.5
    assert history["val_loss"][-1] < before["val_loss"]
    assert history["train_loss"][-1] < 0.7 * history["train_loss"][0]
    metrics = trainer.evaluate()
    columns = ("loss", "reward_margin", "reward_accuracy", "reward_accuracy_low", "log_ratio_margin")
    assert metrics.keys() == {f"val_{name}" for name in columns}
    assert metrics == pytest.approx({key: history[key][-1] for key in metrics})


@BOTH
def test_an_evaluation_is_a_mean_over_pairs_however_they_are_batched(make: Callable[..., Any]) -> None:
    reference = {"ref_model": make_student(seed=3)} if make is dpo else {}
    whole = make_pairs(7)
    trainer = make(make_student(), **reference)
    expected = trainer.evaluate([whole])
    assert trainer.evaluate(cut(whole, 3)) == pytest.approx(expected, rel=1e-5)
    one_by_one = [trainer.evaluate([pair]) for pair in cut(whole, 1)]
    for key, value in expected.items():
        if key.endswith("_low"):  # a bound knows how many pairs there are
            continue
        assert value == pytest.approx(sum(metrics[key] for metrics in one_by_one) / 7, rel=1e-5)
    assert trainer.evaluate(cut(whole, 2), max_blocks=3) == pytest.approx(trainer.evaluate(cut(whole, 3)[:1]), rel=1e-5)


@BOTH
@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_stopped_run_ends_with_the_same_bits(make: Callable[..., Any], tmp_path: Path, step: int) -> None:
    settings = {"num_epochs": 2, "gradient_accumulation_steps": 2, "log_interval": 4, "eval_interval": 3}
    loaders = [make_pairs(2 + seed % 2, seed) for seed in range(7)], [make_pairs(3, seed) for seed in (8, 9)]

    def trainer(run_dir: str, seed: int = 0) -> Any:
        return make(make_student(seed, dropout=0.2), *loaders, run_dir=tmp_path / run_dir, **extra, **settings)

    extra = {"ref_model": make_student(seed=5)} if make is dpo else {}
    unstopped = trainer("a")
    unstopped.train()
    stopped = trainer("b")
    stop_in(stopped, step)
    with pytest.raises(Interrupted):
        stopped.train()
    resumed = trainer("b", seed=9)
    resumed.load_checkpoint(tmp_path / "b" / "checkpoints" / f"checkpoint-{step}")
    resumed.train()
    assert unstopped.total_steps == 8
    assert checkpoints_in(tmp_path / "b") == [step, 8]
    assert same_tensors(weights(resumed.model), weights(unstopped.model))
    assert history_of(resumed) == history_of(unstopped)


@BOTH
def test_a_checkpoint_of_another_architecture_is_refused(make: Callable[..., Any], tmp_path: Path) -> None:
    make(make_student(vocab_size=20)).save_checkpoint(tmp_path / "c")
    with pytest.raises(IntegrityError, match=r"embedding\.weight"):
        make(make_student()).load_checkpoint(tmp_path / "c")


@BOTH
def test_equal_answers_have_no_margin_and_do_not_break(make: Callable[..., Any]) -> None:
    batch = pairs_batch(PROMPTS, CHOSEN, CHOSEN)
    terms = make(make_student()).training_step(batch)
    assert (terms["reward_margin"], terms["reward_accuracy"]) == (0.0, 0.5)
    assert math.isfinite(terms["loss"])


@BOTH
def test_the_margin_of_log_ratios_and_the_accuracy_do_not_depend_on_beta(make: Callable[..., Any]) -> None:
    reference = {"ref_model": make_student(seed=3)} if make is dpo else {}
    first, second = (make(make_student(), beta=beta, **reference).evaluate([batch_of()]) for beta in (0.1, 1.0))
    for name in ("val_reward_accuracy", "val_log_ratio_margin"):
        assert first[name] == pytest.approx(second[name], rel=1e-5)
    assert first["val_loss"] != pytest.approx(second["val_loss"], rel=1e-3)
    assert first["val_log_ratio_margin"] == pytest.approx(first["val_reward_margin"] / 0.1)


@BOTH
def test_a_tie_is_half_a_win(make: Callable[..., Any]) -> None:
    """The first pair is a tie, one of the others is ranked right and one wrong."""
    pair, turned = ([PROMPTS[1]], CHOSEN[1:2], REJECTED[1:2]), ([PROMPTS[1]], REJECTED[1:2], CHOSEN[1:2])
    tie = ([PROMPTS[1]], CHOSEN[1:2], CHOSEN[1:2])
    accuracies = []
    for parts in ([pair], [turned], [tie], [tie, pair, turned], [tie, pair, pair]):
        batch = pairs_batch(*([row for part in parts for row in part[i]] for i in range(3)))
        trainer = make(make_student(), **({"ref_model": make_student(seed=3)} if make is dpo else {}))
        terms = trainer.training_step(batch)
        assert trainer.evaluate([batch])["val_reward_accuracy"] == pytest.approx(terms["reward_accuracy"])
        accuracies.append(terms["reward_accuracy"])
    right = accuracies[0]
    assert right in (0.0, 1.0)
    assert accuracies == pytest.approx([right, 1 - right, 0.5, 0.5, (0.5 + 2 * right) / 3])


@BOTH
def test_answers_without_tokens_do_not_break(make: Callable[..., Any]) -> None:
    trainer = make(make_student())
    terms = trainer.training_step(pairs_batch(PROMPTS, [[], [], [3]], [[], [4], []]))
    assert all(math.isfinite(value) for value in terms.values())
    assert all(torch.isfinite(p.grad).all() for p in trainer.model.parameters())
    nothing = make(make_student())
    assert math.isfinite(nothing.training_step(pairs_batch(PROMPTS, [[]] * 3, [[]] * 3))["loss"])
    assert all(not p.grad.any() for p in nothing.model.parameters() if p.grad is not None)


# --- DPO --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_that_of_the_formula(smoothing: float) -> None:
    model, reference, beta = make_student(), make_student(seed=3), 0.3
    terms = dpo(model, ref_model=reference, beta=beta, label_smoothing=smoothing).training_step(batch_of())
    rewards = [beta * (summed(model, answers) - summed(reference, answers)) for answers in (CHOSEN, REJECTED)]
    margin = rewards[0] - rewards[1]
    losses = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
    assert terms["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert terms["reward_margin"] == pytest.approx(float(margin.mean()), rel=1e-5)
    assert terms["reward_accuracy"] == pytest.approx(float((margin > 0).double().mean()))
    assert terms.keys() == {"loss", "reward_margin", "reward_accuracy"}


def test_dpo_starts_at_log_two() -> None:
    trainer = dpo(make_student(), [make_pairs(4)], [make_pairs(4)], num_epochs=3, log_interval=1)
    before = trainer.evaluate()
    assert before["val_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert (before["val_reward_margin"], before["val_reward_accuracy"]) == (0.0, 0.5)
    history: Any = trainer.train()
    assert history["train_loss"][0] == pytest.approx(math.log(2), rel=1e-6)
    assert (history["reward_margin"][0], history["reward_accuracy"][0]) == (0.0, 0.5)
    assert history["train_loss"][-1] < 0.9 * math.log(2)


def test_the_model_before_training_is_the_reference(tmp_path: Path) -> None:
    """Not the model of a checkpoint that is loaded afterwards: a resumed run has the reference of its start."""
    model = make_student()
    trainer = dpo(model, [make_pairs(4)], num_epochs=3)
    trainer.train()
    assert same_tensors(weights(trainer._reference.model), weights(make_student()))
    assert not same_tensors(weights(model), weights(make_student()))
    trainer.save_checkpoint(tmp_path / "c")
    resumed = dpo(make_student(), [make_pairs(4)], num_epochs=3)
    resumed.load_checkpoint(tmp_path / "c")
    assert same_tensors(weights(resumed._reference.model), weights(make_student()))


def test_a_given_reference_is_frozen_and_stays_as_it_is() -> None:
    reference = make_student(seed=3, dropout=0.3).train()
    before = weights(reference)
    trainer = dpo(make_student(), [make_pairs(4)], ref_model=reference, num_epochs=3)
    trainer.train()
    assert same_tensors(before, weights(reference))
    assert not reference.training
    assert all(not p.requires_grad and p.grad is None for p in reference.parameters())
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in reference.parameters()}


def test_the_reference_reads_each_pair_once() -> None:
    batches, validation = [make_pairs(3, seed) for seed in range(4)], [make_pairs(2, seed) for seed in (7, 8)]
    reference = make_student(seed=3)
    rows = counted(reference)
    dpo(make_student(), batches, validation, ref_model=reference, num_epochs=5, eval_interval=3).train()
    assert rows == [6] * 3 + [4] * 2 + [6]


class Forgetful(DPOTrainer):
    """It asks the reference every time."""

    def _reference_logprobs(self, batch: Batch) -> Tensor:
        self._known.clear()
        return super()._reference_logprobs(batch)


def test_what_is_remembered_of_the_reference_is_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for trainer_class in (DPOTrainer, Forgetful):
        monkeypatch.setattr("tests.trainers.examples.DPOTrainer", trainer_class)
        reference = make_student(seed=3)
        rows = counted(reference)
        batches = [make_pairs(3, seed) for seed in range(4)]
        trainer = dpo(make_student(), batches, batches[:2], ref_model=reference, num_epochs=3)
        history = trainer.train()
        ends.append((weights(trainer.model), history["train_loss"], history["val_loss"]))
        assert sum(rows) == (24 if trainer_class is DPOTrainer else 84)
    assert same_tensors(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


def test_other_pairs_with_the_same_ids_are_not_taken_for_known_ones() -> None:
    """Ids are those of a data set: training, validation and test pairs may share them."""
    trainer = dpo(make_student(), ref_model=make_student(seed=3))
    parts = [{**make_pairs(3, seed), "example_id": torch.arange(3)} for seed in range(3)]
    found = [trainer.evaluate([part]) for part in parts]
    for part, metrics in zip(parts, found, strict=True):
        alone = dpo(make_student(), ref_model=make_student(seed=3)).evaluate([part])
        assert metrics == pytest.approx(alone, rel=1e-6)


def test_pairs_that_differ_in_their_prompts_alone_are_told_apart() -> None:
    trainer = dpo(make_student(), ref_model=make_student(seed=3))
    for prompts in ([[1], [1, 2]], [[2], [1, 3]], [[1, 5], [6, 2]]):
        batch = pairs_batch(prompts, [[5, 6], [6]], [[7], [8, 9]])
        fresh = dpo(make_student(), ref_model=make_student(seed=3)).training_step(batch)
        assert trainer.training_step(batch) == pytest.approx(fresh, rel=1e-6)


def test_the_same_pairs_padded_otherwise_are_known() -> None:
    reference = make_student(seed=3)
    rows = counted(reference)
    trainer = dpo(make_student(), ref_model=reference)
    trainer.training_step(batch_of())
    trainer.evaluate([{name: value[1:] for name, value in batch_of(("right", "left")).items()}])
    assert rows == [6]


def test_a_resumed_run_does_not_ask_the_reference_again(tmp_path: Path) -> None:
    batches = [make_pairs(3, seed) for seed in range(2)]
    first = dpo(make_student(), batches, ref_model=make_student(seed=3), num_epochs=2)
    first.training_step(batches[0])
    first.save_checkpoint(tmp_path / "c")
    reference = make_student(seed=3)
    rows = counted(reference)
    resumed = dpo(make_student(), batches, ref_model=reference, num_epochs=2)
    resumed.load_checkpoint(tmp_path / "c")
    resumed.train()
    assert rows == [6]


def test_a_checkpoint_before_the_first_pair_can_be_loaded(tmp_path: Path) -> None:
    dpo(make_student()).save_checkpoint(tmp_path / "c")
    trainer = dpo(make_student(), [make_pairs(2)], num_epochs=1)
    trainer.load_checkpoint(tmp_path / "c")
    assert trainer.training_step(make_pairs(2))["loss"] == pytest.approx(math.log(2), rel=1e-6)


# --- ORPO -------------------------------------------------------------------------------------------------------


def by_hand(model: StudentModel, beta: float) -> dict[str, float]:
    """ORPO's parts from full logits, in float64."""
    chosen, rejected = summed(model, CHOSEN), summed(model, REJECTED)
    lengths = [torch.tensor([len(answer) for answer in answers]).double() for answers in (CHOSEN, REJECTED)]
    means = chosen / lengths[0], rejected / lengths[1]
    odds = [torch.log(mean.exp() / (1 - mean.exp())) for mean in means]
    cross_entropy = float(-chosen.sum() / lengths[0].sum())
    odds_ratio = float(-F.logsigmoid(odds[0] - odds[1]).mean())
    margin = beta * (means[0] - means[1])
    return {
        "loss": cross_entropy + beta * odds_ratio,
        "ce_loss": cross_entropy,
        "odds_ratio_loss": odds_ratio,
        "reward_margin": float(margin.mean()),
        "reward_accuracy": float((margin > 0).double().mean()),
    }


def test_orpo_and_its_parts_are_those_of_the_formula() -> None:
    found = orpo(make_student(), beta=0.7).training_step(batch_of())
    assert found == pytest.approx(by_hand(make_student(), 0.7), rel=1e-5)


def test_orpos_parts_are_in_the_history() -> None:
    history = orpo(make_student(), [batch_of()], num_epochs=1, log_interval=1, beta=0.7).train()
    expected = by_hand(make_student(), 0.7)
    expected["train_loss"] = expected.pop("loss")
    assert {key: history[key] for key in expected} == {
        key: [pytest.approx(value, rel=1e-5)] for key, value in expected.items()
    }
