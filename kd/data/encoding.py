"""Examples as token ids, encoded once; masks, labels and padding are made here and nowhere else."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kd.data.encoded_texts import Outcome, TextEncoder, encode_turns
from kd.data.examples import PreferenceExample, PromptExample, SftExample, lacks_answer
from kd.data.tokenizers import end_of_text_id
from kd.errors import DataError
from kd.losses import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MULTIPLE = 8
"""Batches are padded to a length of a multiple of this: fewer shapes, and matrix units like it."""
Indexes = Sequence[int]
Ids = npt.NDArray[np.int64]


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
    What ends a response is a target, unless the response was cut: the end-of-text token or, after a chat's answer, the
    special token with which the chat template ends the turn.
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
        """Keep rows of prompt, response and its end; made by `encode_answers`."""
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

    Prompt and response are encoded apart, so that the prompt's tokens are those that it has when the model answers. Of
    a chat, all that the template renders after the prompt is learned, up to the special token that ends the turn.
    Examples without an answer are left out.

    Args:
        examples: Of one part.
        tokenizer: With an end-of-text token; for chats also with a chat template.
        max_seq_len: Most tokens that the model reads.
        first_id: Id of the first example; the others count on from it, those left out included.

    Raises:
        DataError: if no example is left, or the tokenizer or a chat does not allow encoding.
    """
    outcome = Outcome(len(examples))
    prompts, answers = encode_turns(examples, TextEncoder(tokenizer, outcome))
    rows: list[list[int]] = []
    lengths: list[int] = []
    ids: list[int] = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if not _is_usable(examples[number], prompt, max_seq_len, outcome):
            continue
        row = [*prompt, *answer]
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

    Pairs of equal answers are left out: they have no gradient, and would count as lost comparisons. So are those in
    which the answer to prefer is blank; the other one may be.
    """
    outcome, end = Outcome(len(examples)), end_of_text_id(tokenizer)
    encoder = TextEncoder(tokenizer, outcome)
    prompts = encoder.plain([example.prompt for example in examples])
    chosen = encoder.plain([example.chosen for example in examples])
    rejected = encoder.plain([example.rejected for example in examples])
    kept: list[tuple[int, list[int], list[int], list[int]]] = []
    for number, prompt in enumerate(prompts):
        encoder.note_spelled(examples[number].prompt, examples[number].chosen, examples[number].rejected)
        if not _is_usable(examples[number], prompt, max_seq_len, outcome):
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
    encoder = TextEncoder(tokenizer, outcome)
    encoded = encoder.plain([example.prompt for example in examples])
    for example in examples:
        encoder.note_spelled(example.prompt)
    kept = [
        number for number, prompt in enumerate(encoded) if _is_usable(examples[number], prompt, max_prompt_len, outcome)
    ]
    _require_some(outcome, f"at most {max_prompt_len} tokens for a prompt")
    return EncodedPrompts(
        TokenRows([encoded[number] for number in kept]),
        [examples[number].answer for number in kept],
        [first_id + number for number in kept],
        _pad_id(tokenizer),
        max_prompt_len,
        outcome,
    )


def _is_usable(
    example: SftExample | PreferenceExample | PromptExample, prompt: list[int], limit: int, outcome: Outcome
) -> bool:
    """Return whether an example can be used, and count it if not."""
    if not prompt:
        outcome.without_prompt += 1
    elif len(prompt) > limit:
        outcome.too_long += 1
    elif lacks_answer(example):
        outcome.without_answer += 1
    else:
        return True
    return False


def _require_some(outcome: Outcome, limit: str) -> None:
    if outcome.left_out == outcome.examples:
        raise DataError(
            f"Nothing is left to learn from, with {limit}: {outcome.describe()}. Raise model.max_seq_len, or give "
            "shorter prompts and, for preferences, answers that differ."
        )


def _pad_id(tokenizer: "PreTrainedTokenizerFast") -> int:
    padding = tokenizer.pad_token_id
    return padding if isinstance(padding, int) else end_of_text_id(tokenizer)
