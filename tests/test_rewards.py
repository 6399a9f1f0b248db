"""Rewards: the first number counts, figure by figure, and a reference that is no number is refused."""

import pytest

from kd.errors import DataError
from kd.rewards import REWARDS, exact_answer


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


def test_a_name_gives_the_function() -> None:
    assert REWARDS["exact_answer"](" 7", "7") == 1.0
