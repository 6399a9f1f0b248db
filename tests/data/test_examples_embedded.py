"""Embedded examples: real, disjoint between the parts, and without cues that are not the prompt."""

import subprocess
import sys
from collections import Counter

import pytest

from kd.config import StdlibDataConfig
from kd.data import (
    AnswerExample,
    Corpus,
    ExampleSet,
    arithmetic_answers,
    arithmetic_prompts,
    instruction_examples,
    mix_answers,
    preference_examples,
    read_corpus,
    split_examples,
)
from kd.data.embedded.preferences import TWINS
from kd.errors import ConfigError, DataError

from .conftest import MakeCorpus

SOURCE = '''import os
\x0c
class A:
    @property
    def size(self, unit="\u00e9"):  # of all
        """Return the size.

        In bytes.
        """
        # counted once

        def inner():
            "Says hello  to\\n            nobody."
            return 1
        return inner()

    def one_line(self): "Shares its line with code."

    def word(self):
        """Internal."""
        return None

    def signature_only(self, x):
        """Do something with x."""

    async def shared(self):
        """Shares a line, \u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9."""; return 2

    def undocumented(self):
        return 3
'''


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return read_corpus(StdlibDataConfig(test_ratio=0.1, sample_size=2_500_000))


@pytest.fixture(scope="module")
def instructions(corpus: Corpus) -> ExampleSet[AnswerExample]:
    return instruction_examples(corpus)


# --- instructions ------------------------------------------------------------------------------------------------


def test_a_function_and_its_docstring_become_a_pair(make_corpus: MakeCorpus) -> None:
    other = 'def f():\n    """Other text."""\n'
    corpus = make_corpus({"train": [SOURCE, "not Python at all (", "x = '\\d'"], "validation": [other]})
    pairs = {example.response: example.prompt for example in instruction_examples(corpus, 1000).parts["train"]}
    assert pairs == {
        " Return the size.": (
            'def size(self, unit="\u00e9"):  # of all\n'
            "    # counted once\n"
            "    def inner():\n"
            '        "Says hello  to\\n            nobody."\n'
            "        return 1\n"
            "    return inner()\n"
            "# What it does:"
        ),
        " Says hello to nobody.": "def inner():\n    return 1\n# What it does:",
        " Do something with x.": "def signature_only(self, x):\n# What it does:",
    }


@pytest.mark.parametrize("max_chars", [70, 80, 90, 100, 120, 140])
def test_a_long_function_is_cut_at_a_line(max_chars: int, make_corpus: MakeCorpus) -> None:
    lines = [f"    x{i} = {i}" for i in range(10)]
    source = "\n".join(["def f(", "    a,", "):", '    """Set many things."""', *lines, ""])
    corpus = make_corpus({"train": [source], "validation": [source.replace("many", "other").replace("x", "y")]})
    (example,) = instruction_examples(corpus, max_chars).parts["train"]
    header, kept = example.prompt.split("\n")[:3], example.prompt.split("\n")[3:-2]
    assert header == ["def f(", "    a,", "):"]
    assert kept == lines[: len(kept)]
    assert example.prompt.split("\n")[-2:] == ["    ...", "# What it does:"]
    size = len(example.prompt) + len(example.response)
    assert max_chars - len(lines[0]) - 1 < size <= max_chars


def test_what_just_fits_is_not_cut(make_corpus: MakeCorpus) -> None:
    source = 'def f():\n    """Set many things."""\n    x = 1\n    y = 2\n'
    whole = "def f():\n    x = 1\n    y = 2\n# What it does: Set many things."
    corpus = make_corpus({"train": [source], "validation": [source.replace("f()", "g()")]})
    for room, expected in [(len(whole), whole), (len(whole) - 1, whole.replace("    y = 2", "    ..."))]:
        (example,) = instruction_examples(corpus, room).parts["train"]
        assert example.prompt + example.response == expected


def test_a_part_without_documented_functions_is_refused(make_corpus: MakeCorpus) -> None:
    examples = instruction_examples(make_corpus({"train": [SOURCE], "validation": ["x = 1\n"]}))
    assert len(examples.fingerprint) == 64
    with pytest.raises(DataError, match=r"validation part of a made corpus has no Python function.*data\.max_chars"):
        examples.part("train")


def test_a_prompt_of_several_parts_is_kept_held_out(make_corpus: MakeCorpus) -> None:
    def source(*names: str) -> str:
        return "".join(f'def {name}():\n    """Do {name} now."""\n    pass\n' for name in names)

    parts = {"train": [source("a", "b", "c"), source("a")], "validation": [source("b", "d")], "test": [source("d")]}
    found = {
        part: [example.response.split()[1] for example in examples]
        for part, examples in instruction_examples(make_corpus(parts)).parts.items()
    }
    assert {part: sorted(names) for part, names in found.items()} == {
        "train": ["a", "c"],
        "validation": ["b"],
        "test": ["d"],
    }


def test_the_standard_library_gives_short_disjoint_parts(
    corpus: Corpus, instructions: ExampleSet[AnswerExample]
) -> None:
    parts = instructions.parts
    assert list(parts) == ["train", "validation", "test"]
    assert all(len(part) >= 50 for part in parts.values())
    assert len(parts["train"]) > 600
    prompts = [example.prompt for part in parts.values() for example in part]
    assert len(set(prompts)) == len(prompts)
    everything = [example for part in parts.values() for example in part]
    assert all(len(example.prompt) + len(example.response) <= 340 for example in everything)
    assert all(example.response == f" {' '.join(example.response.split())}" for example in everything)
    for part in ("train", "validation"):  # taken from that part's files, and nowhere else
        texts = "\n".join(corpus.texts(part))
        headers = [example.prompt.split("\n")[0] for example in parts[part]]
        assert all(header in texts for header in headers)


def test_the_fingerprint_needs_no_reading_and_sees_what_matters(corpus: Corpus, make_corpus: MakeCorpus) -> None:
    unreadable = make_corpus({"train": ["x"], "validation": ["y"]})
    fingerprints = {
        instruction_examples(corpus).fingerprint,
        instruction_examples(corpus, 200).fingerprint,
        instruction_examples(unreadable).fingerprint,
        preference_examples(instruction_examples(unreadable)).fingerprint,
        preference_examples(instruction_examples(corpus)).fingerprint,
    }
    assert len(fingerprints) == 5
    assert instruction_examples(corpus).fingerprint in fingerprints


def test_fingerprints_do_not_wait_for_torch() -> None:
    program = (
        "import sys; from kd.config import StdlibDataConfig\n"
        "from kd.data import arithmetic_prompts, instruction_examples, read_corpus\n"
        "instruction_examples(read_corpus(StdlibDataConfig(sample_size=100_000))).fingerprint\n"
        "arithmetic_prompts(1).parts\n"
        "print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert answer.stdout == "[]\n"


# --- preferences -------------------------------------------------------------------------------------------------


def test_every_text_is_chosen_once_and_rejected_once(instructions: ExampleSet[AnswerExample]) -> None:
    preferences = preference_examples(instructions)
    for part, pairs in preferences.parts.items():
        right = {example.prompt: example.response for example in instructions.parts[part]}
        assert len(pairs) > 0.8 * len(right)
        assert all(right[pair.prompt] == pair.chosen != pair.rejected for pair in pairs)
        assert set(Counter(pair.chosen for pair in pairs).values()) == {1}
        assert {pair.chosen for pair in pairs} == {pair.rejected for pair in pairs}
        differences = [abs(len(pair.chosen) - len(pair.rejected)) for pair in pairs]
        assert sum(difference <= 5 for difference in differences) > 0.8 * len(pairs)


def test_twins_lie_next_to_each_other_in_a_shuffled_order(instructions: ExampleSet[AnswerExample]) -> None:
    preferences = preference_examples(instructions)
    assert preference_examples(instructions).parts == preferences.parts
    for part, pairs in preferences.parts.items():
        assert preferences.first_id(part) % TWINS == 0
        for one, other in zip(pairs[::TWINS], pairs[1::TWINS], strict=True):
            assert (one.chosen, one.rejected) == (other.rejected, other.chosen)
    answers = [(one.chosen, one.rejected) for one in preferences.parts["train"][::TWINS]]
    half = len(answers) // 2
    first, second = (sum(len(chosen) for chosen, _ in part) for part in (answers[:half], answers[-half:]))
    assert first == pytest.approx(second, rel=0.3)
    # Twins were found by length, and equal lengths in the order of the alphabet: it shows in neither.
    assert 0.35 < sum((len(one), one) < (len(other), other) for one, other in answers) / len(answers) < 0.65


def test_equal_responses_make_no_pair() -> None:
    examples = [AnswerExample(str(i), "the same") for i in range(20)]
    with pytest.raises(DataError, match="1 different response"):
        preference_examples(split_examples("made", examples, 0.2)).part("train")


# --- arithmetic --------------------------------------------------------------------------------------------------


def _unspaced(text: str) -> list[str]:
    """Return the numbers of an addition, whose digits stand apart."""
    return [number.replace(" ", "") for number in text.removeprefix("Sum: ").removesuffix(" =").split(" + ")]


@pytest.mark.parametrize(
    ("digits", "num_pairs", "pairs"), [(1, None, 55), (2, None, 5050), (2, 300, 300), (3, 300, 300), (9, 300, 300)]
)
def test_additions_are_right_and_no_pair_is_in_two_parts(digits: int, num_pairs: int | None, pairs: int) -> None:
    parts = arithmetic_prompts(digits, num_pairs, 0.1, 0.1).parts
    found: dict[str, set[frozenset[int]]] = {}
    for part, examples in parts.items():
        operands = [[int(number) for number in _unspaced(example.prompt)] for example in examples]
        sums = [int(example.answer.replace(" ", "")) for example in examples]
        assert sums == [a + b for a, b in operands]
        shapes = {(len(example.prompt), len(example.answer)) for example in examples}
        assert shapes == {(4 * digits + 8, 2 * digits + 1)}
        assert all(max(a, b) < 10**digits for a, b in operands)
        assert len(set(map(tuple, operands))) == len(operands)
        assert {(b, a) for a, b in operands} == {(a, b) for a, b in operands}
        found[part] = {frozenset(pair) for pair in operands}
    assert sum(map(len, found.values())) == len(set().union(*found.values())) == pairs
    shares = [len(examples) / sum(map(len, parts.values())) for examples in parts.values()]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.03)


def test_additions_are_the_same_at_every_call() -> None:
    one, other = arithmetic_prompts(3, 50), arithmetic_prompts(3, 50)
    assert one.parts == other.parts
    assert one.fingerprint == other.fingerprint
    assert arithmetic_prompts(3, 51).fingerprint != one.fingerprint


@pytest.mark.parametrize(
    ("digits", "num_pairs", "message"),
    [(0, None, "digits=0"), (3, None, r"set data\.num_pairs"), (1, 56, r"\[3, 55\]"), (2, 2, "num_pairs=2")],
)
def test_impossible_sizes_are_refused_at_once(digits: int, num_pairs: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        arithmetic_prompts(digits, num_pairs)


def test_additions_for_sft_are_the_same_in_the_same_parts() -> None:
    prompts = arithmetic_prompts(1)
    answers = arithmetic_answers(prompts)
    for part, examples in prompts.parts.items():
        pairs = [(example.prompt, example.response) for example in answers.parts[part]]
        assert pairs == [(example.prompt, f" {example.answer}") for example in examples]


# --- mixture -----------------------------------------------------------------------------------------------------


def _set(name: str, count: int) -> ExampleSet[AnswerExample]:
    return split_examples(name, [AnswerExample(f"{name} {i}", "x") for i in range(count)], 0.2)


@pytest.mark.parametrize(
    ("share", "train", "validation"),
    [
        (0.0, (400, 0), (100, 0)),
        (0.1, (400, 44), (100, 11)),
        (0.2, (400, 100), (100, 20)),  # of the 20 for validation none is there twice
        (0.5, (400, 400), (100, 20)),
        (1.0, (0, 80), (0, 20)),
    ],
)
def test_a_mixture_has_all_of_the_first_and_a_share_of_the_second(
    share: float, train: tuple[int, int], validation: tuple[int, int]
) -> None:
    first, second = _set("a", 500), _set("b", 100)
    mixture = mix_answers(first, second, share)
    for part, counts in [("train", train), ("validation", validation)]:
        counted = Counter(mixture.parts[part])
        assert counted.keys() <= {*first.parts[part], *second.parts[part]}
        of_second = [count for example, count in counted.items() if example.prompt[0] == "b"]
        assert (counted.total() - sum(of_second), sum(of_second)) == counts
        assert not of_second or max(of_second) - min(of_second) <= 1
    beginning = Counter(example.prompt[0] for example in mixture.parts["train"][:80])
    if share == 0.5:  # well mixed: the beginning is no one's alone
        assert min(beginning.values()) > 20
        assert len(set(mixture.parts["train"][:80])) > 60


def test_a_mixtures_fingerprint_sees_its_share() -> None:
    first, second = _set("a", 50), _set("b", 50)
    assert mix_answers(first, second, 0.5).fingerprint != mix_answers(first, second, 0.25).fingerprint
    assert mix_answers(first, second, 1).fingerprint == mix_answers(first, second, 1.0).fingerprint


def test_mixtures_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.arithmetic_share=1\.1"):
        mix_answers(_set("a", 50), _set("b", 50), 1.1)
    three = split_examples("c", [AnswerExample(str(i), "x") for i in range(50)], 0.2, 0.2)
    with pytest.raises(DataError, match=r"has the parts train, validation, but c has .*data\.test_ratio"):
        mix_answers(_set("a", 50), three, 0.5).part("train")
