"""Loaders of examples: order by seed and epoch, returning to a position, every example once in evaluation."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pytest
import torch

from kd.data import (
    AnswerExample,
    EncodedAnswers,
    EncodedPreferences,
    PositionedLoader,
    PreferenceExample,
    PromptExample,
    encode_answers,
    encode_preferences,
    encode_prompts,
    example_eval_loader,
    example_train_loader,
)
from kd.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Loader = PositionedLoader[EncodedAnswers] | PositionedLoader[EncodedPreferences]


@pytest.fixture(scope="module")
def examples(byte_tokenizer: "PreTrainedTokenizerFast") -> EncodedAnswers:
    return encode_answers([AnswerExample("p" * (1 + i % 13), f"r {i}") for i in range(50)], byte_tokenizer, 32)


def _ids(loader: Loader) -> list[list[int]]:
    return [batch["example_id"].tolist() for batch in loader]


def _epoch(examples: EncodedAnswers, seed: int, epoch: int) -> list[list[int]]:
    loader = example_train_loader(examples, 8, seed)
    loader.set_position(epoch)
    return _ids(loader)


def test_the_order_is_a_shuffle_that_depends_on_seed_and_epoch_alone(examples: EncodedAnswers) -> None:
    torch.manual_seed(1)
    first = _epoch(examples, 3, 2)
    torch.manual_seed(2)
    assert _epoch(examples, 3, 2) == first
    assert [len(batch) for batch in first] == [8] * 6
    assert len({example for batch in first for example in batch}) == 48
    orders = [_epoch(examples, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


@pytest.mark.parametrize(("num_workers", "starts"), [(0, range(7)), (2, (0, 3, 6))])
def test_any_position_can_be_returned_to_with_the_same_tensors(
    num_workers: int, starts: Iterable[int], examples: EncodedAnswers
) -> None:
    loader = example_train_loader(examples, 8, 0)
    loader.set_position(1)
    whole = list(loader)
    for start in starts:
        again = example_train_loader(examples, 8, 0, num_workers)
        again.set_position(1, start)
        rest = list(again)
        assert len(rest) == len(whole) - start
        for one, other in zip(rest, whole[start:], strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)
    loader.set_position(1, 4)
    assert _ids(loader) == [batch["example_id"].tolist() for batch in whole[4:]]
    assert _ids(loader) == [batch["example_id"].tolist() for batch in whole]


def test_evaluation_takes_every_example_in_order(examples: EncodedAnswers) -> None:
    loader = example_eval_loader(examples, 8)
    batches = _ids(loader)
    assert len(loader) == len(batches) == 7
    assert [example for batch in batches for example in batch] == list(range(50))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_iterating_leaves_the_global_generator_alone(num_workers: int, examples: EncodedAnswers) -> None:
    before = torch.get_rng_state()
    assert _ids(example_train_loader(examples, 8, 0, num_workers)) == _epoch(examples, 0, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_references_are_at_hand_through_the_loader(byte_tokenizer: "PreTrainedTokenizerFast") -> None:
    prompts = [PromptExample(f"{i} + 1 =", str(i + 1)) for i in range(9)]
    loader = example_train_loader(encode_prompts(prompts, byte_tokenizer, 16), 3, 0)
    for batch in loader:
        ids = batch["example_id"]
        assert loader.dataset.references(ids) == [str(i + 1) for i in ids.tolist()]


def test_less_than_one_batch_and_impossible_positions_are_refused(examples: EncodedAnswers) -> None:
    with pytest.raises(DataError, match=r"50 training examples.*train\.batch_size=51"):
        example_train_loader(examples, 51, 0)
    for epoch, batch in [(-1, 0), (0, -1), (0, 7)]:
        with pytest.raises(ValueError, match="6 batches"):
            example_train_loader(examples, 8, 0).set_position(epoch, batch)


# --- units -------------------------------------------------------------------------------------------------------

GONE = {3, 10, 11, 24}
"""Of the examples below, whose twins are 2, 25 and among themselves."""
TWINS = {number for pair in range(20) for number in (2 * pair, 2 * pair + 1) if pair not in (1, 5, 12)}


@pytest.fixture(scope="module")
def twins(byte_tokenizer: "PreTrainedTokenizerFast") -> EncodedPreferences:
    """40 pairs that lend each other their answers; the prompts of some are too long."""
    prompts = ["p" * (99 if number in GONE else 5) for number in range(40)]
    answers = [f"a {number}" for number in range(40)]
    pairs = [PreferenceExample(prompts[i], answers[i], answers[i ^ 1]) for i in range(40)]
    return encode_preferences(pairs, byte_tokenizer, 32, first_id=100)


def test_twins_are_in_one_batch_and_without_the_other_in_none(twins: EncodedPreferences) -> None:
    assert len(twins) == 36
    loader = example_train_loader(twins, 4, 0, unit=2)
    batches = _ids(loader)
    assert len(loader) == len(batches) == 34 // 4
    for batch in batches:
        assert {number - 100 for number in batch} <= TWINS
        assert {number ^ 1 for number in batch} == set(batch)
    whole = example_train_loader(twins, 34, 0, unit=2)
    assert {number - 100 for number in _ids(whole)[0]} == TWINS
    assert [number for batch in batches for number in batch] == _ids(whole)[0][:32]


@pytest.mark.parametrize("batch_size", [1, 7])
def test_where_twins_do_not_fit_a_batch_the_next_begins_with_the_other(
    batch_size: int, twins: EncodedPreferences
) -> None:
    flat = [number for batch in _ids(example_train_loader(twins, batch_size, 0, unit=2)) for number in batch]
    assert [number ^ 1 for number in flat[: len(flat) // 2 * 2 : 2]] == flat[1::2]


@pytest.mark.parametrize("batch_size", [4, 5])
def test_any_position_among_twins_can_be_returned_to(batch_size: int, twins: EncodedPreferences) -> None:
    loader = example_train_loader(twins, batch_size, 3, unit=2)
    loader.set_position(2)
    whole = _ids(loader)
    assert whole != _ids(example_train_loader(twins, batch_size, 3, unit=2))
    for start in range(len(loader) + 1):
        again = example_train_loader(twins, batch_size, 3, unit=2)
        again.set_position(2, start)
        assert _ids(again) == whole[start:]


def test_less_than_one_batch_of_whole_units_is_refused(twins: EncodedPreferences) -> None:
    assert len(example_train_loader(twins, 36, 0)) == 1
    with pytest.raises(DataError, match=r"34 training examples \(36 of 40 .*; 2 of these are not trained on"):
        example_train_loader(twins, 36, 0, unit=2)


# --- similar lengths in one batch ----------------------------------------------------------------------------------


def test_batches_of_similar_lengths_hold_the_same_examples_with_less_padding(examples: EncodedAnswers) -> None:
    def padded(by_length: bool) -> int:
        loader = example_train_loader(examples, 8, 3, by_length=by_length)
        batches = list(loader)
        assert len(batches) == len(loader) == 6
        ids = [number for batch in batches for number in batch["example_id"].tolist()]
        assert len(set(ids)) == 48
        return sum(batch["attention_mask"].numel() for batch in batches)

    assert padded(by_length=True) < padded(by_length=False)


def test_the_order_by_length_depends_on_seed_and_epoch_and_can_be_returned_to(examples: EncodedAnswers) -> None:
    def epoch(seed: int, number: int, start: int = 0) -> list[list[int]]:
        loader = example_train_loader(examples, 8, seed, by_length=True)
        loader.set_position(number, start)
        return _ids(loader)

    orders = [epoch(seed, number) for seed in range(2) for number in range(2)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    lengths = [[examples.lengths[number] for number in batch] for batch in epoch(0, 0)]
    assert [max(batch) for batch in lengths] != sorted(max(batch) for batch in lengths)
    assert all(epoch(1, 2, start) == epoch(1, 2)[start:] for start in range(7))


def test_twins_stay_together_among_similar_lengths(twins: EncodedPreferences) -> None:
    batches = _ids(example_train_loader(twins, 4, 0, unit=2, by_length=True))
    assert all({number ^ 1 for number in batch} == set(batch) for batch in batches)
    odd = example_train_loader(twins, 5, 0, unit=2, by_length=True)
    assert _ids(odd) == _ids(example_train_loader(twins, 5, 0, unit=2))
