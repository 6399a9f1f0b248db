"""GRPO: responses drawn, rewarded and learned from, and what is refused."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kd.errors import DataError, NumericError
from kd.generation import GenerationConfig, TextGenerator
from kd.losses import IGNORE_INDEX
from kd.trainers import GRPOTrainer
from kd.trainers.rollouts import Rollouts
from kd.trainers.state import Batch

from .examples import PROMPTS, LetterTokenizer, draw, grpo, make_prompts, make_rollouts, online, share_of_a
from .helpers import make_student

# --- sampling ---------------------------------------------------------------------------------------------------


def test_the_reward_rises() -> None:
    settings: dict[str, Any] = {"num_epochs": 60, "learning_rate": 3e-3, "group_size": 8, "log_interval": 10}
    history = online(val=[PROMPTS], kl_coef=0.0, **settings).train()
    assert history["reward"][0] < 0.35
    assert history["reward"][-1] > history["reward"][0] + 0.4
    assert history["val_reward"][-1] > 0.8
    assert history["val_loss"][-1] == -history["val_reward"][-1]


def test_a_penalty_keeps_the_policy_near_the_reference() -> None:
    """A weak and a strong one: the stronger holds the policy back."""
    ends: list[float] = []
    for kl_coef in (1e-9, 1.0):
        settings: dict[str, Any] = {"num_epochs": 30, "learning_rate": 3e-3, "group_size": 8, "log_interval": 30}
        ends.append(online(kl_coef=kl_coef, **settings).train()["kl"][-1])
    assert ends[1] < 0.3 * ends[0]


def test_each_prompt_gets_a_group_of_responses_within_the_limits() -> None:
    seen: list[tuple[list[str], Batch]] = []

    def keep(responses: list[str], batch: Batch) -> list[float]:
        seen.append((responses, batch))
        return [float(len(response)) for response in responses]

    labelled = {**PROMPTS, "example_id": torch.arange(10, 14)}
    prepared = online(train=[labelled], reward_fn=keep, end=2)._prepare_batch(labelled)
    responses, batch = seen[0]
    assert batch["example_id"].tolist() == [10] * 4 + [11] * 4 + [12] * 4 + [13] * 4
    assert torch.equal(batch["prompts"], PROMPTS["prompts"].repeat_interleave(4, dim=0))
    lengths = batch["response_attention_mask"].sum(dim=1)
    assert int(lengths.max()) <= 4
    assert len(set(responses)) > 4
    end_is_last = [row[length - 1] == 2 for row, length in zip(batch["responses"], lengths, strict=True)]
    assert 0 < sum(map(bool, end_is_last)) < 16
    assert [len(text) for text in responses] == [
        int(length) - bool(ended) for length, ended in zip(lengths, end_is_last, strict=True)
    ]
    assert "c" not in "".join(responses)
    # The end-of-text token is no part of the text, but a choice of the policy all the same.
    assert int((prepared["labels"] != IGNORE_INDEX).sum()) == int(lengths.sum())


def drawn(trainer: GRPOTrainer) -> Tensor:
    return trainer.rollouts.draw(PROMPTS, trainer.config)["responses"]


def test_responses_differ_from_step_to_step_and_follow_the_global_seed() -> None:
    trainer = online()
    torch.manual_seed(4)
    first, second = drawn(trainer), drawn(trainer)
    torch.manual_seed(4)
    assert torch.equal(first, drawn(trainer))
    assert first.shape != second.shape or not torch.equal(first, second)


def test_ranks_with_the_same_global_seed_draw_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = online()
    torch.manual_seed(4)
    alone = drawn(trainer)
    by_rank = []
    for rank in range(3):
        monkeypatch.setattr("kd.trainers.rollouts.get_rank", lambda rank=rank: rank)
        torch.manual_seed(4)
        by_rank.append(drawn(trainer))
    assert torch.equal(by_rank[0], alone)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert by_rank[one].shape != by_rank[other].shape or not torch.equal(by_rank[one], by_rank[other])


def test_a_cold_policy_draws_what_is_likeliest() -> None:
    trainer = online(sampling_temperature=1e-4)
    greedy = trainer.rollouts.respond(PROMPTS, GenerationConfig("greedy", 4))["responses"]
    assert torch.equal(drawn(trainer), greedy.repeat_interleave(4, dim=0))


def test_sampling_and_evaluating_leave_dropout_on() -> None:
    model = make_student(dropout=0.3)
    trainer = online(model, val=[PROMPTS], num_epochs=3, eval_interval=1)
    modes: list[bool] = []
    trainer.optimizer.register_step_pre_hook(lambda *_: modes.append(model.training))
    trainer._prepare_batch(PROMPTS)
    assert model.training
    trainer.train()
    assert modes == [True] * 3
    assert model.training
    losses = [trainer.training_step(make_rollouts(3, size=4))["loss"] for _ in range(2)]
    assert losses[0] != losses[1]


def test_an_evaluation_is_greedy_and_repeats_itself() -> None:
    texts: list[list[str]] = []

    def keep(responses: list[str], batch: Batch) -> list[float]:
        texts.append(responses)
        return share_of_a(responses, batch)

    trainer = online(make_student(dropout=0.3), val=[PROMPTS], reward_fn=keep)
    state = torch.get_rng_state()
    metrics = [trainer.evaluate() for _ in range(2)]
    assert torch.equal(state, torch.get_rng_state())
    assert metrics[0] == metrics[1]
    assert texts[0] == texts[1]
    reward = sum(share_of_a(texts[0], {})) / 4
    assert metrics[0] == pytest.approx({"val_reward": reward, "val_loss": -reward})
    generator = trainer.rollouts.generator
    assert generator is not None
    for row, text in enumerate(texts[0]):
        prompt = PROMPTS["prompts"][row][PROMPTS["prompt_attention_mask"][row] > 0].unsqueeze(0)
        assert generator.decode(generator.generate_ids(prompt, GenerationConfig("greedy", 4))) == text


# --- bad input --------------------------------------------------------------------------------------------------


def failing(_responses: list[str], _batch: Batch) -> list[float]:
    raise ZeroDivisionError("no luck")


@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize(
    ("reward_fn", "error", "message"),
    [
        (failing, DataError, r"The reward function failed: ZeroDivisionError: no luck\. .*the response '"),
        (lambda responses, _: [1.0] * (len(responses) - 1), DataError, r"gave \d+ rewards for \d+ responses"),
        (lambda _responses, _batch: [], DataError, r"gave 0 rewards for \d+ responses"),
        (lambda _responses, _batch: None, DataError, "The reward function failed: TypeError"),
        (lambda responses, _: ["good"] * len(responses), DataError, "The reward function failed"),
        (lambda responses, _: [0.0, math.nan] * (len(responses) // 2), NumericError, r"response '.*' is nan"),
        (lambda responses, _: [0.0, -math.inf] * (len(responses) // 2), NumericError, r"response '.*' is -inf"),
    ],
)
def test_a_bad_reward_ends_the_run_with_a_sentence(
    reward_fn: Any, error: type[Exception], message: str, evaluates: bool
) -> None:
    trainer = online(reward_fn=reward_fn, val=[PROMPTS])
    with pytest.raises(error, match=message):
        trainer.evaluate() if evaluates else trainer.train()
    assert trainer.model.training
    assert trainer.step == 0


def test_supplied_rewards_must_be_finite() -> None:
    rollouts = make_rollouts(2)
    rollouts["rewards"][3] = math.nan
    with pytest.raises(NumericError, match="nan in row 3"):
        grpo(make_student(), [rollouts]).train()


def test_supplied_responses_must_be_whole_groups() -> None:
    with pytest.raises(DataError, match=r"6 responses, which are no whole groups of train\.group_size=4"):
        grpo(make_student(), group_size=4).training_step(make_rollouts(3))


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="needs a reward_fn"):
        online(reward_fn=None).train()
    trainer = online()
    trainer.rollouts.generator = None
    with pytest.raises(ValueError, match="needs a generator to sample"):
        trainer.train()


def test_the_generator_must_draw_with_the_trained_model() -> None:
    tokenizer: Any = LetterTokenizer()
    with pytest.raises(ValueError, match=r"another model than the trained one.*TextGenerator\(model, tokenizer\)"):
        GRPOTrainer(make_student(), reward_fn=share_of_a, generator=TextGenerator(make_student(), tokenizer))


@pytest.mark.parametrize("training", [True, False])
def test_prompts_that_fill_the_context_are_refused_and_the_model_stays_in_its_mode(training: bool) -> None:
    trainer, prompts = online(), make_prompts(draw([8], 0))
    trainer.model.train(training)
    with pytest.raises(ValueError, match=r"leave no room for a response in model\.max_seq_len=8"):
        trainer.rollouts.draw(prompts, trainer.config)
    assert trainer.model.training == training


def test_a_reward_sees_no_token_that_ends_a_text() -> None:
    model = make_student()
    tokenizer: Any = LetterTokenizer(3)
    generator = TextGenerator(model, tokenizer)
    generator.end_ids = frozenset({3, 4})
    seen: list[str] = []
    rollouts = Rollouts(model, generator, lambda texts, _: seen.extend(texts) or [0.0] * len(texts))
    rollouts.rewards({"responses": torch.tensor([[1, 2, 3], [1, 4, 9]]), "response_attention_mask": torch.ones(2, 3)})
    assert seen == ["bc", "bj"]
