"""Additions with answers that can be verified, digit by digit.

Digits stand apart, so that each is a token of its own in any vocabulary that has " 7" (on which small models depend:
Nogueira et al. 2021, arXiv:2102.13019), and numbers have leading zeros, so that digits of one place are always as far
apart. In one comparison, 500 SFT steps of the small student from the same weights, 2 % of held-out sums were right
without the zeros and 97 % with them; a longer run from other weights reached 85 % without them.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

from kd.data.examples import AnswerExample, ExampleSet, PromptExample, held_out_ratios, split_by_group
from kd.data.sources.base import name_rank
from kd.errors import ConfigError
from kd.files import digest_of

_FORMAT = 3
_MOST_ENUMERATED_DIGITS = 2
_MOST_PAIRS = 100_000
_Pair = tuple[int, int]
"""Two operands, the smaller first."""


def arithmetic_prompts(
    digits: int = 2, num_pairs: int | None = None, val_ratio: float = 0.1, test_ratio: float = 0.0
) -> ExampleSet[PromptExample]:
    """Return additions like `Sum: 1 2 + 0 7 =` with the answer `0 1 9`, in both orders of their operands.

    Both orders are in one part, so that no held-out sum was trained on the other way round.

    Args:
        digits: Most digits of an operand; operands are in [0, 10^digits).
        num_pairs: Unordered pairs of operands, drawn at random; None: all (55 with 1 digit, 5,050 with 2; more digits
            have too many).
        val_ratio: Share of the examples for validation, in (0, 1).
        test_ratio: Share of the examples for the test part, in [0, 1).

    Raises:
        ConfigError: if a value is out of range.
    """
    held_out_ratios(val_ratio, test_ratio)
    _check_size(digits, num_pairs)
    content = {"digits": digits, "num_pairs": num_pairs, "val_ratio": val_ratio, "test_ratio": test_ratio}
    description = f"additions of numbers of up to {digits} digit(s)"

    def read() -> dict[str, list[PromptExample]]:
        pairs = _pairs(digits, num_pairs)
        groups = {addition: f"{a}+{b}" for a, b in pairs for addition in _both_orders(a, b, digits)}
        return split_by_group(description, list(groups), groups.__getitem__, val_ratio, test_ratio)

    return ExampleSet(description, digest_of({"arithmetic": _FORMAT, **content}), read)


def arithmetic_answers(prompts: ExampleSet[PromptExample]) -> ExampleSet[AnswerExample]:
    """Return the same additions, in the same parts and order, as SFT examples; a response is a space and the sum."""

    def read() -> dict[str, list[AnswerExample]]:
        return {
            part: [AnswerExample(example.prompt, f" {example.answer}") for example in examples]
            for part, examples in prompts.parts.items()
        }

    return ExampleSet(prompts.description, digest_of({"answers": _FORMAT, "of": prompts.fingerprint}), read)


def _check_size(digits: int, num_pairs: int | None) -> None:
    if digits < 1:
        raise ConfigError(f"data.digits={digits} is not allowed: it must be 1 or more.")
    limit = 10**digits
    most = min(limit * (limit + 1) // 2, _MOST_PAIRS)
    if num_pairs is None and digits > _MOST_ENUMERATED_DIGITS:
        raise ConfigError(f"data.digits={digits} gives too many pairs to take all: set data.num_pairs, {most} at most.")
    if num_pairs is not None and not 3 <= num_pairs <= most:
        raise ConfigError(
            f"data.num_pairs={num_pairs} is not allowed with data.digits={digits}: it must be in [3, {most}]."
        )


def _both_orders(a: int, b: int, digits: int) -> Iterator[PromptExample]:
    yield _addition(a, b, digits)
    if a != b:
        yield _addition(b, a, digits)


def _addition(a: int, b: int, digits: int) -> PromptExample:
    return PromptExample(f"Sum: {_spaced(a, digits)} + {_spaced(b, digits)} =", _spaced(a + b, digits + 1))


def _spaced(number: int, width: int) -> str:
    return " ".join(f"{number:0{width}}")


def _pairs(digits: int, num_pairs: int | None) -> list[_Pair]:
    limit = 10**digits
    if digits > _MOST_ENUMERATED_DIGITS:
        return list(islice(_distinct(_drawn(limit)), num_pairs))
    pairs = [(a, b) for a in range(limit) for b in range(a, limit)]
    if num_pairs is None:
        return pairs
    return sorted(pairs, key=lambda pair: name_rank("pair", f"{pair[0]}+{pair[1]}"))[:num_pairs]


def _drawn(limit: int) -> Iterator[_Pair]:
    """Yield pairs of numbers in [0, limit) without end, the same ones at every call."""
    draw = 0
    while True:
        rest, a = divmod(name_rank("draw", str(draw)), limit)
        b = rest % limit
        yield min(a, b), max(a, b)
        draw += 1


def _distinct(pairs: Iterable[_Pair]) -> Iterator[_Pair]:
    seen: set[_Pair] = set()
    for pair in pairs:
        if pair not in seen:
            seen.add(pair)
            yield pair
