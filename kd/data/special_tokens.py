"""What of a text a tokenizer's special and unknown tokens are."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MANY_UNKNOWN = 0.001
"""Of all tokens. A rare sign is unknown to many a vocabulary."""


def special_pattern(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """Return what finds special tokens spelled out in a text, the longest where several begin."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    spelled = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
    return re.compile(spelled or r"(?!)")  # the latter fits nothing


def unknown_id(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return the id that stands for text that the vocabulary lacks; None if there is none of that use alone."""
    token = tokenizer.unk_token_id
    return token if isinstance(token, int) and token != tokenizer.eos_token_id else None


def unknown_warning(unknown: int, tokens: int) -> str | None:
    """Return a sentence on unknown tokens, if they are many."""
    if unknown <= _MANY_UNKNOWN * tokens:
        return None
    return (
        f"{100 * unknown / tokens:.3g} % of the tokens are the tokenizer's unknown one: what stood there is lost, and "
        "easy to predict, so that losses and perplexities say little. Use a tokenizer that knows this text"
    )


def spelled_warning(spelled: int, total: int, kind: str) -> str | None:
    """Return a sentence on texts that spell special tokens, if there are any."""
    if not spelled:
        return None
    return f"{spelled:,} of {total:,} {kind} spell a special token of the tokenizer, which is read as plain characters"
