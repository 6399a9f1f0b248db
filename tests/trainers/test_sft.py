"""Supervised fine-tuning: the loss of the answers, whatever stands beside and around them."""

import math
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from kd.losses import IGNORE_INDEX
from kd.model import StudentModel
from kd.trainers.state import Batch
from tests.llama import llama_name, make_llama

from .examples import answers_batch, draw, make_answers, padded, sft
from .helpers import make_student, same_tensors, weights

PROMPTS, ANSWERS = draw([2, 1, 3, 1], 1), draw([3, 4, 1, 0], 2)


def loop_loss(model: StudentModel) -> float:
    """The mean over the answers' tokens, each predicted from what stands before it alone."""
    losses = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        for count, token in enumerate(answer):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer[:count]]))[0, -1].double()
            losses.append(float(-logits.log_softmax(-1)[token]))
    return sum(losses) / len(losses)


def value_and_gradients(batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    trainer = sft(make_student())
    loss = trainer.training_step(batch)["loss"]
    return loss, {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def test_the_loss_is_that_of_a_loop_over_answer_tokens() -> None:
    terms = sft(make_student()).training_step(answers_batch(PROMPTS, ANSWERS))
    assert terms["loss"] == terms["ce_loss"] == pytest.approx(loop_loss(make_student()), rel=1e-5)


def test_the_evaluation_is_that_loss_too() -> None:
    metrics = sft(make_student(), val=[answers_batch(PROMPTS, ANSWERS, "left")]).evaluate()
    assert metrics["val_loss"] == pytest.approx(loop_loss(make_student()), rel=1e-5)
    assert metrics["val_ppl"] == pytest.approx(math.exp(loop_loss(make_student())), rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fill", [0, 12])
def test_where_and_with_what_a_batch_is_padded_does_not_matter(side: str, fill: int) -> None:
    loss, gradients = value_and_gradients(answers_batch(PROMPTS, ANSWERS))
    found, found_gradients = value_and_gradients(answers_batch(PROMPTS, ANSWERS, side, fill))
    assert found == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(found_gradients, gradients, rtol=1e-5, atol=1e-6)


def test_padding_on_the_right_needs_no_mask() -> None:
    batch = answers_batch(PROMPTS, ANSWERS)
    masked, _ = value_and_gradients(batch)
    del batch["attention_mask"]
    assert value_and_gradients(batch)[0] == masked


@pytest.mark.parametrize("side", ["left", "right"])
def test_nothing_is_learned_from_what_padding_predicts(side: str) -> None:
    """An answer without a prompt: what stands before its first token is padding, or nothing."""
    prompts, answers = [[], [5, 6]], [[1, 2, 3], [4, 7]]
    batch = answers_batch(prompts, answers, side)
    trainer = sft(make_student())
    prepared = trainer._prepare_batch(batch)
    assert [sorted(row[row != IGNORE_INDEX].tolist()) for row in prepared["labels"]] == [[2, 3], [4, 7]]
    losses = {value_and_gradients(answers_batch(prompts, answers, side, fill))[0] for fill in (0, 12)}
    assert len(losses) == 1


def test_a_batch_without_answers_gives_zero_and_changes_nothing() -> None:
    batch = answers_batch(PROMPTS, [[], [], [], []])
    trainer = sft(make_student(), [batch], num_epochs=1, weight_decay=0.0)
    before = weights(trainer.model)
    assert trainer.training_step(batch) == {"loss": 0.0, "ce_loss": 0.0}
    assert all(p.grad is not None and not p.grad.any() for p in trainer.model.parameters())
    trainer.train()
    assert same_tensors(before, weights(trainer.model))


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_gradients_are_those_of_transformers(side: str) -> None:
    """Its labels are not shifted yet, and it is given the mask."""
    ours = sft(make_student())
    loss = ours.training_step(answers_batch(PROMPTS, ANSWERS, side))["loss"]
    llama: LlamaForCausalLM = make_llama(make_student())
    tokens, mask = padded([[*prompt, *answer] for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)], side)
    labels, _ = padded([[-100] * len(p) + a for p, a in zip(PROMPTS, ANSWERS, strict=True)], side, fill=-100)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    output = llama(input_ids=tokens, attention_mask=mask, position_ids=positions, labels=labels)
    assert loss == pytest.approx(float(output.loss.detach()), rel=1e-5)
    output.loss.backward()
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, llama.get_parameter(llama_name(name)).grad, rtol=1e-4, atol=1e-6, msg=name
        )


def test_a_transformers_model_is_trained_as_it_is() -> None:
    batch = answers_batch(PROMPTS, ANSWERS, "left")
    llama = make_llama(make_student())
    assert sft(llama).training_step(batch)["loss"] == pytest.approx(value_and_gradients(batch)[0], rel=1e-5)


def test_answers_are_learned() -> None:
    batches = [make_answers(6, seed) for seed in range(2)]
    history: Any = sft(make_student(), batches, batches, num_epochs=40, log_interval=10).train()
    losses = history["train_loss"]
    assert losses[-1] < 0.2 * losses[0]
    assert history["val_loss"][-1] < 0.2 * losses[0]
