"""The number that runs are chosen by, and a result in words."""

import pytest

from kd.outcome import headline, objective


def test_text_is_chosen_by_its_loss() -> None:
    result = {"val_loss": 4.5, "val_ppl": 90.0, "test_loss": 4.6}
    assert (objective(result), objective(result, "test")) == (4.5, 4.6)
    assert headline(result) == "validation perplexity 90.00"


def test_preferences_are_chosen_by_the_pairs_ranked_wrongly() -> None:
    """At a larger beta the loss of the same ranking is lower: a sweep over beta must not find that."""
    small, large = ({"val_loss": loss, "val_reward_accuracy": 0.75} for loss in (0.621, 0.201))
    assert objective(small) == objective(large) == pytest.approx(0.25)
    assert headline(small) == "validation reward accuracy 0.7500"


def test_other_results_are_chosen_by_their_loss() -> None:
    assert objective({"val_loss": -0.5, "val_reward": 0.5}) == -0.5
    assert headline({"val_loss": -0.5}) == "validation loss -0.5000"
