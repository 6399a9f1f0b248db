"""Rewards: the whole text, or the first number, figure by figure; a reference that is no number is refused."""

import pytest

from kd.config.train import REWARDS as NAMES
from kd.errors import DataError
from kd.rewards import REWARDS, exact_answer, exact_text


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        (" 19", "19", 1.0),
        ("The sum is 19.", "19", 1.0),
        ("19 + 1 = 20", " 19\n", 1.0),
        ("+19", "19", 1.0),
        ("0.5 litres", "0.5", 1.0),
        ("-3", "-3", 1.0),
        (" 20", "19", 0.0),
        ("20, no, 19", "19", 0.0),
        ("190", "19", 0.0),
        ("019", "19", 0.0),
        ("19.5", "19", 0.0),
        ("-19", "19", 0.0),
        ("\u0661\u0669", "19", 0.0),  # Arabic figures
        ("nineteen", "19", 0.0),
        ("", "19", 0.0),
    ],
)
def test_the_first_number_decides(response: str, answer: str, reward: float) -> None:
    assert exact_answer(response, answer) == reward


@pytest.mark.parametrize("answer", ["Paris", "", "1,000", "19 apples", "\u0661"])
def test_a_reference_that_is_no_number_is_refused(answer: str) -> None:
    with pytest.raises(DataError, match="not a number"):
        exact_answer("19", answer)


@pytest.mark.parametrize(
    ("response", "reward"), [(" 1 9", 1.0), ("1 9\n", 1.0), ("19", 0.0), (" 1 9 0", 0.0), ("1  9", 0.0), ("", 0.0)]
)
def test_the_whole_text_decides(response: str, reward: float) -> None:
    assert exact_text(response, " 1 9") == reward


def test_a_name_gives_the_function() -> None:
    assert REWARDS["exact_answer"](" 7", "7") == 1.0
    assert tuple(REWARDS) == NAMES
