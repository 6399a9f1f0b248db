"""Texts of examples as token ids, and what became of the examples."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kd.data.chat import DATE, ChatTemplate, RenderedChat, token_id_of
from kd.data.examples import AnswerExample, SftExample
from kd.data.special_tokens import special_pattern, spelled_warning, unknown_id, unknown_warning
from kd.data.tokenizers import end_of_text_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("kd")

_BATCH = 1000


@dataclass(slots=True)
class Outcome:
    """What became of the examples that were encoded."""

    examples: int
    """Given."""
    too_long: int = 0
    """Left out: the prompt leaves no room for an answer."""
    without_prompt: int = 0
    """Left out: the prompt has no token, so nothing predicts the answer's first one."""
    without_answer: int = 0
    """Left out: the response, or the answer to prefer, is blank."""
    equal: int = 0
    """Left out: the chosen and the rejected answer are the same, as text or as far as they fit."""
    cut: int = 0
    """Kept, but an answer's end was cut off to fit, its last token included."""
    spelled: int = 0
    """Examples, of those given, that spell a special token where it is read as plain characters."""
    tokens: int = 0
    """Of all examples given, special ones included."""
    unknown: int = 0
    """Tokens that stand for text which the vocabulary lacks."""

    @property
    def left_out(self) -> int:
        """Examples that are not used."""
        return self.too_long + self.without_prompt + self.without_answer + self.equal

    def describe(self) -> str:
        """Return one line for the log: what was kept, what was left out and why."""
        reasons = {
            "with a prompt that leaves no room for an answer": self.too_long,
            "with an empty prompt": self.without_prompt,
            "without an answer": self.without_answer,
            "with equal answers": self.equal,
        }
        text = f"{self.examples - self.left_out} of {self.examples} examples are used"
        causes = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        text += f"; left out: {causes}" if causes else ""
        return text + (f"; {self.cut} cut at the end to fit" if self.cut else "")

    def warnings(self) -> list[str]:
        """Return what should be known before anything is trained."""
        spelled = spelled_warning(self.spelled, self.examples, "examples")
        found = (
            spelled and f"{spelled} (of a chat's turns they are meant as such: give `messages`)",
            unknown_warning(self.unknown, self.tokens),
        )
        return [warning for warning in found if warning is not None]


class TextEncoder:
    """Encodes texts without adding a token, and counts into an outcome what it meets."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", outcome: Outcome) -> None:
        self.tokenizer = tokenizer
        self.outcome = outcome
        self._unknown = unknown_id(tokenizer)
        self._special = special_pattern(tokenizer)

    def note_spelled(self, *texts: str) -> None:
        """Count an example whose texts spell a special token."""
        self.outcome.spelled += any(self._special.search(text) for text in texts)

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts; special tokens spelled out in them are plain characters: no text can forge its end."""
        return self._encode(texts, split=True)

    def with_special(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode what a template rendered; special tokens are meant as such."""
        return self._encode(texts, split=False)

    def _encode(self, texts: Sequence[str], *, split: bool) -> list[list[int]]:
        ids: list[list[int]] = []
        for start in range(0, len(texts), _BATCH):
            batch = list(texts[start : start + _BATCH])
            encoded = self.tokenizer(batch, add_special_tokens=False, split_special_tokens=split, verbose=False)
            ids.extend(encoded["input_ids"])
        self.outcome.tokens += sum(map(len, ids))
        self.outcome.unknown += 0 if self._unknown is None else sum(row.count(self._unknown) for row in ids)
        return ids


def encode_turns(examples: Sequence[SftExample], encoder: TextEncoder) -> tuple[list[list[int]], list[list[int]]]:
    """Encode prompts, and what is learned after each; in what a chat template rendered, special tokens are such."""
    end = end_of_text_id(encoder.tokenizer)
    chats = _rendered(examples, encoder)
    prompts: list[list[int]] = []
    answers: list[list[int]] = []
    plain = iter(encoder.plain([example.prompt for example in examples if isinstance(example, AnswerExample)]))
    rendered = iter(encoder.with_special([text for chat in chats.values() for text in (chat.prompt, chat.opening)]))
    texts = [chats[i].answer if i in chats else example.response for i, example in enumerate(examples)]
    for number, answer in enumerate(encoder.plain(texts)):
        if number not in chats:
            prompts.append(next(plain))
            answers.append([*answer, end])
            continue
        ending = chats[number].ending
        last = end if ending is None else token_id_of(ending, encoder.tokenizer)
        prompts.append(next(rendered))
        answers.append([*next(rendered), *answer, last])
    return prompts, answers


def _rendered(examples: Sequence[SftExample], encoder: TextEncoder) -> dict[int, RenderedChat]:
    """Return the chats among examples as text, by position, and count what spells special tokens."""
    chats: dict[int, RenderedChat] = {}
    template: ChatTemplate | None = None
    for number, example in enumerate(examples):
        if isinstance(example, AnswerExample):
            encoder.note_spelled(example.prompt, example.response)
            continue
        if template is None:
            template = ChatTemplate(encoder.tokenizer)
        encoder.note_spelled(example.response)
        chats[number] = template.render(example)
    if template is not None and template.is_dated:
        log.info("The chat template asks for today's date, and is told %s: the same command, the same data", DATE)
    return chats
