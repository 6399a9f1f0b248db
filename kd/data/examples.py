"""Typed examples for SFT, preference and GRPO training, in parts that no prompt straddles; no torch here."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Generic, TypeVar

from kd.data.corpora import TEST, TRAIN, VALIDATION, split_groups
from kd.data.sources.base import name_rank
from kd.errors import ConfigError, DataError
from kd.files import canonical_json

log = logging.getLogger("kd")

_ENCODING = b"encoding 2"


@dataclass(frozen=True, slots=True)
class AnswerExample:
    """A prompt and the response to learn. Nothing is put between the two: one of them has the space or line break."""

    prompt: str
    response: str

    @property
    def group(self) -> str:
        """What must stay on one side of a split."""
        return self.prompt


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ChatExample:
    """A chat that ends with the assistant's answer.

    That last answer alone is learned, also in a chat of several turns: the earlier ones are its context.
    """

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        if len(self.messages) < 2 or self.messages[-1].role != "assistant":
            roles = ", ".join(message.role for message in self.messages) or "none"
            raise DataError(
                f"A chat needs at least two messages, the last of them the assistant's, which is what is learned; the "
                f"roles here are: {roles}. Cut the chat after an answer of the assistant's, or remove it."
            )

    @property
    def context(self) -> tuple[Message, ...]:
        """All messages before the answer."""
        return self.messages[:-1]

    @property
    def response(self) -> str:
        """The assistant's last answer."""
        return self.messages[-1].content

    @property
    def group(self) -> str:
        """What must stay on one side of a split."""
        return canonical_json([asdict(message) for message in self.context])


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """A prompt with a better and a worse answer, both without the prompt."""

    prompt: str
    chosen: str
    rejected: str

    @property
    def group(self) -> str:
        """What must stay on one side of a split."""
        return self.prompt


@dataclass(frozen=True, slots=True)
class PromptExample:
    """A prompt that the model answers itself, and the reference that a reward function compares with."""

    prompt: str
    answer: str

    @property
    def group(self) -> str:
        """What must stay on one side of a split."""
        return self.prompt


SftExample = AnswerExample | ChatExample
Example = SftExample | PreferenceExample | PromptExample
E = TypeVar("E", bound=Example)
E_co = TypeVar("E_co", bound=Example, covariant=True)


@dataclass(frozen=True)
class ExampleSet(Generic[E_co]):
    """Examples in their parts, in a fixed, shuffled order: the first n of a part are a fair sample of it."""

    description: str
    """What the set is, for messages."""
    fingerprint: str
    """SHA-256 (hex) of all that determines the examples; known before they are read, no path or machine enters."""
    read: Callable[[], Mapping[str, Sequence[E_co]]]
    """Gives the parts: `train`, `validation` and, with a test ratio above 0, `test`."""

    @cached_property
    def parts(self) -> Mapping[str, Sequence[E_co]]:
        """The examples by part; read at the first use."""
        return self.read()

    def part(self, name: str) -> Sequence[E_co]:
        """Return the examples of a part.

        Raises:
            DataError: if there is no such part.
        """
        if name not in self.parts:
            raise DataError(
                f"{self.description} has no part {name!r}, only {', '.join(self.parts)}. A test part needs "
                "data.test_ratio above 0, or data.test_path."
            )
        return self.parts[name]

    def first_id(self, name: str) -> int:
        """Return the id of a part's first example; ids count on over all parts, so that each is unique in the set."""
        self.part(name)
        names = list(self.parts)
        return sum(len(self.parts[earlier]) for earlier in names[: names.index(name)])


def lacks_answer(example: Example) -> bool:
    """Return whether there is nothing to learn: a blank response, or a blank answer to prefer."""
    if isinstance(example, PromptExample):  # a reference, which may be empty
        return False
    answer = example.chosen if isinstance(example, PreferenceExample) else example.response
    return not answer.strip()


def content_of(example: Example) -> str:
    """Return the one text that stands for an example's type and content."""
    return canonical_json([type(example).__name__, asdict(example)])


def in_fixed_order(examples: Sequence[E], purpose: str = "order") -> list[E]:
    """Return examples in an order that depends on nothing but their content and what the order is for."""
    return sorted(examples, key=lambda example: name_rank(purpose, content_of(example)))


def held_out_ratios(val_ratio: float, test_ratio: float) -> dict[str, float]:
    """Return the share of each held-out part; there is no test part at a ratio of 0.

    Raises:
        ConfigError: if the shares are out of range or leave nothing to train on.
    """
    if not (0 < val_ratio < 1 and 0 <= test_ratio < 1 and val_ratio + test_ratio < 1):
        raise ConfigError(
            f"data.val_ratio={val_ratio} and data.test_ratio={test_ratio} are not allowed: the first must be in "
            "(0, 1), the second in [0, 1), and their sum below 1."
        )
    return {VALIDATION: val_ratio} | ({TEST: test_ratio} if test_ratio > 0 else {})


def split_examples(
    description: str,
    examples: Sequence[E],
    val_ratio: float,
    test_ratio: float = 0.0,
    *,
    separate: Mapping[str, Sequence[E]] | None = None,
) -> ExampleSet[E]:
    """Split examples by their prompts' content: examples of equal prompts are in one part, whatever their order.

    Args:
        description: Names the source, for messages.
        examples: In any order.
        val_ratio: Share of the examples for validation, in (0, 1).
        test_ratio: Share of the examples for the test part, in [0, 1).
        separate: Held-out parts that are given; their ratios do not count then.

    Raises:
        ConfigError: if a ratio is out of range.
        DataError: if there are fewer different prompts than parts, or a given part is empty.
    """
    separate = separate or {}
    ratios = {part: ratio for part, ratio in held_out_ratios(val_ratio, test_ratio).items() if part not in separate}
    found = _split(description, examples, lambda example: example.group, ratios)
    for part, given in separate.items():
        if not given:
            raise DataError(f"The {part} part of {description} has no example. Give other files for it.")
        found[part] = in_fixed_order(given)
    parts = {part: found[part] for part in (TRAIN, VALIDATION, TEST) if part in found}
    _warn_of_repeated(description, parts)
    return ExampleSet(description, _fingerprint(parts), lambda: parts)


def split_by_group(
    description: str, examples: Sequence[E], group_of: Callable[[E], str], val_ratio: float, test_ratio: float
) -> dict[str, list[E]]:
    """Return the parts of examples, each in its fixed order, with every group whole in one part.

    Raises:
        ConfigError: if a ratio is out of range.
        DataError: if there are fewer groups than parts.
    """
    return _split(description, examples, group_of, held_out_ratios(val_ratio, test_ratio))


def _split(
    description: str, examples: Sequence[E], group_of: Callable[[E], str], ratios: Mapping[str, float]
) -> dict[str, list[E]]:
    parts: dict[str, list[E]] = {part: [] for part in (TRAIN, *ratios)}
    sizes = Counter(map(group_of, examples))
    if len(sizes) < len(parts):
        without_test = ", or set data.test_ratio=0 to do without a test part" if TEST in ratios else ""
        raise DataError(
            f"{description} has {len(sizes)} different prompt(s), and {len(parts)} parts ({', '.join(parts)}) need at "
            "least one each: examples of one prompt stay together. Give examples with other prompts, or files of their "
            f"own for the parts (data.val_path, data.test_path){without_test}."
        )
    part_of = split_groups(sizes, ratios, description)
    for example in in_fixed_order(examples):
        parts[part_of[group_of(example)]].append(example)
    return parts


def _warn_of_repeated(description: str, parts: Mapping[str, Sequence[Example]]) -> None:
    """Warn if prompts of a held-out part are also trained on, as they can be where it was given."""
    trained = {example.group for example in parts[TRAIN]}
    for part, examples in parts.items():
        repeated = 0 if part == TRAIN else sum(example.group in trained for example in examples)
        if repeated:
            log.warning(
                "%s: %d of %d %s examples have a prompt that is also trained on. Remove repeated prompts",
                description,
                repeated,
                len(examples),
                part,
            )


def _fingerprint(parts: Mapping[str, Sequence[Example]]) -> str:
    digest = hashlib.sha256()
    for part, examples in parts.items():
        digest.update(f"{part}:{len(examples)}:".encode())
        for example in examples:
            digest.update(hashlib.sha256(content_of(example).encode()).digest())
            digest.update(_encoding_mark(example))
    return digest.hexdigest()


def _encoding_mark(example: Example) -> bytes:
    """Return what tells an example from the same one of before its encoding changed; of most it never did.

    A chat is learned with its turn's end, and an example without an answer is left out.
    """
    return _ENCODING if isinstance(example, ChatExample) or lacks_answer(example) else b""
