"""Text from a trained student: greedy, top-k or top-p, one sequence at a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kd.errors import ConfigError
from kd.model import KeyValueCache, StudentModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STRATEGIES = ("greedy", "top_k", "top_p")


@dataclass(frozen=True)
class GenerationConfig:
    """How to choose the next tokens."""

    strategy: str = "greedy"
    """greedy: the likeliest token; top_k, top_p: one drawn from the likeliest."""
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


def choose_token(logits: Tensor, config: GenerationConfig, generator: torch.Generator) -> int:
    """Return the next token's id from logits (V,); `generator`, on their device, makes the draws."""
    if config.strategy == "greedy":
        return int(logits.argmax())
    scaled = logits.float() / config.temperature
    kept = keep_top_k(scaled, config.top_k) if config.strategy == "top_k" else keep_top_p(scaled, config.top_p)
    return int(torch.multinomial(kept.softmax(dim=-1), num_samples=1, generator=generator))


class TextGenerator:
    """Continues text with a trained student, which it puts in eval mode and leaves there.

    Args:
        model: the student.
        tokenizer: the one that the student was trained with.
    """

    def __init__(self, model: StudentModel, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer

    def generate(self, prompt: str, config: GenerationConfig = GenerationConfig()) -> str:
        """Return the continuation of a prompt, without the prompt; an empty one starts from the end-of-text token.

        Raises:
            ConfigError: if the prompt is empty and the tokenizer has no end-of-text token.
        """
        tokens = list(self.tokenizer(prompt)["input_ids"])
        if not tokens:
            tokens = [self._start_token()]
        return self.decode(self.generate_ids(torch.tensor([tokens]), config))

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of token ids."""
        text = self.tokenizer.decode(token_ids)
        assert isinstance(text, str)
        return text

    def generate_ids(self, input_ids: Tensor, config: GenerationConfig = GenerationConfig()) -> list[int]:
        """Return the ids that follow input_ids (1, L), L > 0, up to and without the end-of-text token.

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
            if token == self.tokenizer.eos_token_id:
                break
            tokens.append(token)
        return tokens

    def _stream(self, context: list[int], config: GenerationConfig) -> Iterator[int]:
        """Yield max_new_tokens tokens, not stopping for any."""
        limit = self.model.config.max_seq_len
        device = self.model.lm_head.weight.device
        generator = torch.Generator(device).manual_seed(config.seed)
        cache, unread = self._new_cache(), context[-limit:]
        for _ in range(config.max_new_tokens):
            token = choose_token(self._next_logits(unread, cache), config, generator)
            yield token
            context, unread = [*context[-limit:], token], [token]
            if cache.length == limit:
                cache, unread = self._new_cache(), context[-max(1, limit // 2) :]

    @torch.inference_mode()
    def _next_logits(self, tokens: list[int], cache: KeyValueCache) -> Tensor:
        """Read tokens into the cache; return the logits (V,) of what follows them."""
        input_ids = torch.tensor([tokens], device=self.model.lm_head.weight.device)
        # The head is most of a small model's work: only the last token needs it.
        logits: Tensor = self.model.lm_head(self.model.hidden_states(input_ids, cache=cache)[0, -1])
        return logits

    def _new_cache(self) -> KeyValueCache:
        """Return an empty cache as long as the model's context."""
        weight = self.model.lm_head.weight
        return KeyValueCache(self.model.config, 1, self.model.config.max_seq_len, weight.device, weight.dtype)

    def _start_token(self) -> int:
        """Return the token that stands before any text."""
        token: int | None = self.tokenizer.eos_token_id
        if token is None:
            raise ConfigError(
                "The prompt is empty, and the tokenizer has no end-of-text token to start from: give one."
            )
        return token
