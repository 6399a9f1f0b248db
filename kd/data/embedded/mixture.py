"""Two example sets as one, in a given proportion."""

from collections.abc import Sequence

from kd.data.corpora import TRAIN
from kd.data.examples import AnswerExample, ExampleSet, content_of, in_fixed_order
from kd.data.sources.base import name_rank
from kd.errors import ConfigError, DataError
from kd.files import digest_of

_FORMAT = 2


def mix_answers(
    first: ExampleSet[AnswerExample], second: ExampleSet[AnswerExample], second_share: float
) -> ExampleSet[AnswerExample]:
    """Return all examples of `first`, and of `second` as many as make up the given share of each part.

    Where `second` has too few, the training part takes them several times, and a held-out part has a smaller share of
    them. Counts are rounded to whole examples.

    Args:
        first, second: Sets with the same parts; of `second`, the first examples of a part are taken.
        second_share: In [0, 1]; at 0 the mixture is `first` alone, at 1 `second` alone.

    Raises:
        ConfigError: if the share is out of range.
        DataError: at the first use, if the sets have different parts.
    """
    if not 0 <= second_share <= 1:
        raise ConfigError(f"data.arithmetic_share={second_share} is not allowed: it must be in [0, 1].")
    content = {"first": first.fingerprint, "second": second.fingerprint, "second_share": float(second_share)}
    description = f"a mixture of {first.description} and {second.description}"

    def read() -> dict[str, list[AnswerExample]]:
        _check_same_parts(first, second)
        return {part: _mix(part, first.parts[part], second.parts[part], second_share) for part in first.parts}

    return ExampleSet(description, digest_of({"mixture": _FORMAT, **content}), read)


def _check_same_parts(first: ExampleSet[AnswerExample], second: ExampleSet[AnswerExample]) -> None:
    if first.parts.keys() != second.parts.keys():
        raise DataError(
            f"{first.description} has the parts {', '.join(first.parts)}, but {second.description} has "
            f"{', '.join(second.parts)}: set data.test_ratio above 0 for both, or to 0."
        )


def _mix(
    part: str, first: Sequence[AnswerExample], second: Sequence[AnswerExample], second_share: float
) -> list[AnswerExample]:
    if second_share == 1:
        return in_fixed_order(second, "mixture")
    wanted = round(len(first) * second_share / (1 - second_share))
    if part != TRAIN:
        wanted = min(wanted, len(second))
    rounds, rest = divmod(wanted, len(second))
    copies = [*[second] * rounds, second[:rest]]
    chosen = [(example, "mixture") for example in first]
    # Each copy has an order of its own, so that the first n of the mixture are a fair sample of it.
    chosen += [(example, f"mixture {number}") for number, copy in enumerate(copies) for example in copy]
    ranked = sorted(chosen, key=lambda pair: name_rank(pair[1], content_of(pair[0])))
    return [example for example, _ in ranked]
