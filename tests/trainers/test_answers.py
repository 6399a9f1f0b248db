"""Prompts and answers joined, against a loop in plain Python; log-probabilities with and without full logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kd.losses import IGNORE_INDEX
from kd.model import StudentModel
from kd.trainers.answers import AnswerScorer, frozen_reference, join_answers, pad_on_the_right

from .examples import padded
from .helpers import make_student

TOKENS = st.lists(st.integers(1, 9), max_size=4)
EXAMPLES = st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=4)
SIDE = st.sampled_from(["left", "right"])


def targets_of(prompt: list[int], answer: list[int]) -> dict[int, int]:
    """Return, position by position, which tokens of an answer are the next ones."""
    whole = prompt + answer
    return {i: whole[i + 1] for i in range(len(whole) - 1) if i + 1 >= len(prompt)}


@given(examples=EXAMPLES, prompt_side=SIDE, answer_side=SIDE, fill=st.integers(0, 9))
@settings(deadline=None)
def test_joined_answers_are_those_of_a_loop(
    examples: list[tuple[list[int], list[int]]], prompt_side: str, answer_side: str, fill: int
) -> None:
    prompts, answers = ([example[part] for example in examples] for part in (0, 1))
    parts = (*padded(prompts, prompt_side, fill), *padded(answers, answer_side, fill))
    input_ids, labels = join_answers(*parts)
    assert input_ids.shape == labels.shape
    longest = max(len(prompt + answer) for prompt, answer in examples)
    assert input_ids.size(1) == max(0, min(max(longest, 2), parts[0].size(1) + parts[2].size(1)) - 1)
    for row, (prompt, answer) in enumerate(examples):
        inputs = (prompt + answer)[:-1]
        assert input_ids[row, : len(inputs)].tolist() == inputs
        found = {i: label for i, label in enumerate(labels[row].tolist()) if label != IGNORE_INDEX}
        assert found == targets_of(prompt, answer)


@given(rows=st.lists(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), min_size=3, max_size=3), min_size=1))
@settings(deadline=None)
def test_padding_anywhere_goes_to_the_right(rows: list[list[tuple[bool, int]]]) -> None:
    mask, values = (torch.tensor([[int(entry[part]) for entry in row] for row in rows]) for part in (0, 1))
    found, same = pad_on_the_right(mask, values, values)
    assert torch.equal(found, same)
    for row, entries in enumerate(rows):
        real = [value for is_real, value in entries if is_real]
        assert found[row, : len(real)].tolist() == real
        assert sorted(found[row].tolist()) == sorted(values[row].tolist())


def test_a_boolean_mask_is_as_good() -> None:
    prompts, prompt_mask = padded([[1, 2], [3]], "left")
    answers, answer_mask = padded([[4], [5, 6]])
    expected = join_answers(prompts, prompt_mask, answers, answer_mask)
    found = join_answers(prompts, prompt_mask.bool(), answers, answer_mask.bool())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_batch_of_next_to_nothing_still_has_a_column_for_the_model() -> None:
    input_ids, labels = join_answers(*padded([[7], [8]]), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3))
    assert input_ids.shape == (2, 1)
    assert (labels == IGNORE_INDEX).all()
    assert make_student()(input_ids).shape[:2] == (2, 1)


# --- log-probabilities ------------------------------------------------------------------------------------------


class OnlyLogits(nn.Module):
    """A model that does not say which module is its head."""

    def __init__(self, model: StudentModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model(input_ids)}


def joined() -> tuple[Tensor, Tensor]:
    return join_answers(*padded([[1, 2, 3], [4]], "left"), *padded([[5, 6], [7, 8, 9, 10]]))


@pytest.mark.parametrize("with_entropy", [False, True])
def test_the_scores_are_the_same_with_and_without_logits(with_entropy: bool) -> None:
    linear, plain = AnswerScorer(make_student()), AnswerScorer(OnlyLogits(make_student()))
    assert linear.reason_for_logits == ""
    assert "OnlyLogits" in plain.reason_for_logits
    found, expected = (scorer(*joined(), with_entropy=with_entropy) for scorer in (linear, plain))
    torch.testing.assert_close(found.logprobs, expected.logprobs)
    assert (found.entropy is not None) == (expected.entropy is not None) == with_entropy
    if with_entropy:
        torch.testing.assert_close(found.entropy, expected.entropy)


def test_an_answers_log_probability_is_that_of_its_tokens_in_turn() -> None:
    model = make_student()
    summed = AnswerScorer(model)(*joined()).logprobs.detach().sum(dim=1)
    for row, (prompt, answer) in enumerate([([1, 2, 3], [5, 6]), ([4], [7, 8, 9, 10])]):
        total, context = 0.0, list(prompt)
        for token in answer:
            logits = model(torch.tensor([context]))[0, -1].detach().double()
            total += float(logits.log_softmax(-1)[token])
            context.append(token)
        assert float(summed[row]) == pytest.approx(total, rel=1e-5)


# --- references -------------------------------------------------------------------------------------------------


def test_a_reference_is_a_frozen_copy() -> None:
    model = make_student(dropout=0.5).train()
    reference = frozen_reference(model, None)
    assert not reference.training
    assert model.training
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not {p.data_ptr() for p in reference.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_the_model_cannot_be_its_own_reference() -> None:
    model = make_student()
    with pytest.raises(ValueError, match="ref_model is the trained model itself"):
        frozen_reference(model, model)
    assert all(parameter.requires_grad for parameter in model.parameters())
