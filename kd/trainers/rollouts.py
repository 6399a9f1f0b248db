"""Rollouts: responses that the policy draws, and the rewards they get."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kd.config import GRPOConfig
from kd.distributed import get_rank
from kd.errors import DataError, Interrupted, NumericError
from kd.generation import GenerationConfig, TextGenerator
from kd.trainers.groups import mask_of
from kd.trainers.state import Batch

RewardFunction = Callable[[list[str], Batch], Sequence[float]]
"""Takes the texts of responses, and a batch with a row for each (`prompts`, `example_id`, ...); larger is better."""


class Rollouts:
    """Draws responses and rewards them.

    Batches hold `prompts` and `prompt_attention_mask` (B, L), padded on the left; `config.group_size` responses are
    drawn to each. Or rollouts are supplied: batches then hold, a row a response and those of one prompt next to each
    other, also `responses`, `response_attention_mask` and, unless there is a reward function, `rewards` (B,); and
    optionally `old_logprobs` (B, R), of the policy that drew the responses. Masks may be left out where nothing is
    padded.

    Args:
        model: The policy.
        generator: Draws responses with the policy and decodes them; None if batches hold `responses` and `rewards`.
        reward_fn: Rewards responses; None if batches hold `rewards`.

    Raises:
        ValueError: if the generator draws with another model.
    """

    def __init__(self, model: nn.Module, generator: TextGenerator | None, reward_fn: RewardFunction | None) -> None:
        if generator is not None and generator.model is not model:
            raise ValueError(
                "The generator draws with another model than the trained one: make it with "
                "TextGenerator(model, tokenizer) of the model that the trainer is given."
            )
        self.model, self.generator, self.reward_fn = model, generator, reward_fn

    def complete(self, batch: Batch, config: GRPOConfig) -> Batch:
        """Return a batch that holds rewarded responses: those it has, or a group of new ones to each prompt."""
        rollout = batch if "responses" in batch else self.draw(batch, config)
        return rollout if "rewards" in rollout else {**rollout, "rewards": self.rewards(rollout)}

    def draw(self, batch: Batch, config: GRPOConfig) -> Batch:
        """Return the batch with `config.group_size` rows for each prompt, each with a response of its own."""
        # From the global random numbers, which a checkpoint keeps; ranks that share these still draw differently.
        seed = int(torch.randint(2**31, ())) + get_rank()
        repeated = {name: value.repeat_interleave(config.group_size, dim=0) for name, value in batch.items()}
        sampling = GenerationConfig("sample", config.max_new_tokens, config.sampling_temperature, seed=seed)
        return {**repeated, **self._responses(batch, sampling, config.group_size)}

    def respond(self, batch: Batch, config: GenerationConfig) -> Batch:
        """Return the batch with a response to each prompt."""
        return {**batch, **self._responses(batch, config, 1)}

    def _responses(self, batch: Batch, config: GenerationConfig, num_responses: int) -> Batch:
        """Return responses to each prompt, and their mask; the model stays in its mode."""
        if self.generator is None:
            raise ValueError("GRPOTrainer needs a generator to sample responses, or batches that hold `responses`.")
        with in_eval_mode(self.model):
            rollout = self.generator.rollout(batch["prompts"], mask_of(batch, "prompts"), config, num_responses)
        return {"responses": rollout.responses.cpu(), "response_attention_mask": rollout.mask.cpu().long()}

    def rewards(self, rollout: Batch) -> Tensor:
        """Return the reward of each response, (B,) float32.

        Raises:
            DataError: if the reward function raises, or gives something else than a number for each response.
            NumericError: if a reward is not finite.
        """
        if self.reward_fn is None or self.generator is None:
            raise ValueError(
                "GRPOTrainer needs a reward_fn and a generator (to decode), or batches that hold `rewards`."
            )
        texts = _texts(rollout, self.generator)
        try:
            rewards = torch.tensor(list(self.reward_fn(texts, rollout)), dtype=torch.float32)
        except Interrupted:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}. The batch begins with the response {texts[0][:80]!r}"
            raise DataError(f"The reward function failed: {reason}.") from error
        _check_rewards(rewards, texts)
        return rewards


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off; afterwards, also after an error, the model is in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _texts(rollout: Batch, generator: TextGenerator) -> list[str]:
    """Return the texts of responses, without padding and the tokens that end a text."""
    ends = generator.end_ids
    rows = zip(rollout["responses"].tolist(), mask_of(rollout, "responses").tolist(), strict=True)
    return [
        generator.decode([token for token, real in zip(*row, strict=True) if real and token not in ends])
        for row in rows
    ]


def _check_rewards(rewards: Tensor, texts: list[str]) -> None:
    if rewards.shape != (len(texts),):
        raise DataError(f"The reward function gave {len(rewards)} rewards for {len(texts)} responses.")
    wrong = (~torch.isfinite(rewards)).nonzero().flatten().tolist()
    if wrong:
        text, reward = texts[wrong[0]], float(rewards[wrong[0]])
        raise NumericError(f"The reward of the response {text[:80]!r} is {reward}: it must be a finite number.")
