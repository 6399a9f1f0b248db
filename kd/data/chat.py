"""A chat as text, by the tokenizer's own template: the prompt, and all that is learned after it."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING

from kd.data.examples import ChatExample, Message
from kd.data.hub_access import one_line
from kd.data.special_tokens import special_pattern
from kd.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATE = date(2024, 7, 26)
"""What a template that asks for today's date is told: else one command would train on other data every day. The day is
that which Llama 3's template takes where there is no clock."""
_CLOCK = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?("[^"]*"|'[^']*')\s*\)""")
_ANY_CLOCK = re.compile(r"strftime_now\s*\(")
_SHOWN_CHARS = 60
_MARK = "The-Answer-4711"
"""Stands for an answer where only what follows it is of interest."""


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """The text of a chat, up to the end of its last answer."""

    prompt: str
    """All messages but the last, and what the template puts before an answer."""
    opening: str
    """What the template puts between prompt and answer, up to its last special token; of most, nothing."""
    answer: str
    """Without special tokens: if any are spelled out here, the answer itself has them, as plain characters."""
    ending: str | None
    """The special token that ends the turn; None if the template has none, so that the end of the text must do."""


class ChatTemplate:
    """A tokenizer's chat template, whose date stands still.

    Raises:
        DataError: if there is none, or it reads the clock in a way that cannot be held still.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        name = tokenizer.name_or_path or "this vocabulary"
        if tokenizer.chat_template is None:
            raise DataError(
                f"The tokenizer of {name} has no chat template, which `messages` need: use data.tokenizer of a chat "
                "model, or give rows with `prompt` and `response`."
            )
        self._tokenizer = tokenizer
        self._special = special_pattern(tokenizer)
        try:
            original = tokenizer.get_chat_template()
        except ValueError as error:  # of several templates, none is the usual one
            raise DataError(f"The chat template of {name} cannot be used: {one_line(error)}") from error
        self._text = _CLOCK.sub(lambda found: json.dumps(DATE.strftime(found[1][1:-1])), original)
        self.is_dated = self._text != original
        """Whether the template asks for the date, and is told `DATE`."""
        if _ANY_CLOCK.search(self._text):
            raise DataError(
                f"The chat template of {name} reads the clock (strftime_now) in a format that it computes, so that the "
                "same command would train on other data every day. Write the date, or the format, into the template."
            )

    def prompt(self, chat: ChatExample) -> str:
        """Return all messages of a chat but the last, and what the template puts before an answer.

        Raises:
            DataError: if the template refuses the messages, a message spells one of the tokenizer's special tokens,
                with which it could end its own turn, or the whole chat is not rendered with this beginning.
        """
        return self.render(chat).prompt

    def render(self, chat: ChatExample) -> RenderedChat:
        """Return a chat as text; errors as for `prompt`, or if the template alters the answer."""
        self._refuse_special_tokens(chat)
        prompt = self._render(chat, chat.context, before_answer=True)
        whole = self._render(chat, chat.messages)
        if not whole.startswith(prompt):
            raise DataError(
                f"The chat template asks for the answer of the chat that begins {_beginning(chat)!r} with another text "
                f"(...{prompt[-_SHOWN_CHARS:]!r}) than it puts before one that is given: what is learned would not be "
                "what is asked. Use a tokenizer with another template, or give rows with `prompt` and `response`."
            )
        return self._parted(chat, prompt, whole[len(prompt) :])

    def turn_end(self) -> str | None:
        """Return the special token that ends an answer, None if there is none; errors as for `prompt`."""
        probe = ChatExample((Message("user", "?"), Message("assistant", _MARK)))
        found = self._special.search(self._after_answer(probe))
        return None if found is None else found.group()

    def _parted(self, chat: ChatExample, prompt: str, rest: str) -> RenderedChat:
        """Part what follows the prompt."""
        after = self._after_answer(chat)
        response = chat.response
        spellings = (response, response.strip(), response.rstrip(), response.lstrip())
        answer = next((text for text in spellings if rest.endswith(text + after)), None)
        if answer is None:
            raise DataError(
                f"The chat template alters the answer of the chat that begins {_beginning(chat)!r}: it renders "
                f"{rest[:_SHOWN_CHARS]!r}. Write the answer as the template does, or remove the chat."
            )
        before = rest[: len(rest) - len(answer + after)]
        special = list(self._special.finditer(before))
        split = special[-1].end() if special else 0
        end = self._special.search(after)
        plain_after = after if end is None else after[: end.start()]
        text = before[split:] + answer + plain_after
        return RenderedChat(prompt, before[:split], text, None if end is None else end.group())

    def _after_answer(self, chat: ChatExample) -> str:
        """Return what the template puts after an answer in this context."""
        text = self._render(chat, (*chat.context, Message("assistant", _MARK)))
        before, mark, after = text.rpartition(_MARK)
        if not mark:
            raise DataError(
                f"The chat template leaves the answer out of the chat that begins {_beginning(chat)!r}: ...{before}"
            )
        return after

    def _render(self, chat: ChatExample, messages: Sequence[Message], *, before_answer: bool = False) -> str:
        from jinja2 import TemplateError

        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                turns, chat_template=self._text, tokenize=False, add_generation_prompt=before_answer
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise DataError(
                f"The chat template refuses the chat that begins {_beginning(chat)!r}: {one_line(error)} Mend or "
                "remove it."
            ) from error
        assert isinstance(text, str)
        return text

    def _refuse_special_tokens(self, chat: ChatExample) -> None:
        for message in chat.context:
            found = self._special.search(message.content)
            if found is not None:
                raise DataError(
                    f"A message of the chat that begins {_beginning(chat)!r} spells the special token "
                    f"{found.group()}, with which a text can end its own turn. Remove it from the message, or remove "
                    "the chat."
                )


def render_chat(chat: ChatExample, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the prompt of a chat: all messages but the last, and what the template puts before an answer.

    Raises:
        DataError: as for `ChatTemplate`.
    """
    return ChatTemplate(tokenizer).prompt(chat)


def turn_end_id(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return the id of the special token that ends an answer in the tokenizer's chats; None where there are none."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    try:
        ending = ChatTemplate(tokenizer).turn_end()
    except DataError:  # it renders no such chat: none was trained on
        return None
    return None if ending is None else token_id_of(ending, tokenizer)


def token_id_of(token: str, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the id of a special token."""
    token_id = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(token_id, int)
    return token_id


def _beginning(chat: ChatExample) -> str:
    return chat.messages[0].content[:_SHOWN_CHARS]
