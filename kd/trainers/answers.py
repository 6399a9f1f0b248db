"""Prompts and answers as one sequence, the log-probabilities of the answers, and what trains on these."""

import copy
from abc import ABC
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kd.adapters import as_before_adapters
from kd.checkpoint import holds_adapters
from kd.heads import NoLinearHeadError, SplitModel, logits_of
from kd.losses import IGNORE_INDEX
from kd.token_logprobs import TokenLogprobs, linear_token_logprobs, token_logprobs
from kd.trainers.base import BaseTrainer
from kd.trainers.state import C


class Sequences(NamedTuple):
    """Whole sequences without padding between their parts, padded on the right; (B, L) int64 each.

    A causal model needs no attention mask for these: no token sees what comes after it.
    """

    input_ids: Tensor
    labels: Tensor
    """Next-token targets; -100 where the target is not a token of the answer."""


def pad_on_the_right(mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors (B, L) with each row's real tokens first, in their order.

    Args:
        mask: (B, L), non-zero at real tokens.
        tensors: (B, L) each.
    """
    order = (mask == 0).to(torch.int8).argsort(dim=1, stable=True)
    return tuple(tensor.gather(1, order) for tensor in tensors)


def join_answers(prompts: Tensor, prompt_mask: Tensor, answers: Tensor, answer_mask: Tensor) -> Sequences:
    """Join each prompt with its answer.

    Args:
        prompts: (B, P) token ids, padded anywhere.
        prompt_mask: (B, P), non-zero at real tokens. A row without any gives its answer's first token no prediction.
        answers: (B, A) token ids, padded anywhere.
        answer_mask: (B, A), non-zero at real tokens.
    """
    tokens, mask = torch.cat([prompts, answers], dim=1), torch.cat([prompt_mask, answer_mask], dim=1)
    is_answer = torch.cat([torch.zeros_like(prompt_mask), answer_mask], dim=1)
    tokens, is_answer, mask = pad_on_the_right(mask, tokens, is_answer, mask)
    # At least one input: a model cannot read a batch without columns.
    longest = max(2, int(mask.count_nonzero(dim=1).max()))
    tokens, is_answer = tokens[:, :longest], is_answer[:, :longest]
    return Sequences(tokens[:, :-1], tokens[:, 1:].masked_fill(is_answer[:, 1:] == 0, IGNORE_INDEX))


class AnswerScorer(nn.Module):
    """A model and the log-probabilities it gives to labels, in one forward pass; without full logits where it can.

    Args:
        model: A causal language model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.reason_for_logits = ""
        """Why full logits are computed; empty where they are not."""
        self._split: SplitModel | None = None
        try:
            self._split = SplitModel(model)
        except NoLinearHeadError as error:
            self.reason_for_logits = str(error)
        if self._split is not None and self._split.head.softcap is not None:
            self._split, self.reason_for_logits = None, "its logits are soft-capped"

    def forward(self, input_ids: Tensor, labels: Tensor, with_entropy: bool = False) -> TokenLogprobs:
        """Return each label's log-probability and, if wanted, the entropies, (B, L) each, 0 at labels of -100."""
        if self._split is None:
            return token_logprobs(logits_of(self.model(input_ids)), labels, with_entropy=with_entropy)
        head = self._split.head
        hidden = self._split.hidden(input_ids)
        found = linear_token_logprobs(hidden, head.weight, labels, bias=head.bias, with_entropy=with_entropy)
        # FSDP2 hangs the backward pass's work on what comes out, which must not be a view for that.
        return TokenLogprobs(found.logprobs.clone(), None if found.entropy is None else found.entropy.clone())


class AnswerTrainer(BaseTrainer[C], ABC):
    """A trainer on the log-probabilities of answers."""

    @cached_property
    def scorer(self) -> AnswerScorer:
        """The trained model and its log-probabilities."""
        return AnswerScorer(self.model)

    def _trained_module(self) -> nn.Module:
        return self.scorer


class AdapterFreeScorer(AnswerScorer):
    """As `AnswerScorer`, of the model as it was before it got adapters, without dropout."""

    def forward(self, input_ids: Tensor, labels: Tensor, with_entropy: bool = False) -> TokenLogprobs:
        """Return what `AnswerScorer.forward` does."""
        with as_before_adapters(self.model):
            return super().forward(input_ids, labels, with_entropy)


def reference_scorer(model: nn.Module, ref_model: nn.Module | None, device: torch.device) -> AnswerScorer:
    """Return the log-probabilities of the reference, as of `frozen_reference`, to be asked for without gradients.

    Where adapters train and no reference is given, the weights beside them are the reference: no copy is made.
    """
    if ref_model is None and holds_adapters(model):
        return AdapterFreeScorer(model)
    return AnswerScorer(frozen_reference(model, ref_model).to(device))


def frozen_reference(model: nn.Module, ref_model: nn.Module | None) -> nn.Module:
    """Return the reference in eval mode and without gradients; a copy of the model as it is now if None is given.

    Raises:
        ValueError: if the reference is the model itself, which could then not be trained.
    """
    if ref_model is model:
        raise ValueError("ref_model is the trained model itself: give another, or None for a frozen copy.")
    reference = copy.deepcopy(model) if ref_model is None else ref_model
    return reference.eval().requires_grad_(False)
