"""Log-probabilities of given tokens, and entropies, with gradients: what preference and policy losses are made of.

Labels are next-token targets already, as in `kd.losses`: nothing here shifts.

Shape letters: N tokens with a label, C of them in a chunk, V vocabulary, H width of the model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd.labelled import labelled_rows, select_rows, spread_rows
from kd.losses import IGNORE_INDEX, token_nll
from kd.tiles import LOWEST_LOGIT, Head

CHUNK_TOKENS = 256
"""With Qwen2.5's vocabulary a chunk's float32 logits take 156 MB; two such matrices are held at once."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Scores of each token at temperature 1, in the shape of the labels; 0 where those are -100.

    Both are float32 (float64 for float64 inputs) and carry gradients.
    """

    logprobs: Tensor
    """log p(label), in nats."""
    entropy: Tensor | None
    """-sum_v p_v log p_v of the whole distribution, in nats; None unless asked for."""


def token_logprobs(logits: Tensor, labels: Tensor, *, with_entropy: bool = False) -> TokenLogprobs:
    """Return each label's log-probability from full logits: plain on purpose.

    Args:
        logits: (..., V), any floating dtype; at -100 labels they may be anything, NaN too.
        labels: (...) next-token targets; -100 is ignored.
        with_entropy: whether to compute the entropy too.

    Raises:
        ValueError: if the labels do not have the shape of the logits without V.
    """
    if labels.shape == logits.shape[:-1]:  # if not, token_nll says so
        logits = logits.masked_fill((labels == IGNORE_INDEX).unsqueeze(-1), 0.0)
    logprobs = -token_nll(logits, labels)
    if not with_entropy:
        return TokenLogprobs(logprobs, None)
    log_probabilities = F.log_softmax(logits.to(logprobs.dtype), dim=-1).clamp(min=LOWEST_LOGIT)  # 0 * -inf is NaN
    entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
    return TokenLogprobs(logprobs, entropy.masked_fill(labels == IGNORE_INDEX, 0.0))


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    with_entropy: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
) -> TokenLogprobs:
    """Return `token_logprobs` of the logits `hidden @ weight.T + bias`, which are never all there at once.

    Logits exist for a chunk of tokens at a time, and again in the backward pass: a third matrix product is the price.
    Positions with label -100 take part in nothing, not even in a matrix product. Products are computed in the dtype of
    autocast, where that is on, or else of the arguments; softmax and sums in float32, or float64 for float64. The
    weight may belong to a tied embedding: its gradient adds to the embedding's.

    Args:
        hidden: (..., H), what the head sees.
        weight: (V, H) of the head.
        labels: (...) next-token targets; -100 is ignored.
        bias: (V,) of the head. Entries of -inf have probability 0.
        with_entropy: whether to compute the entropy too.
        chunk_tokens: most tokens whose logits are held at a time, > 0; it changes speed and memory, and results by
            rounding only.

    Raises:
        ValueError: if shapes differ, if a label is not in the vocabulary, or if chunk_tokens is not positive.

    Source: the gradient of log-softmax by logits x is onehot(label) - p, that of the entropy S is -p (log p + S).
        Logits recomputed rather than kept: Chen et al. 2016, arXiv:1604.06174, section 4.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} is not allowed: it must be at least 1.")
    rows = labelled_rows(labels, weight)
    selected = select_rows(hidden, weight, bias, labels, rows)
    logprobs, entropy = _LinearTokenLogprobs.apply(  # type: ignore[no-untyped-call]
        selected, weight, bias, labels.reshape(-1)[rows], with_entropy, chunk_tokens
    )
    return TokenLogprobs(
        spread_rows(logprobs, labels, rows), spread_rows(entropy, labels, rows) if with_entropy else None
    )


class _LinearTokenLogprobs(torch.autograd.Function):
    """Log-probabilities and entropies (or None) of the labelled tokens, (N,) each."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        with_entropy: bool,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor | None]:
        head = Head.of(hidden, weight, bias)
        # Autocast would change the dtypes of products and sums, which are chosen here one by one.
        with torch.autocast(hidden.device.type, enabled=False):
            logprobs, entropy = _score(head, labels, with_entropy, chunk_tokens)
        ctx.save_for_backward(hidden, weight, bias, labels, entropy)
        ctx.product_dtype, ctx.chunk_tokens = head.weight.dtype, chunk_tokens
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_logprobs: Tensor | None, by_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, entropy = ctx.saved_tensors
        dtype = ctx.product_dtype
        head = Head(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        if by_logprobs is None:
            by_logprobs = hidden.new_zeros(len(labels), dtype=_sum_dtype(head))
        gradients = _Gradients(head, ctx.needs_input_grad[:3])
        with torch.autocast(hidden.device.type, enabled=False):
            for tokens in _chunks(len(labels), ctx.chunk_tokens):
                by_logits = _log_probabilities(head, tokens)
                probabilities = by_logits.exp()
                if by_entropy is None or entropy is None:
                    torch.mul(probabilities, -by_logprobs[tokens, None], out=by_logits)
                else:
                    by_logits.add_(entropy[tokens, None]).mul_(-by_entropy[tokens, None])
                    by_logits.sub_(by_logprobs[tokens, None]).mul_(probabilities)
                by_logits.scatter_add_(1, labels[tokens, None], by_logprobs[tokens, None])
                gradients.add(tokens, by_logits)
        parts = zip((gradients.hidden, gradients.weight, gradients.bias), (hidden, weight, bias), strict=True)
        return *(None if part is None else part.to(like.dtype) for part, like in parts), None, None, None


class _Gradients:
    """Gradients by hidden states (N, H), weight (V, H) and bias (V,), summed chunk by chunk; None where not needed."""

    def __init__(self, head: Head, needed: tuple[bool, ...]) -> None:
        self._head = head
        dtype = _sum_dtype(head)
        self.hidden = torch.zeros_like(head.hidden, dtype=dtype) if needed[0] else None
        self.weight = torch.zeros_like(head.weight, dtype=dtype) if needed[1] else None
        self.bias = head.weight.new_zeros(head.weight.size(0), dtype=dtype) if needed[2] else None

    def add(self, tokens: slice, by_logits: Tensor) -> None:
        """Add the products of a chunk's gradient by logits, (C, V)."""
        factor = by_logits.to(self._head.weight.dtype)
        if self.hidden is not None:
            self.hidden[tokens] = factor @ self._head.weight
        if self.weight is not None and self.weight.dtype == factor.dtype:
            self.weight.addmm_(factor.T, self._head.hidden[tokens])
        elif self.weight is not None:
            self.weight += factor.T @ self._head.hidden[tokens]
        if self.bias is not None:
            self.bias += by_logits.sum(dim=0)


def _score(head: Head, labels: Tensor, with_entropy: bool, chunk_tokens: int) -> tuple[Tensor, Tensor | None]:
    """Return the log-probabilities of the labels and, if wanted, the entropies, (N,) each."""
    logprobs = head.hidden.new_empty(len(labels), dtype=_sum_dtype(head))
    entropy = torch.empty_like(logprobs) if with_entropy else None
    for tokens in _chunks(len(labels), chunk_tokens):
        chunk = _log_probabilities(head, tokens)
        logprobs[tokens] = chunk.gather(1, labels[tokens, None]).squeeze(1)
        if entropy is not None:
            entropy[tokens] = -chunk.mul_(chunk.exp()).sum(dim=1)
    return logprobs, entropy


def _log_probabilities(head: Head, tokens: slice) -> Tensor:
    """Return a chunk's log-softmax over the vocabulary, (C, V), at least in float32."""
    logits = F.linear(head.hidden[tokens], head.weight, head.bias).to(_sum_dtype(head))
    if head.bias is not None:
        logits.clamp_(min=LOWEST_LOGIT)
    return F.log_softmax(logits, dim=-1)


def _chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """Give the chunks of this many tokens."""
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_tokens))


def _sum_dtype(head: Head) -> torch.dtype:
    """Return what softmax and sums are computed in."""
    return torch.promote_types(head.weight.dtype, torch.float32)
