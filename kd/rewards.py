"""Reward functions: how good a response is, from its text and a reference answer."""

import re
from collections.abc import Callable
from typing import Final

from kd.errors import DataError

RewardFunction = Callable[[str, str], float]
"""Takes a response (without its prompt) and the reference answer; gives a finite number, larger is better."""

# Not \d, which matches the digits of all scripts.
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")


def exact_answer(response: str, answer: str) -> float:
    """Return 1.0 if the first number in the response is the reference, figure by figure, else 0.0.

    What follows the first number does not count. `19.0` and `019` are not `19`.

    Args:
        response: Any text.
        answer: A number like `19`, `-3` or `0.5`.

    Raises:
        DataError: if the reference is not such a number: no response could ever match it.
    """
    require_number(answer)
    found = _NUMBER.search(response)
    return float(found is not None and found.group() == answer.strip())


def require_number(answer: str) -> None:
    """Raise DataError unless a reference answer is a number like `19`, `-3` or `0.5`."""
    if _NUMBER.fullmatch(answer.strip()) is None:
        raise DataError(
            f"The reference answer {answer!r} is not a number like 19, -3 or 0.5, which the reward exact_answer "
            "compares with: mend the `answer` column, or use another reward."
        )


def exact_text(response: str, answer: str) -> float:
    """Return 1.0 if the response is the reference, but for white space around either, else 0.0."""
    return float(response.strip() == answer.strip())


REWARDS: Final[dict[str, RewardFunction]] = {"exact_text": exact_text, "exact_answer": exact_answer}
"""What a configuration can name; one's own function is given through the Python API."""

ANSWER_CHECKS: Final[dict[str, Callable[[str], None]]] = {"exact_answer": require_number}
"""What a reward requires of every reference answer, by the reward's name; it raises DataError. Of others: nothing."""
