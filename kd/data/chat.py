"""A chat as the text of a prompt, by the tokenizer's own template."""

from typing import TYPE_CHECKING

from kd.data.examples import ChatExample
from kd.data.hub_access import one_line
from kd.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SHOWN_CHARS = 60


def render_chat(chat: ChatExample, tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return the prompt of a chat: all messages but the last, and what the template puts before an answer.

    Raises:
        DataError: if the tokenizer has no chat template, the template refuses the messages, or a message spells one
            of the tokenizer's special tokens, with which it could end its own turn.
    """
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise DataError(
            f"The tokenizer of {tokenizer.name_or_path or 'this vocabulary'} has no chat template, which `messages` "
            "need: use data.tokenizer of a chat model, or give rows with `prompt` and `response`."
        )
    _refuse_special_tokens(chat, tokenizer)
    messages = [{"role": message.role, "content": message.content} for message in chat.context]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError) as error:
        raise DataError(
            f"The chat template refuses the chat that begins {_beginning(chat)!r}: {one_line(error)} Mend or remove it."
        ) from error
    assert isinstance(text, str)
    return text


def _refuse_special_tokens(chat: ChatExample, tokenizer: "PreTrainedTokenizerFast") -> None:
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for message in chat.context:
        found = next((token for token in special if token in message.content), None)
        if found is not None:
            raise DataError(
                f"A message of the chat that begins {_beginning(chat)!r} spells the special token {found}, with which "
                "a text can end its own turn. Remove it from the message, or remove the chat."
            )


def _beginning(chat: ChatExample) -> str:
    return chat.messages[0].content[:_SHOWN_CHARS]
