"""Scores per block against the reference losses, with padding and -inf logits, and the file that keeps them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import Tensor

from kd.errors import DataError
from kd.losses import IGNORE_INDEX, token_agreement, token_kl, token_nll
from kd.trainers.evaluation import BlockScores, ExampleScores, join, perplexity, save_scores, score_logits

ROWS, LENGTH, VOCAB = 4, 6, 9


def make_logits(seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(ROWS, LENGTH, VOCAB, generator=torch.Generator().manual_seed(seed))


def make_labels(masked: tuple[int, ...]) -> Tensor:
    labels = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(9))
    for row, count in enumerate(masked):
        labels[row, LENGTH - count :] = IGNORE_INDEX
    return labels


def assert_scores(scores: BlockScores, student: Tensor, teacher: Tensor, labels: Tensor) -> None:
    """Compare with the losses' own functions, summed over each row's valid positions."""
    valid = labels != IGNORE_INDEX
    rows = range(len(labels))
    expected = {
        "tokens": valid.sum(1),
        "nll": [token_nll(student, labels)[row][valid[row]].double().sum() for row in rows],
        "kl": [token_kl(student, teacher)[row][valid[row]].double().sum() for row in rows],
        "agreement": [token_agreement(student, teacher)[row][valid[row]].sum() for row in rows],
        "teacher_nll": [token_nll(teacher, labels)[row][valid[row]].double().sum() for row in rows],
    }
    for name, values in expected.items():
        column = getattr(scores, name)
        assert column.dtype == torch.float64
        torch.testing.assert_close(column, torch.as_tensor(values).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", [(0, 0, 0, 0), (0, 2, 5, LENGTH), (LENGTH,) * 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_are_the_losses_summed_over_each_block(masked: tuple[int, ...], dtype: torch.dtype) -> None:
    student, teacher, labels = make_logits(0).to(dtype), make_logits(1).to(dtype), make_labels(masked)
    assert_scores(score_logits(student, teacher, labels), student, teacher, labels)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(1e-8, 40.0))
def test_they_are_so_at_any_scale(seed: int, scale: float) -> None:
    student, teacher, labels = make_logits(seed, scale), make_logits(seed + 1, scale), make_labels((0, 1, 2, 3))
    assert_scores(score_logits(student, teacher, labels), student, teacher, labels)


def test_tokens_that_a_model_excludes_add_nothing() -> None:
    student, teacher, labels = make_logits(0), make_logits(1), make_labels((0, 2, 5, 6))
    labels[labels == VOCAB - 1] = 0
    teacher[..., -1] = -math.inf
    scores = score_logits(student, teacher, labels)
    assert scores.kl is not None
    assert bool(torch.isfinite(scores.kl).all())
    assert_scores(scores, student, teacher, labels)
    both = student.clone()
    both[..., -1] = -math.inf
    assert_scores(score_logits(both, teacher, labels), both, teacher, labels)


def test_what_stands_at_padding_does_not_matter() -> None:
    student, teacher, labels = make_logits(0), make_logits(1), make_labels((0, 2, 5, 6))
    clean = score_logits(student, teacher, labels)
    ignored = labels == IGNORE_INDEX
    student[ignored], teacher[ignored] = math.nan, math.inf
    spoiled = score_logits(student, teacher, labels)
    assert spoiled.metrics() == clean.metrics()


def test_without_a_teacher_its_columns_are_unknown() -> None:
    scores = score_logits(make_logits(0), None, make_labels((0, 0, 0, 0)))
    assert scores.kl is scores.agreement is scores.teacher_nll is None
    metrics = scores.metrics()
    assert metrics["val_kl"] is metrics["val_agreement"] is metrics["teacher_val_ppl"] is None
    assert metrics["val_loss"] is not None


def test_metrics_are_means_over_tokens_and_not_over_blocks() -> None:
    scores = BlockScores(tokens=torch.tensor([1.0, 3.0]), nll=torch.tensor([8.0, 4.0]), kl=torch.tensor([2.0, 0.0]))
    metrics = scores.metrics()
    assert metrics["val_loss"] == 3.0
    assert metrics["val_ppl"] == pytest.approx(math.exp(3.0))
    assert metrics["val_kl"] == 0.5
    assert scores.first(1).metrics()["val_loss"] == 8.0


def test_no_token_at_all_is_refused() -> None:
    """A mean over nothing is no loss, and least of all the lowest."""
    scores = BlockScores(torch.zeros(2).double(), torch.zeros(2).double())
    with pytest.raises(DataError, match="None of the 2 blocks"):
        scores.metrics()


def test_a_perplexity_beyond_all_numbers_is_infinite() -> None:
    assert perplexity(1e4) == math.inf
    assert perplexity(math.inf) == math.inf
    assert math.isnan(perplexity(math.nan)) or perplexity(math.nan) == math.inf


def test_joined_scores_are_those_of_all_blocks() -> None:
    student, teacher, labels = make_logits(0), make_logits(1), make_labels((0, 2, 5, 6))
    parts = [score_logits(student[i : i + 2], teacher[i : i + 2], labels[i : i + 2]) for i in (0, 2)]
    assert_scores(join(parts, torch.cat), student, teacher, labels)


@pytest.mark.parametrize("documents", [None, np.array([0, 0, 3, 7])])
def test_the_file_of_block_scores_needs_no_pickle(
    tmp_path: Path, documents: "np.ndarray[tuple[int], np.dtype[np.int64]] | None"
) -> None:
    scores = score_logits(make_logits(0), make_logits(1), make_labels((0, 2, 5, 6)))
    save_scores(scores, tmp_path, "val", documents)
    table = np.load(tmp_path / "val_blocks.npy", allow_pickle=False)
    assert table.dtype.names == ("document", "tokens", "nll")
    assert table["document"].tolist() == ([-1] * 4 if documents is None else [0, 0, 3, 7])
    assert table["tokens"].tolist() == [6, 4, 1, 0]
    assert table["nll"].tolist() == scores.nll.tolist()
    assert table["nll"].sum() / table["tokens"].sum() == pytest.approx(scores.metrics()["val_loss"])


def test_the_file_of_example_scores_has_a_column_for_each_score(tmp_path: Path) -> None:
    scores = ExampleScores({"loss": torch.tensor([0.5, 0.25]).double(), "reward": torch.tensor([1.0, 0.0]).double()})
    save_scores(scores, tmp_path, "test", np.array([7, 9]))
    table = np.load(tmp_path / "test_examples.npy", allow_pickle=False)
    assert table.dtype.names == ("example", "loss", "reward")
    assert table.tolist() == [(7, 0.5, 1.0), (9, 0.25, 0.0)]
    assert scores.metrics() == {"val_loss": 0.375, "val_reward": 0.5}


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (5, 5), (30, 50), (600, 1000)])
def test_the_lower_bound_of_a_share_is_wilsons(hits: int, count: int) -> None:
    column = (torch.arange(count) < hits).double()
    metrics = ExampleScores({"loss": column, "reward_accuracy": column}, ("reward_accuracy",)).metrics()
    expected = binomtest(hits, count).proportion_ci(method="wilson").low
    assert metrics["val_reward_accuracy_low"] == pytest.approx(expected, abs=1e-6)
    assert "val_loss_low" not in metrics
