"""What the trainers on pairs of answers share: batches, the answers' log-probabilities, rewards and scores."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kd.losses import IGNORE_INDEX
from kd.trainers.answers import AnswerTrainer, join_answers
from kd.trainers.base import Terms
from kd.trainers.evaluation import ExampleScores
from kd.trainers.state import Batch, C


class PairLogprobs(NamedTuple):
    """Log-probabilities of the answers of pairs, (B, 2): of the chosen and of the rejected one."""

    summed: Tensor
    """Over an answer's tokens, in nats."""
    tokens: Tensor
    """Number of an answer's tokens."""


class PreferenceTrainer(AnswerTrainer[C]):
    """Trains on pairs of answers to a prompt, one of which was chosen.

    Batches hold `prompt_`, `chosen_` and `rejected_` x `input_ids` and `attention_mask` (B, L of each), padded on
    either side; answers come without the prompt, which the trainer puts before them.

    The accuracy is the share of pairs whose chosen answer has the larger reward. A tie counts one half, as a guess
    would: where policy and reference are the same, before training, it is 0.5.
    """

    loss_terms: tuple[str, ...] = ("reward_margin", "reward_accuracy")

    def _prepare_batch(self, batch: Batch) -> Batch:
        moved = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        prompts, mask = moved["prompt_input_ids"], moved["prompt_attention_mask"]
        width = max(moved["chosen_input_ids"].size(1), moved["rejected_input_ids"].size(1))
        answers, answer_mask = (
            torch.cat([_widened(moved[f"{name}_{kind}"], width) for name in ("chosen", "rejected")])
            for kind in ("input_ids", "attention_mask")
        )
        input_ids, labels = join_answers(prompts.repeat(2, 1), mask.repeat(2, 1), answers, answer_mask)
        return {"input_ids": input_ids, "labels": labels}

    def _pair_logprobs(self, scorer: nn.Module, batch: Batch) -> PairLogprobs:
        logprobs = scorer(batch["input_ids"], batch["labels"]).logprobs
        tokens = (batch["labels"] != IGNORE_INDEX).sum(dim=1)
        return PairLogprobs(logprobs.sum(dim=1).view(2, -1).T, tokens.view(2, -1).T)

    def _count_units(self, batch: Batch) -> Tensor:
        return torch.tensor(len(batch["labels"]) // 2, device=self.device)

    def _reward_terms(self, rewards: Tensor) -> Terms:
        """Return the mean margin and accuracy of rewards (B, 2)."""
        margin = (rewards[:, 0] - rewards[:, 1]).detach()
        return {"reward_margin": margin.mean(), "reward_accuracy": _won(margin).mean()}

    def _pair_scores(self, losses: Tensor, rewards: Tensor, beta: float) -> ExampleScores:
        margin = rewards[:, 0] - rewards[:, 1]
        columns = {"loss": losses, "reward_margin": margin, "reward_accuracy": _won(margin)}
        # Loss and margin grow and shrink with beta: two runs compare by what does not.
        columns["log_ratio_margin"] = margin / beta
        return ExampleScores({name: column.double().cpu() for name, column in columns.items()}, ("reward_accuracy",))


def _won(margin: Tensor) -> Tensor:
    """Return 1 where a margin is above 0, 0 where it is below, and one half where it is 0."""
    return (margin.sign() + 1) / 2


def _widened(tensor: Tensor, width: int) -> Tensor:
    """Return (B, width) with zeros on the right."""
    return nn.functional.pad(tensor, (0, width - tensor.size(1)))
