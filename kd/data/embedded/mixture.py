"""Two example sets as one, in a given proportion."""

from collections.abc import Sequence

from kd.data.examples import AnswerExample, ExampleSet, in_fixed_order
from kd.errors import ConfigError, DataError
from kd.files import digest_of

_FORMAT = 1


def mix_answers(
    first: ExampleSet[AnswerExample], second: ExampleSet[AnswerExample], second_share: float
) -> ExampleSet[AnswerExample]:
    """Return the largest mixture in which `second` has the given share of each part's examples; none is repeated.

    Counts are rounded to whole examples, so that a tiny part may lack the rarer kind.

    Args:
        first, second: Sets with the same parts; of each, the first examples of a part are taken.
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
        return {part: _mix(first.parts[part], second.parts[part], second_share) for part in first.parts}

    return ExampleSet(description, digest_of({"mixture": _FORMAT, **content}), read)


def _check_same_parts(first: ExampleSet[AnswerExample], second: ExampleSet[AnswerExample]) -> None:
    if first.parts.keys() != second.parts.keys():
        raise DataError(
            f"{first.description} has the parts {', '.join(first.parts)}, but {second.description} has "
            f"{', '.join(second.parts)}: set data.test_ratio above 0 for both, or to 0."
        )


def _mix(first: Sequence[AnswerExample], second: Sequence[AnswerExample], second_share: float) -> list[AnswerExample]:
    if second_share == 0:
        chosen = list(first)
    elif second_share == 1:
        chosen = list(second)
    else:
        total = min(len(first) / (1 - second_share), len(second) / second_share)
        chosen = [*first[: round(total * (1 - second_share))], *second[: round(total * second_share)]]
    # Not the order of the sets themselves: of the larger one only the first of that order are here, and they would all
    # come first again.
    return in_fixed_order(chosen, "mixture")
