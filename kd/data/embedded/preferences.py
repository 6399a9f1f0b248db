"""Preference pairs from instruction pairs: the right response against that of another prompt."""

from collections.abc import Sequence

from kd.data.examples import AnswerExample, ExampleSet, PreferenceExample, content_of, in_fixed_order
from kd.data.sources.base import name_rank
from kd.errors import DataError
from kd.files import digest_of

TWINS = 2
"""Pairs that lend each other their answers, which lie next to each other: the `unit` to shuffle by in training."""
_FORMAT = 2


def preference_examples(answers: ExampleSet[AnswerExample]) -> ExampleSet[PreferenceExample]:
    """Return pairs in which the rejected answer is the response to another prompt of the same part.

    Responses of a part are made distinct and paired by length, and each two lend each other the rejected answer. So
    every text is chosen once and rejected once: neither its length nor its wording, only its prompt tells which.
    The two lie next to each other. Trained on at different times, they would first teach that an answer is good, then
    that it is bad, whatever the prompt.

    Raises:
        DataError: at the first use, if a part has fewer than two different responses.
    """
    fingerprint = digest_of({"preferences": _FORMAT, "answers": answers.fingerprint})
    description = f"preference pairs from {answers.description}"
    return ExampleSet(
        description, fingerprint, lambda: {part: _swap(part, found) for part, found in answers.parts.items()}
    )


def _swap(part: str, answers: Sequence[AnswerExample]) -> list[PreferenceExample]:
    # Of equal responses the first in the part's order stays: each would be as right for the other's prompt.
    distinct = {answer.response: answer for answer in reversed(answers)}
    if len(distinct) < 2:
        raise DataError(
            f"The {part} part has {len(distinct)} different response(s), and a preference pair needs two: one to "
            "choose, another's to reject. Give more examples."
        )
    ranked = sorted(distinct.values(), key=lambda answer: (len(answer.response), answer.response))
    # Of an odd number, the longest is left out.
    twins = [_lend(one, other) for one, other in zip(ranked[::2], ranked[1::2], strict=False)]
    twins.sort(key=lambda pairs: name_rank("twins", content_of(pairs[0])))
    return [pair for pairs in twins for pair in pairs]


def _lend(one: AnswerExample, other: AnswerExample) -> list[PreferenceExample]:
    """Return the pairs of two prompts, each of which has the other's response as the rejected one."""
    first = PreferenceExample(one.prompt, one.response, other.response)
    second = PreferenceExample(other.prompt, other.response, one.response)
    return in_fixed_order([first, second])
