"""Text from a trained student: greedy, or drawn from all, the top-k or the top-p tokens; one sequence or a batch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.data.chat import turn_end_id
from kd.errors import ConfigError
from kd.model import KeyValueCache, StudentModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STRATEGIES = ("greedy", "sample", "top_k", "top_p")


@dataclass(frozen=True)
class GenerationConfig:
    """How to choose the next tokens."""

    strategy: str = "greedy"
    """greedy: the likeliest token; sample: one drawn from all; top_k, top_p: one drawn from the likeliest."""
    max_new_tokens: int = 256
    """Most tokens to generate."""
    temperature: float = 1.0
    """Sampling temperature, > 0; below 1 favours likely tokens."""
    top_k: int = 50
    """Tokens to draw from (`strategy=top_k`)."""
    top_p: float = 0.9
    """Probability that the tokens to draw from reach together, in (0, 1] (`strategy=top_p`)."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        _require(self.strategy in STRATEGIES, "strategy", self.strategy, f"use one of {', '.join(STRATEGIES)}")
        _require(self.max_new_tokens > 0, "max_new_tokens", self.max_new_tokens, "it must be greater than 0")
        is_temperature = math.isfinite(self.temperature) and self.temperature > 0
        _require(is_temperature, "temperature", self.temperature, "it must be a finite number greater than 0")
        _require(self.top_k > 0, "top_k", self.top_k, "it must be greater than 0")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "it must be in (0, 1]")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "it must be in [0, 2^32)")


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"generation.{key}={value} is not allowed: {allowed}.")


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Return logits (..., V) with all but the k largest at -inf; exactly k survive, among equals too."""
    values, ids = logits.topk(min(k, logits.size(-1)), dim=-1)
    return torch.full_like(logits, -math.inf).scatter(-1, ids, values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Return logits (..., V) with all at -inf but the fewest whose probabilities together reach p (one at least).

    Source: Holtzman et al. 2020, arXiv:1904.09751, section 3.1.
    """
    values, ids = logits.sort(dim=-1, descending=True)
    probabilities = values.float().softmax(dim=-1)
    likelier = probabilities.cumsum(dim=-1) - probabilities  # what the tokens before this one reach
    values = values.masked_fill(likelier >= p, -math.inf)
    return torch.full_like(logits, -math.inf).scatter(-1, ids, values)


def choose_tokens(logits: Tensor, config: GenerationConfig, generator: torch.Generator) -> Tensor:
    """Return the next token's id of each row, (B,), from logits (B, V); `generator`, on their device, draws."""
    if config.strategy == "greedy":
        return logits.argmax(dim=-1)
    kept = logits.float() / config.temperature
    if config.strategy == "top_k":
        kept = keep_top_k(kept, config.top_k)
    elif config.strategy == "top_p":
        kept = keep_top_p(kept, config.top_p)
    return torch.multinomial(kept.softmax(dim=-1), num_samples=1, generator=generator).squeeze(1)


@dataclass(frozen=True)
class Rollout:
    """Responses to a batch of prompts; R tokens of the longest one, none has more."""

    responses: Tensor
    """(B, R) token ids, that which ends the text included where one was generated; padding follows on the right."""
    mask: Tensor
    """(B, R) bool, True at the tokens of the responses, that which ends the text too."""
    logprobs: Tensor
    """(B, R) float32: log p(token) of the model itself, at temperature 1 and over the whole vocabulary, in nats; 0 at
    padding. These are GRPO's old log-probabilities. They are those of the distribution that the tokens were drawn from
    only for the strategy "sample" at temperature 1."""


class TextGenerator:
    """Continues text with a trained student, which it puts in eval mode and leaves there.

    Text ends with the end-of-text token, or with that which ends an answer in the tokenizer's chat template.

    Args:
        model: the student.
        tokenizer: the one that the student was trained with.
    """

    def __init__(self, model: StudentModel, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        ends = (tokenizer.eos_token_id, turn_end_id(tokenizer))
        self.end_ids = frozenset(token for token in ends if token is not None)
        """Tokens that a text ends with; of the generated text itself they are no part."""

    def generate(self, prompt: str, config: GenerationConfig = GenerationConfig()) -> str:
        """Return the continuation of a prompt, without the prompt; an empty one starts from the end-of-text token.

        The prompt is encoded as in training: no token is added. Special tokens spelled out in it are meant as such,
        so that one who writes a chat's turns as the template does has them.

        Raises:
            ConfigError: if the prompt is not valid Unicode, or empty while the tokenizer has no end-of-text token.
        """
        _check_unicode(prompt)
        tokens = list(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if not tokens:
            tokens = [self._start_token()]
        return self.decode(self.generate_ids(torch.tensor([tokens]), config))

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of token ids."""
        text = self.tokenizer.decode(token_ids)
        assert isinstance(text, str)
        return text

    def generate_ids(self, input_ids: Tensor, config: GenerationConfig = GenerationConfig()) -> list[int]:
        """Return the ids that follow input_ids (1, L), L > 0, up to and without the token that ends the text.

        When the context is full, it goes on from the newest half of max_seq_len tokens. Of a longer prompt only the
        newest max_seq_len tokens are read. Torch's global random numbers are not touched.

        Raises:
            ValueError: if input_ids is not one sequence with at least one token.
        """
        if input_ids.ndim != 2 or input_ids.size(0) != 1 or input_ids.size(1) == 0:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected (1, L) with L > 0.")
        self.model.eval()  # it may have been trained since
        tokens = []
        stream = self._stream(input_ids[0].tolist(), config)
        for token in stream:
            if token in self.end_ids:
                break
            tokens.append(token)
        return tokens

    def generate_batch_ids(
        self, prompts: Sequence[Sequence[int]], config: GenerationConfig = GenerationConfig()
    ) -> list[list[int]]:
        """Return for each prompt the ids that follow it, up to and without the token that ends the text.

        Unlike `generate_ids`, it ends where the context is full: see `rollout`, which this is without the tensors.

        Raises:
            ValueError: if a prompt is empty, or leaves no room in the context.
        """
        if not prompts:
            return []
        rollout = self.rollout(*_padded_left(prompts), config)
        rows = zip(rollout.responses.tolist(), rollout.mask.sum(dim=1).tolist(), strict=True)
        return [[token for token in row[:length] if token not in self.end_ids] for row, length in rows]

    def rollout(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        config: GenerationConfig = GenerationConfig(),
        num_responses: int = 1,
    ) -> Rollout:
        """Return responses to each prompt of a batch, with their log-probabilities.

        Each row ends with a token that ends the text, or after max_new_tokens, or where L + R reaches the model's
        max_seq_len, so that prompts and responses side by side fit the model. Padding takes room as tokens do. A row
        gets the tokens that it would get alone (for other strategies than greedy, with draws of its own: one generator,
        of config.seed, draws for all rows). The model is left in eval mode. Torch's global random numbers are not
        touched, and no graph is made.

        Args:
            input_ids: (B, L) prompts, L below max_seq_len.
            attention_mask: (B, L), non-zero at prompt tokens, 0 at padding, which must be on the left.
            config: how to choose tokens.
            num_responses: so many to each prompt, in rows next to each other; the prompt is read once for all of them.

        Raises:
            ValueError: if shapes differ, a row has no tokens or padding on its right, or if the prompts leave no room.
        """
        device = self.model.lm_head.weight.device
        input_ids, attention_mask = input_ids.to(device), attention_mask.to(device).bool()
        self._check_prompts(input_ids, attention_mask)
        self.model.eval()  # it may have been trained since
        ends = torch.tensor(sorted(self.end_ids), dtype=torch.long, device=device)
        filler = self.tokenizer.eos_token_id or 0
        is_live = torch.ones(len(input_ids) * num_responses, dtype=torch.bool, device=device)
        columns = []
        for tokens, logprobs in self._stream_batch(input_ids, attention_mask, config, num_responses):
            # A row that has ended goes on, unseen: a batch that shrinks would have to move its whole cache.
            columns.append((tokens.where(is_live, filler), is_live, logprobs.where(is_live, 0.0)))
            is_live = is_live & ~torch.isin(tokens, ends)
            if not is_live.any():
                break
        responses, mask, kept_logprobs = (torch.stack(parts, dim=1) for parts in zip(*columns, strict=True))
        return Rollout(responses, mask, kept_logprobs)

    def _stream(self, context: list[int], config: GenerationConfig) -> Iterator[int]:
        """Yield max_new_tokens tokens, not stopping for any."""
        limit = self.model.config.max_seq_len
        device = self.model.lm_head.weight.device
        generator = torch.Generator(device).manual_seed(config.seed)
        cache, unread = self._new_cache(1, limit), context[-limit:]
        for _ in range(config.max_new_tokens):
            logits = self._next_logits(torch.tensor([unread], device=device), None, cache)
            token = int(choose_tokens(logits, config, generator))
            yield token
            context, unread = [*context[-limit:], token], [token]
            if cache.length == limit:
                cache, unread = self._new_cache(1, limit), context[-max(1, limit // 2) :]

    def _stream_batch(
        self, input_ids: Tensor, attention_mask: Tensor, config: GenerationConfig, num_responses: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each response's next token and its log-probability at temperature 1 until the context is full.

        Args:
            input_ids: (B, L).
            attention_mask: (B, L) bool.
            config: how to choose tokens.
            num_responses: to each prompt; what is yielded is (B * num_responses,).
        """
        batch_size, length = input_ids.shape
        total = min(length + config.max_new_tokens, self.model.config.max_seq_len)
        generator = torch.Generator(input_ids.device).manual_seed(config.seed)
        cache = self._new_cache(batch_size, total)
        # Without padding no mask: attention is faster then.
        visible = None if attention_mask.all() else F.pad(attention_mask, (0, total - length), value=True)
        logits = self._next_logits(input_ids, None if visible is None else attention_mask, cache)
        if num_responses > 1:
            cache.repeat(num_responses)
            logits = logits.repeat_interleave(num_responses, dim=0)
            visible = None if visible is None else visible.repeat_interleave(num_responses, dim=0)
        for end in range(length + 1, total + 1):
            tokens = choose_tokens(logits, config, generator)
            unread = tokens.unsqueeze(1)
            yield tokens, F.log_softmax(logits.float(), dim=-1).gather(1, unread).squeeze(1)
            if end < total:
                logits = self._next_logits(unread, None if visible is None else visible[:, :end], cache)

    @torch.inference_mode()
    def _next_logits(self, input_ids: Tensor, attention_mask: Tensor | None, cache: KeyValueCache) -> Tensor:
        """Read tokens (B, L) into the cache; return the logits (B, V) of what follows them.

        Args:
            input_ids: (B, L).
            attention_mask: (B, past + L) bool, or None.
            cache: holds the past.
        """
        hidden = self.model.hidden_states(input_ids, attention_mask, cache)
        # The head is most of a small model's work: only the last token needs it.
        logits: Tensor = self.model.lm_head(hidden[:, -1])
        return logits

    def _new_cache(self, batch_size: int, max_len: int) -> KeyValueCache:
        """Return an empty cache."""
        weight = self.model.lm_head.weight
        return KeyValueCache(self.model.config, batch_size, max_len, weight.device, weight.dtype)

    def _check_prompts(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Refuse prompts that cannot be continued together."""
        if input_ids.ndim != 2 or input_ids.numel() == 0 or attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"input_ids {tuple(input_ids.shape)} and attention_mask {tuple(attention_mask.shape)} must both be "
                "(B, L), neither of them 0."
            )
        if not attention_mask[:, -1].all() or (attention_mask[:, 1:] < attention_mask[:, :-1]).any():
            raise ValueError(
                "Every prompt must have a token and be padded on the left only: its last token comes last."
            )
        limit = self.model.config.max_seq_len
        if input_ids.size(1) >= limit:
            raise ValueError(
                f"Prompts of {input_ids.size(1)} tokens leave no room for a response in model.max_seq_len={limit}: "
                "shorten them."
            )

    def _start_token(self) -> int:
        """Return the token that stands before any text."""
        token: int | None = self.tokenizer.eos_token_id
        if token is None:
            raise ConfigError(
                "The prompt is empty, and the tokenizer has no end-of-text token to start from: give one."
            )
        return token


def _check_unicode(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"The prompt is not valid Unicode at character {error.start} ({error.reason}): give it as UTF-8."
        ) from error


def _padded_left(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return prompts as (B, L) token ids, 0 at padding, and a bool mask that is True at tokens."""
    length = max(len(prompt) for prompt in prompts)
    input_ids = [[0] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[False] * (length - len(prompt)) + [True] * len(prompt) for prompt in prompts]
    return torch.tensor(input_ids, dtype=torch.long), torch.tensor(mask, dtype=torch.bool)
