"""Loaders of examples: order by seed and epoch, returning to a position, every example once in evaluation."""

from typing import TYPE_CHECKING

import pytest
import torch

from kd.data import (
    AnswerExample,
    EncodedAnswers,
    PositionedLoader,
    PromptExample,
    encode_answers,
    encode_prompts,
    example_eval_loader,
    example_train_loader,
)
from kd.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Loader = PositionedLoader[EncodedAnswers]


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


def test_any_position_can_be_returned_to_with_the_same_tensors(examples: EncodedAnswers) -> None:
    loader = example_train_loader(examples, 8, 0)
    loader.set_position(1)
    whole = list(loader)
    for start in range(len(loader) + 1):
        again = example_train_loader(examples, 8, 0)
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


@pytest.mark.parametrize("num_workers", [0, 1])
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
