"""Examples as token ids, encoded once; masks, labels and padding are made here and nowhere else."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kd.data.chat import render_chat
from kd.data.examples import AnswerExample, ChatExample, PreferenceExample, PromptExample, SftExample
from kd.data.tokenizers import end_of_text_id
from kd.errors import DataError
from kd.losses import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MULTIPLE = 8
"""Batches are padded to a length of a multiple of this: fewer shapes, and matrix units like it."""
_BATCH = 1000
Indexes = Sequence[int]
Ids = npt.NDArray[np.int64]


@dataclass(slots=True)
class Outcome:
    """What became of the examples that were encoded."""

    examples: int
    """Given."""
    too_long: int = 0
    """Left out: the prompt leaves no room for an answer."""
    without_prompt: int = 0
    """Left out: the prompt has no token, so nothing predicts the answer's first one."""
    equal: int = 0
    """Left out: the chosen and the rejected answer are the same, as text or as far as they fit."""
    cut: int = 0
    """Kept, but an answer's end was cut off to fit, its end-of-text token included."""

    @property
    def left_out(self) -> int:
        """Examples that are not used."""
        return self.too_long + self.without_prompt + self.equal

    def describe(self) -> str:
        """Return one line for the log: what was kept, what was left out and why."""
        reasons = {
            "with a prompt that leaves no room for an answer": self.too_long,
            "with an empty prompt": self.without_prompt,
            "with equal answers": self.equal,
        }
        text = f"{self.examples - self.left_out} of {self.examples} examples are used"
        causes = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        text += f"; left out: {causes}" if causes else ""
        return text + (f"; {self.cut} cut at the end to fit" if self.cut else "")


class TokenRows:
    """Rows of token ids of different lengths, kept as one array."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self.lengths: Ids = np.array([len(row) for row in rows], dtype=np.int64)
        self._ends = np.cumsum(self.lengths)
        self._tokens = np.fromiter((token for row in rows for token in row), np.int64, int(self.lengths.sum()))

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, index: int) -> Ids:
        """Return one row, (length,)."""
        end = self._ends[index]
        return self._tokens[end - self.lengths[index] : end]


class EncodedExamples(Dataset[dict[str, Tensor]], ABC):
    """Encoded examples of one part; `examples[[i, j, ...]]` is the padded batch of these.

    A batch is padded to its longest row, rounded up to a multiple of 8 (but not beyond the limit it was encoded for).
    The masks say what is padding, never the padding id, which may be the end-of-text token. All tensors are int64.
    """

    def __init__(self, example_ids: Sequence[int], pad_id: int, limit: int, outcome: Outcome) -> None:
        self.example_ids: Ids = np.array(example_ids, dtype=np.int64)
        """Unique in the set, (len,); of what was left out, there is none."""
        self.pad_id = pad_id
        self.limit = limit
        """Longest row of a batch, in tokens."""
        self.outcome = outcome
        """How many examples were left out, and why; its `describe()` is for the log."""

    def __len__(self) -> int:
        return len(self.example_ids)

    def __getitem__(self, index: Indexes) -> dict[str, Tensor]:
        """Return the batch of the examples at these positions, with `example_id` (B,)."""
        return {**self._batch(index), "example_id": torch.from_numpy(self.example_ids[list(index)])}

    @abstractmethod
    def prompt(self, position: int) -> Ids:
        """Return the token ids of one example's prompt, (length,)."""

    @property
    @abstractmethod
    def lengths(self) -> Ids:
        """Tokens of each example, of its longer answer where there are two, (len,)."""

    @abstractmethod
    def _batch(self, index: Indexes) -> dict[str, Tensor]:
        """Return the padded tensors of the examples at these positions."""

    def _padded(self, rows: list[Ids], fill: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
        """Return rows (B, L) padded on one side, and their mask (B, L): 1 at real tokens, 0 at padding."""
        longest = max(len(row) for row in rows)
        length = min(-(-longest // _MULTIPLE) * _MULTIPLE, self.limit)
        values = np.full((len(rows), length), fill, dtype=np.int64)
        mask = np.zeros_like(values)
        for number, row in enumerate(rows):
            place = slice(length - len(row), length) if left else slice(0, len(row))
            values[number, place] = row
            mask[number, place] = 1
        return torch.from_numpy(values), torch.from_numpy(mask)


class EncodedAnswers(EncodedExamples):
    """For SFT: `input_ids`, `labels`, `attention_mask` (B, L), padded on the right, and `example_id` (B,).

    `labels[:, i]` is the token that follows `input_ids[:, i]`; it is -100 where that is a prompt token or padding.
    The end-of-text token after a response is a target, unless the response was cut.
    """

    def __init__(
        self,
        rows: TokenRows,
        prompt_lengths: Sequence[int],
        example_ids: Sequence[int],
        pad_id: int,
        limit: int,
        outcome: Outcome,
    ) -> None:
        """Keep rows of prompt, response and end-of-text token; made by `encode_answers`."""
        super().__init__(example_ids, pad_id, limit, outcome)
        self._rows = rows
        self._prompt_lengths = np.array(prompt_lengths, dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        """Targets in all examples."""
        return int((self._rows.lengths - self._prompt_lengths).sum())

    def prompt(self, position: int) -> Ids:
        """Return the token ids of one example's prompt, (length,)."""
        return self._rows.row(position)[: self._prompt_lengths[position]]

    @property
    def lengths(self) -> Ids:
        """Tokens of each prompt with its response, (len,)."""
        return self._rows.lengths

    def _batch(self, index: Indexes) -> dict[str, Tensor]:
        rows = [self._rows.row(position) for position in index]
        input_ids, mask = self._padded([row[:-1] for row in rows], self.pad_id)
        labels, _ = self._padded([row[1:] for row in rows], IGNORE_INDEX)
        prompts = torch.from_numpy(self._prompt_lengths[list(index)])
        # The last prompt token's target is the response's first, so that one target fewer than its length is masked.
        is_prompt = torch.arange(labels.size(1)) < prompts[:, None] - 1
        return {
            "input_ids": input_ids,
            "labels": labels.masked_fill(is_prompt, IGNORE_INDEX),
            "attention_mask": mask,
        }


class EncodedPreferences(EncodedExamples):
    """For preference training: `prompt_`, `chosen_` and `rejected_` x `input_ids` and `attention_mask`, `example_id`.

    All (B, L) are padded on the right, each to its own length. Answers come without the prompt and end with the
    end-of-text token, unless cut. Whoever joins prompt and answer must take the prompt's padding out from between
    them; without padding both together have at most max_seq_len + 1 tokens, the last of which is only a target.
    """

    def __init__(
        self,
        prompts: TokenRows,
        chosen: TokenRows,
        rejected: TokenRows,
        example_ids: Sequence[int],
        pad_id: int,
        limit: int,
        outcome: Outcome,
    ) -> None:
        """Keep prompts and answers; made by `encode_preferences`."""
        super().__init__(example_ids, pad_id, limit, outcome)
        self._rows = {"prompt": prompts, "chosen": chosen, "rejected": rejected}

    def prompt(self, position: int) -> Ids:
        """Return the token ids of one example's prompt, (length,)."""
        return self._rows["prompt"].row(position)

    @property
    def lengths(self) -> Ids:
        """Tokens of each prompt with its longer answer, (len,)."""
        answers = np.maximum(self._rows["chosen"].lengths, self._rows["rejected"].lengths)
        return np.asarray(self._rows["prompt"].lengths + answers)

    def _batch(self, index: Indexes) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        for name, rows in self._rows.items():
            ids, mask = self._padded([rows.row(position) for position in index], self.pad_id)
            batch |= {f"{name}_input_ids": ids, f"{name}_attention_mask": mask}
        return batch


class EncodedPrompts(EncodedExamples):
    """For GRPO: `prompts` and `prompt_attention_mask` (B, L), padded on the LEFT, and `example_id` (B,)."""

    def __init__(
        self,
        prompts: TokenRows,
        answers: Sequence[str],
        example_ids: Sequence[int],
        pad_id: int,
        limit: int,
        outcome: Outcome,
    ) -> None:
        """Keep prompts and their reference answers; made by `encode_prompts`."""
        super().__init__(example_ids, pad_id, limit, outcome)
        self._prompts = prompts
        self.answers = dict(zip(example_ids, answers, strict=True))
        """Reference answers by example id."""

    def references(self, example_ids: Tensor) -> list[str]:
        """Return the reference answers of examples by their ids (B,)."""
        return [self.answers[example_id] for example_id in example_ids.tolist()]

    def prompt(self, position: int) -> Ids:
        """Return the token ids of one example's prompt, (length,)."""
        return self._prompts.row(position)

    @property
    def lengths(self) -> Ids:
        """Tokens of each prompt, (len,)."""
        return self._prompts.lengths

    def _batch(self, index: Indexes) -> dict[str, Tensor]:
        ids, mask = self._padded([self._prompts.row(position) for position in index], self.pad_id, left=True)
        return {"prompts": ids, "prompt_attention_mask": mask}


# --- encoding ----------------------------------------------------------------------------------------------------


def encode_answers(
    examples: Sequence[SftExample],
    tokenizer: "PreTrainedTokenizerFast",
    max_seq_len: int,
    *,
    first_id: int = 0,
) -> EncodedAnswers:
    """Encode examples for SFT. A response that does not fit is cut at its end, a prompt never.

    Prompt and response are encoded apart, so that the prompt's tokens are those that it has when the model answers.

    Args:
        examples: Of one part.
        tokenizer: With an end-of-text token; for chats also with a chat template.
        max_seq_len: Most tokens that the model reads.
        first_id: Id of the first example; the others count on from it, those left out included.

    Raises:
        DataError: if no example is left, or the tokenizer or a chat does not allow encoding.
    """
    outcome, end = Outcome(len(examples)), end_of_text_id(tokenizer)
    prompts = _prompt_ids(examples, tokenizer)
    responses = _text_ids([example.response for example in examples], tokenizer)
    rows: list[list[int]] = []
    lengths: list[int] = []
    ids: list[int] = []
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if not _has_room(prompt, max_seq_len, outcome):
            continue
        row = [*prompt, *response, end]
        rows.append(row[: max_seq_len + 1])  # the last token is a target only
        lengths.append(len(prompt))
        ids.append(first_id + number)
        outcome.cut += len(row) > max_seq_len + 1
    _require_some(outcome, f"model.max_seq_len={max_seq_len}")
    return EncodedAnswers(TokenRows(rows), lengths, ids, _pad_id(tokenizer), max_seq_len, outcome)


def encode_preferences(
    examples: Sequence[PreferenceExample], tokenizer: "PreTrainedTokenizerFast", max_seq_len: int, *, first_id: int = 0
) -> EncodedPreferences:
    """Encode pairs of answers; arguments, cutting and errors as for `encode_answers`.

    Pairs of equal answers are left out: they have no gradient, and would count as lost comparisons.
    """
    outcome, end = Outcome(len(examples)), end_of_text_id(tokenizer)
    prompts = _text_ids([example.prompt for example in examples], tokenizer)
    chosen = _text_ids([example.chosen for example in examples], tokenizer)
    rejected = _text_ids([example.rejected for example in examples], tokenizer)
    kept: list[tuple[int, list[int], list[int], list[int]]] = []
    for number, prompt in enumerate(prompts):
        if not _has_room(prompt, max_seq_len, outcome):
            continue
        room = max_seq_len + 1 - len(prompt)
        good, bad = [*chosen[number], end], [*rejected[number], end]
        if good[:room] == bad[:room]:
            outcome.equal += 1
            continue
        outcome.cut += max(len(good), len(bad)) > room
        kept.append((first_id + number, prompt, good[:room], bad[:room]))
    _require_some(outcome, f"model.max_seq_len={max_seq_len}")
    columns = list(zip(*kept, strict=True))
    rows = [TokenRows(column) for column in columns[1:]]
    return EncodedPreferences(rows[0], rows[1], rows[2], columns[0], _pad_id(tokenizer), max_seq_len, outcome)


def encode_prompts(
    examples: Sequence[PromptExample], tokenizer: "PreTrainedTokenizerFast", max_prompt_len: int, *, first_id: int = 0
) -> EncodedPrompts:
    """Encode prompts for sampling; longer ones than `max_prompt_len` tokens are left out.

    Args:
        examples: Of one part.
        tokenizer: With an end-of-text token, which the samples end with.
        max_prompt_len: What the model's context leaves beside the longest response.
        first_id: Id of the first example; the others count on from it, those left out included.

    Raises:
        DataError: if no example is left, or the tokenizer has no end-of-text token.
    """
    outcome = Outcome(len(examples))
    end_of_text_id(tokenizer)
    encoded = _text_ids([example.prompt for example in examples], tokenizer)
    kept = [number for number, prompt in enumerate(encoded) if _has_room(prompt, max_prompt_len, outcome)]
    _require_some(outcome, f"at most {max_prompt_len} tokens for a prompt")
    return EncodedPrompts(
        TokenRows([encoded[number] for number in kept]),
        [examples[number].answer for number in kept],
        [first_id + number for number in kept],
        _pad_id(tokenizer),
        max_prompt_len,
        outcome,
    )


def _has_room(prompt: list[int], limit: int, outcome: Outcome) -> bool:
    """Return whether a prompt can be used, and count it if not."""
    outcome.without_prompt += not prompt
    outcome.too_long += len(prompt) > limit
    return 0 < len(prompt) <= limit


def _require_some(outcome: Outcome, limit: str) -> None:
    if outcome.left_out == outcome.examples:
        raise DataError(
            f"Nothing is left to learn from, with {limit}: {outcome.describe()}. Raise model.max_seq_len, or give "
            "shorter prompts and, for preferences, answers that differ."
        )


def _pad_id(tokenizer: "PreTrainedTokenizerFast") -> int:
    padding = tokenizer.pad_token_id
    return padding if isinstance(padding, int) else end_of_text_id(tokenizer)


def _prompt_ids(examples: Sequence[SftExample], tokenizer: "PreTrainedTokenizerFast") -> list[list[int]]:
    """Encode prompts; in those that a chat template rendered, special tokens are meant as such."""
    plain = [example.prompt for example in examples if isinstance(example, AnswerExample)]
    chats = [render_chat(example, tokenizer) for example in examples if isinstance(example, ChatExample)]
    plain_ids, chat_ids = iter(_text_ids(plain, tokenizer)), iter(_text_ids(chats, tokenizer, with_special=True))
    return [next(plain_ids if isinstance(example, AnswerExample) else chat_ids) for example in examples]


def _text_ids(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerFast", *, with_special: bool = False
) -> list[list[int]]:
    """Encode texts; special tokens spelled out in them are text, unless `with_special`: no text can forge its end."""
    ids: list[list[int]] = []
    for start in range(0, len(texts), _BATCH):
        batch = list(texts[start : start + _BATCH])
        encoded = tokenizer(batch, add_special_tokens=False, split_special_tokens=not with_special, verbose=False)
        ids.extend(encoded["input_ids"])
    return ids
