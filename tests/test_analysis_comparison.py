"""The answer of a sweep: chosen on validation, quoted from the test part, and in words where the data say nothing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from kd.analysis import Comparison, Runs, best_of, compare, compare_pair, load_runs, verdict
from kd.analysis.tables import settings_table
from kd.errors import DataError
from kd.files import read_json

from .synthetic_runs import TEACHER_LOSS, Sweep, fail, make_grid


def outcome(root: str = "outputs") -> tuple[Runs, Comparison, str]:
    """Load, compare and say it."""
    runs = load_runs(root)
    comparison = compare(runs)
    return runs, comparison, " ".join([*verdict(comparison), *comparison.notes])


def row_of(comparison: Comparison, label: str) -> "dict[str, float]":
    """Return a setting's row."""
    (row,) = comparison.settings[comparison.settings["label"] == label].to_dict("records")
    return {str(key): value for key, value in row.items()}


def test_the_answer_is_the_best_and_its_equals() -> None:
    make_grid(Sweep(documents=20))
    _, comparison, words = outcome()
    assert comparison.best is not None
    assert {str(comparison.best["label"]), *comparison.equals} == {"alpha 1, T 1", "alpha 1, T 2"}
    assert f"Cannot be told from it (95% confidence), 1 of 4: {comparison.equals[0]}." in words
    assert "seeds (3 a setting) and documents (20)" in words


def test_means_and_deviations_are_those_of_the_raw_files() -> None:
    make_grid(Sweep())
    _, comparison, _ = outcome()
    for directory_name, label in (("alpha0.5-temperature2", "alpha 0.5, T 2"), ("alpha0", "alpha 0")):
        found = list(Path("outputs/made").glob(f"{directory_name}-seed*"))
        perplexities = [read_json(path / "history.json")["test_ppl"] for path in found]
        row = row_of(comparison, label)
        assert row["seeds"] == len(found) == 3
        assert row["test_ppl"] == pytest.approx(np.mean(perplexities))
        assert row["test_ppl_sd"] == pytest.approx(np.std(perplexities, ddof=1))
    table = comparison.table()
    assert list(table.columns) == ["-", "T=1", "T=2"]
    assert table.iloc[0].tolist()[1:] == ["", ""]
    assert str(table.iloc[0, 0]).startswith(f"{row_of(comparison, 'alpha 0')['test_ppl']:.4g} +- ")


def test_validation_chooses_and_the_test_part_is_quoted() -> None:
    sweep = Sweep()
    for seed in range(2):
        sweep.add(0.0, 1, 5.0, seed)
        sweep.add(0.5, 1, 4.0, seed, test_shift=0.5)
        sweep.add(1.0, 1, 4.2, seed)
    _, comparison, words = outcome()
    assert comparison.best is not None
    assert comparison.best["label"] == "alpha 0.5, T 1"
    other = row_of(comparison, "alpha 1, T 1")
    assert other["difference"] == pytest.approx(-0.3, abs=0.05)
    assert "test perplexity" in words


def test_without_a_test_part_the_words_say_so() -> None:
    make_grid(Sweep(), test=False)
    _, comparison, words = outcome()
    assert comparison.part == "validation"
    assert "There is no test part" in words


def test_the_gap_closed_is_counted_in_nats() -> None:
    make_grid(Sweep())
    _, comparison, _ = outcome()
    baseline, student = row_of(comparison, "alpha 0"), row_of(comparison, "alpha 0.5, T 1")
    expected = (baseline["val_loss"] - student["val_loss"]) / (baseline["val_loss"] - TEACHER_LOSS)
    assert student["gap_closed"] == pytest.approx(expected)
    assert baseline["gap_closed"] == 0


def test_two_learning_rates_each_have_their_baseline() -> None:
    sweep = Sweep()
    make_grid(sweep, seeds=2)
    for seed in range(2):
        sweep.add(0.0, 1, 6.0, seed, learning_rate=1e-3)
        sweep.add(1.0, 1, 5.5, seed, learning_rate=1e-3)
    _, comparison, _ = outcome()
    assert comparison.panels == ["learning_rate"]
    slow = row_of(comparison, "alpha 1, T 1, learning_rate 0.001")
    fast = row_of(comparison, "alpha 1, T 1, learning_rate 0.003")
    assert slow["baseline_difference"] == pytest.approx(-0.5, abs=0.05)
    assert fast["baseline_difference"] == pytest.approx(-0.8, abs=0.05)
    assert len(comparison.table()) == 5


# --- what the data do not say -------------------------------------------------------------------------------------


@pytest.mark.parametrize("documents", [3, 20])
def test_one_seed_calls_nothing_worse(documents: int) -> None:
    make_grid(Sweep(documents=documents), seeds=1)
    _, comparison, words = outcome()
    assert not comparison.has_set
    assert comparison.equals == []
    assert comparison.settings[["low", "high", "baseline_low", "baseline_high"]].isna().all(axis=None)
    assert [row[1] for row in settings_table(comparison).rows] == ["lowest", "-", "-", "-", "-"]
    assert "another seed may rank them differently" in words
    assert "cannot say" in words


def test_the_verdict_and_the_interval_beside_it_agree() -> None:
    """Near and far differences, two seeds to four, few documents and many: worse means above 0, equal means not."""
    for number in range(12):
        random = np.random.default_rng(number)
        sweep = Sweep(Path(f"outputs/made{number}"), documents=int(random.integers(3, 20)), random=random)
        sweep.seed_spread = float(random.choice([0.001, 0.01]))
        for alpha in (0.0, 0.3, 0.5, 1.0):
            loss = 4.5 + random.normal(0, 0.02)
            for seed in range(2 + number % 3):
                sweep.add(alpha, 1, loss, seed)
        comparison = compare(load_runs(sweep.root))
        for row in comparison.settings[~comparison.settings["is_best"]].to_dict("records"):
            assert row["low"] < row["difference"] < row["high"]
            assert row["in_set"] == (row["low"] <= 0)


def test_unknown_documents_are_not_guessed() -> None:
    sweep = Sweep()
    make_grid(sweep, seeds=2)
    for path in sweep.root.glob("*/*_blocks.npy"):
        table = np.load(path)
        table["document"] = -1
        np.save(path, table)
    _, comparison, words = outcome()
    assert comparison.has_set
    assert "does not say which blocks are of one document" in words
    assert "alone; the documents are not counted" in words


def test_blocks_that_do_not_pair_are_not_paired() -> None:
    sweep = Sweep()
    make_grid(sweep, seeds=2)
    path = next(sweep.root.glob("alpha1-*seed1*")) / "test_blocks.npy"
    table = np.load(path)
    table["document"] = table["document"][::-1].copy()
    np.save(path, table)
    assert "are not the same" in outcome()[2]


def test_a_single_run() -> None:
    Sweep().add(0.5, 1, 4.5)
    _, comparison, words = outcome()
    assert "Only one setting is finished (alpha 0.5, T 1" in words
    assert not comparison.has_set


def test_no_baseline() -> None:
    sweep = Sweep()
    for seed in range(2):
        sweep.add(0.5, 1, 4.5, seed)
        sweep.add(1.0, 1, 4.2, seed)
    _, comparison, words = outcome()
    assert "There is no baseline (train.alpha=0)" in words
    assert comparison.settings["gap_closed"].isna().all()


def test_the_baseline_may_win() -> None:
    sweep = Sweep()
    for seed in range(2):
        sweep.add(0.0, 1, 4.0, seed)
        sweep.add(1.0, 1, 4.5, seed)
    assert "The best setting is the baseline itself" in outcome()[2]


@pytest.mark.parametrize("above_teacher", [-0.5, 0.005])
def test_a_teacher_no_better_than_the_baseline_leaves_no_gap(above_teacher: float) -> None:
    sweep = Sweep(seed_spread=0.0)
    for seed in range(2):
        sweep.add(0.0, 1, TEACHER_LOSS + above_teacher, seed)
        sweep.add(1.0, 1, TEACHER_LOSS + above_teacher - 0.4, seed)
    assert "share of the gap to the teacher it closes is not said" in outcome()[2]


def test_equal_losses() -> None:
    sweep = Sweep(document_spread=0.0, seed_spread=0.0)
    for alpha in (0.0, 0.5, 1.0):
        for seed in range(2):
            sweep.add(alpha, 1, 4.5, seed)
    _, comparison, words = outcome()
    assert "All losses are equal" in words
    assert not comparison.has_set
    assert comparison.settings["low"].isna().all()


def test_seeds_and_documents_that_agree_to_the_last_digit() -> None:
    sweep = Sweep(document_spread=0.0, seed_spread=0.0)
    for alpha in (0.0, 0.5, 1.0):
        for seed in range(2):
            sweep.add(alpha, 1, 4.5 - alpha, seed)
    _, comparison, words = outcome()
    assert "no noise to measure against" in words
    assert comparison.settings["low"].isna().all()


def test_nothing_finished() -> None:
    fail(Path("outputs/made"), "alpha1-temperature1-seed0-0123abcd", "x")
    _, comparison, words = outcome()
    assert comparison.best is None
    assert "No run is finished" in words


def test_a_run_without_a_final_loss_stays_out() -> None:
    sweep = Sweep()
    make_grid(sweep, seeds=2)
    path = next(sweep.root.glob("alpha1-temperature1-seed0-*"))
    for name in ("history.json", "result.json"):
        content = json.loads((path / name).read_text())
        content["val_loss"] = None
        (path / name).write_text(json.dumps(content))
    runs, comparison, words = outcome()
    assert any("no final validation loss" in problem for problem in runs.problems)
    assert row_of(comparison, "alpha 1, T 1")["seeds"] == 1
    assert "different numbers of seeds" in words


def test_runs_on_other_text_are_not_mixed_in() -> None:
    sweep = Sweep()
    make_grid(sweep, seeds=2)
    path = next(sweep.root.glob("alpha1-temperature1-seed0-*")) / "environment.json"
    content = json.loads(path.read_text())
    content["identity"]["corpus"] = "d" * 64
    path.write_text(json.dumps(content))
    _, comparison, words = outcome()
    assert "left out: 1 of 10 finished runs" in words
    assert comparison.settings["seeds"].sum() == 9


# --- pairs -------------------------------------------------------------------------------------------------------


def test_a_pair_is_compared_by_document_on_the_test_part() -> None:
    sweep = Sweep(documents=20)
    first, second = sweep.add(0.0, 1, 5.0), sweep.add(1.0, 1, 4.5)
    pair = compare_pair(load_runs("outputs"), first, second.name)
    tables = [np.load(path / "test_blocks.npy") for path in (first, second)]
    expected = (tables[0]["nll"].sum() - tables[1]["nll"].sum()) / tables[0]["tokens"].sum()
    assert pair.part == "test"
    assert pair.interval.estimate == pytest.approx(expected)
    assert pair.interval.low < 0.5 < pair.interval.high
    assert "20 documents" in pair.sentence


def test_a_pair_without_documents_has_no_interval() -> None:
    sweep = Sweep(documents=2)
    first, second = sweep.add(0.0, 1, 5.0), sweep.add(1.0, 1, 4.5)
    pair = compare_pair(load_runs("outputs"), first, second)
    assert not pair.interval.known
    assert "There is no interval" in pair.sentence


def test_an_unknown_run_is_named() -> None:
    Sweep().add(0.0, 1, 5.0)
    with pytest.raises(DataError, match="nowhere is not among the finished runs"):
        compare_pair(load_runs("outputs"), "nowhere", "nowhere")


# --- each at its own best -----------------------------------------------------------------------------------------


RATES = (0.001, 0.003, 0.01)


def make_recipes(sweep: Sweep, seeds: int = 3) -> None:
    """Write a grid in which alpha 1 is best at the middle rate and alpha 0 at the lowest, far behind."""
    for rate, away in zip(RATES, (0.3, 0.0, 0.4), strict=True):
        for warmup in (20, 100):
            for seed in range(seeds):
                late = 0.1 if warmup == 20 else 0.0
                arms = ((0.0, 1, 4.8 + abs(away - 0.3)), (1.0, 1, 4.2 + away), (1.0, 2, 4.5 + away))
                for alpha, temperature, loss in arms:
                    sweep.add(alpha, temperature, loss + late, seed, learning_rate=rate, warmup_steps=warmup)


def test_each_arm_stands_at_its_own_best() -> None:
    make_recipes(Sweep(documents=20))
    comparison = best_of(load_runs("outputs"), ["learning_rate", "warmup_steps"])
    words = " ".join(verdict(comparison))
    assert dict(zip(comparison.settings["label"], comparison.settings["best_at"], strict=True)) == {
        "alpha 0": "learning_rate 0.001, warmup_steps 100",
        "alpha 1, T 1": "learning_rate 0.003, warmup_steps 100",
        "alpha 1, T 2": "learning_rate 0.003, warmup_steps 100",
    }
    assert comparison.nuisance == ["learning_rate", "train.warmup_steps"]
    assert len(comparison.tried) == 18
    row = row_of(comparison, "alpha 1, T 1")
    assert row["baseline_difference"] == pytest.approx(-0.6, abs=0.05)
    assert row["baseline_low"] < row["baseline_difference"] < row["baseline_high"] < 0
    assert (
        "Lowest validation loss of 3 settings, each at its own best learning_rate and warmup_steps: alpha 1, T 1"
        in words
    )
    assert "the best learning_rate and warmup_steps, from 18 settings in all" in words
    assert len(comparison.directories) == 9
    assert comparison.table().shape == (2, 3)
    assert comparison.sensitivity().shape == (12, 3)


def test_the_choice_makes_intervals_wider() -> None:
    make_recipes(Sweep(documents=20))
    runs = load_runs("outputs")
    counted = row_of(best_of(runs, ["learning_rate", "warmup_steps"]), "alpha 1, T 2")
    at_best = (runs.runs["learning_rate"] == 0.003) & (runs.runs["train.warmup_steps"] == "100")
    alone = row_of(compare(replace(runs, runs=runs.runs[at_best], varied=[])), "alpha 1, T 2")
    assert counted["high"] - counted["difference"] > alone["high"] - alone["difference"]


def test_a_nuisance_without_choice_changes_nothing() -> None:
    make_grid(Sweep())
    runs = load_runs("outputs")
    comparison = best_of(runs, ["learning_rate", "train.warmup_steps", "learning_rate"])
    pd.testing.assert_frame_equal(comparison.settings, compare(runs).settings)
    assert comparison.notes[0] == "All runs have the same learning_rate: there is no best value of it to choose."


def test_a_value_with_fewer_seeds_is_not_chosen() -> None:
    sweep = Sweep(document_spread=0.0, seed_spread=0.0)
    for seed in range(2):
        sweep.add(1.0, 1, 4.5, seed, learning_rate=0.001)
        sweep.add(0.0, 1, 5.0, seed, learning_rate=0.001)
    sweep.add(1.0, 1, 4.0, 0, learning_rate=0.003)
    assert row_of(best_of(load_runs("outputs"), ["learning_rate"]), "alpha 1, T 1")["seeds"] == 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [("seed", "cannot be a nuisance setting"), ("warm_up", "is no setting of these runs. They differ in: alpha")],
)
def test_a_nuisance_that_is_none_is_refused(name: str, reason: str) -> None:
    make_grid(Sweep(), seeds=1)
    with pytest.raises(DataError, match=reason):
        best_of(load_runs("outputs"), [name])


# --- what does not compare is not ranked ----------------------------------------------------------------------------


def test_preferences_are_chosen_by_what_does_not_depend_on_beta() -> None:
    sweep = Sweep()
    for seed in range(3):
        sweep.prefer("dpo", 0.1, 0.62 + seed / 100, 0.9 + seed / 100, seed)
        sweep.prefer("dpo", 1.0, 0.20 + seed / 100, 0.7 + seed / 100, seed)
    _, comparison, words = outcome()
    assert comparison.best is not None
    assert comparison.best["label"] == "dpo, train.beta 0.1"
    assert "Best validation reward accuracy of 2 settings: dpo, train.beta 0.1 (test reward accuracy 0.91" in words
    other = row_of(comparison, "dpo, train.beta 1.0")
    assert other["difference"] == pytest.approx(0.2)
    assert "nats" not in words


@pytest.mark.parametrize(
    "other",
    [
        {"trainer": "orpo"},
        {"corpus": "d" * 64},
        {"tokenizer": "u" * 64},
        {"max_eval_examples": 16},
        {"model": {"hidden_size": 32, "max_seq_len": 48}},
        {"init_from": "f" * 64},
        {"train": {"beta": 0.1, "precision": "bfloat16"}},
    ],
    ids=lambda other: next(iter(other)),
)
def test_examples_scored_by_another_measure_are_not_ranked(other: dict[str, Any]) -> None:
    sweep = Sweep()
    for seed in range(2):
        sweep.prefer("dpo", 0.1, 0.6, 0.8, seed)
    sweep.prefer("dpo", 0.1, 0.6, 0.99, 0, other)
    _, comparison, words = outcome()
    assert "left out: 1 of 3 finished runs" in words
    assert comparison.settings["val_reward_accuracy"].tolist() == [0.8]


def test_rewards_of_other_answers_are_not_ranked() -> None:
    sweep = Sweep()
    for reward in ("exact_text", "exact_answer"):
        sweep.prefer("grpo", 0.1, 0.6, 0.8, 0, {"train": {"reward": reward, "max_new_tokens": 8}})
    assert load_runs("outputs").runs["evaluation"].nunique() == 2


def test_text_compares_where_it_is_scored_alike() -> None:
    sweep = Sweep()
    distilled, pretrained, half, rounded, shorter = (sweep.add(0.0, 1, 5.0, seed) for seed in range(5))

    def change(directory: Path, **values: Any) -> None:
        record = read_json(directory / "environment.json")
        record["identity"] |= values
        (directory / "environment.json").write_text(json.dumps(record))

    change(pretrained, trainer="pretrain", model={"hidden_size": 32, "max_seq_len": 64})
    change(half, train={"alpha": 0.0, "precision": "bfloat16"}, half_precision=2)
    change(rounded, train={"alpha": 0.0, "precision": "bfloat16"})  # of when logits were rounded for scores too
    change(shorter, seq_len=16)
    found = load_runs("outputs").runs.set_index("directory")["evaluation"]
    assert found[str(distilled)] == found[str(pretrained)] == found[str(half)]
    assert len(set(found)) == 3
