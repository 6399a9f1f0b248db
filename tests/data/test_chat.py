"""Chats by the tokenizer's template: what is asked begins what is shown, and the turn's end is learned."""

import logging
from typing import TYPE_CHECKING

import pytest
import torch

from kd.config import ModelConfig
from kd.data import AnswerExample, ChatExample, Message, encode_answers, render_chat
from kd.data.chat import ChatTemplate, turn_end_id
from kd.data.tokenizers import train_bpe
from kd.errors import DataError
from kd.generation import GenerationConfig, TextGenerator
from kd.losses import IGNORE_INDEX
from kd.model import StudentModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
END_OF_TEXT, TURN_END = "<|endoftext|>", "<|im_end|>"


def make_tokenizer(template: str, **special: str) -> "PreTrainedTokenizerFast":
    tokenizer = train_bpe(["any text"], 257)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", TURN_END], **special})
    tokenizer.chat_template = template
    return tokenizer


def chat(*contents: str) -> ChatExample:
    roles = ["user", "assistant"] * len(contents)
    return ChatExample(tuple(Message(role, content) for role, content in zip(roles, contents, strict=False)))


def asked_and_learned(tokenizer: "PreTrainedTokenizerFast", example: ChatExample) -> tuple[str, str]:
    """The texts of the tokens that carry no loss, and of those that do."""
    batch = encode_answers([example], tokenizer, 256)[[0]]
    labels = batch["labels"][0]
    learned = labels[labels != IGNORE_INDEX].tolist()
    tokens = batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist()
    return str(tokenizer.decode(tokens[: len(tokens) + 1 - len(learned)])), str(tokenizer.decode(learned))


THINKING = (
    TURNS.replace("{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}<t></t>{% endif %}{{ m.content }}")
    + ASK
)
LEARNED = {
    "another end of text": (TURNS + ASK, "<|im_start|>assistant\n", f" Ho {TURN_END}"),
    "no word before the answer": (TURNS, f"Hi{TURN_END}\n", f"<|im_start|>assistant\n Ho {TURN_END}"),
    "a trimmed answer": ((TURNS + ASK).replace("m.content", "m.content | trim"), "assistant\n", f"Ho{TURN_END}"),
    "something before the answer": (THINKING, "<|im_start|>assistant\n", f"<t></t> Ho {TURN_END}"),
    "the end of text": ((TURNS + ASK).replace(TURN_END, "{{ eos_token }}"), "assistant\n", f" Ho {END_OF_TEXT}"),
    "no special token": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        "user: Hi\nassistant:",
        f"  Ho \n{END_OF_TEXT}",
    ),
}


@pytest.mark.parametrize("case", LEARNED)
def test_all_that_follows_the_prompt_is_learned_up_to_the_turns_end(case: str) -> None:
    template, end_of_prompt, expected = LEARNED[case]
    tokenizer = make_tokenizer(template)
    example = chat("Hi", " Ho ")
    asked, learned = asked_and_learned(tokenizer, example)
    assert learned == expected
    assert asked.endswith(end_of_prompt)
    assert asked == render_chat(example, tokenizer)
    messages = [{"role": message.role, "content": message.content} for message in example.messages]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert isinstance(whole, str)
    assert whole.startswith((asked + learned).removesuffix(END_OF_TEXT if case == "no special token" else ""))


def test_an_answer_of_any_text_is_learned_as_it_is() -> None:
    tokenizer = make_tokenizer(TURNS + ASK)
    for answer in ("i", "The-Answer-4711", "\n", "end<|im_end|>", "{{ eos_token }}"):
        example = chat("Hi", "Ho", "?", answer + "x")
        batch = encode_answers([example], tokenizer, 256)[[0]]
        learned = batch["labels"][0][batch["labels"][0] != IGNORE_INDEX].tolist()
        assert tokenizer.decode(learned) == f"{answer}x{TURN_END}"
        assert learned.count(tokenizer.convert_tokens_to_ids(TURN_END)) == 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            TURNS + ASK.replace("assistant\n", "assistant\n<t>"),
            r"begins 'Hi' with another text \(\.\.\..*<t>'\) than it",
        ),
        ((TURNS + ASK).replace("m.content", "m.content | upper"), "alters the answer|leaves the answer out"),
        ((TURNS + ASK).replace("m.content", "m.content | replace('o', '0')"), r"alters the answer .* renders ' H0"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves the answer out of the chat that begins 'Hi'"),
    ],
)
def test_a_template_that_asks_for_something_else_than_it_shows_is_refused(template: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        encode_answers([chat("Hi", " Ho ")], make_tokenizer(template), 256)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("call", ["strftime_now('%d %b %Y')", 'strftime_now( format="%d %b %Y" )'])
def test_a_templates_date_stands_still(call: str, caplog: pytest.LogCaptureFixture) -> None:
    dated = "{% if strftime_now is defined %}{{ " + call + " }}{% else %}never{% endif %}\n"
    tokenizer = make_tokenizer(dated + TURNS + ASK)
    with caplog.at_level(logging.INFO):
        asked, _ = asked_and_learned(tokenizer, chat("Hi", "Ho"))
    assert asked.startswith("26 Jul 2024<|im_start|>user")
    assert "told 2024-07-26" in caplog.text


def test_a_clock_that_cannot_be_held_is_refused() -> None:
    tokenizer = make_tokenizer("{% set f = '%d' %}{{ strftime_now(f) }}" + TURNS + ASK)
    with pytest.raises(DataError, match=r"reads the clock \(strftime_now\)"):
        encode_answers([chat("Hi", "Ho")], tokenizer, 256)
    assert turn_end_id(tokenizer) is None


def test_a_template_among_several_is_the_usual_one() -> None:
    tokenizer = make_tokenizer(TURNS + ASK)
    tokenizer.chat_template = {"default": TURNS + ASK, "other": "x"}  # type: ignore[assignment]
    assert ChatTemplate(tokenizer).turn_end() == TURN_END
    tokenizer.chat_template = {"one": TURNS, "other": "x"}  # type: ignore[assignment]
    with pytest.raises(DataError, match="cannot be used"):
        ChatTemplate(tokenizer)


# --- generation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "end"),
    [(TURNS + ASK, TURN_END), (TURNS.replace(TURN_END, "</s>"), None), ("{{ raise_exception('no') }}", None)],
)
def test_the_turns_end_is_known_from_the_template(template: str, end: str | None) -> None:
    tokenizer = make_tokenizer(template)
    expected = None if end is None else tokenizer.convert_tokens_to_ids(end)
    assert turn_end_id(tokenizer) == expected
    tokenizer.chat_template = None
    assert turn_end_id(tokenizer) is None


def test_what_was_learned_as_a_turns_end_ends_the_answer() -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer(TURNS + ASK)
    model = StudentModel(ModelConfig(32, 1, 2, 1, intermediate_size=32, vocab_size=259, max_seq_len=64))
    end = tokenizer.convert_tokens_to_ids(TURN_END)
    with torch.no_grad():
        model.embedding.weight[end] *= 40  # so that it is soon the likeliest
    generator = TextGenerator(model, tokenizer)
    sampled = GenerationConfig("sample", max_new_tokens=40)
    assert len(generator.generate_ids(torch.tensor([[5, 6]]), sampled)) < 40
    rollout = generator.rollout(torch.tensor([[5, 6]] * 4), torch.ones(4, 2), sampled)
    ended = [row[mask].tolist() for row, mask in zip(rollout.responses, rollout.mask, strict=True)]
    assert any(row[-1] == end for row in ended)
    assert all(end not in row[:-1] for row in ended)
    assert all(end not in row for row in generator.generate_batch_ids([[5, 6]] * 4, sampled))


def test_a_prompt_is_encoded_as_in_training() -> None:
    from tokenizers.processors import TemplateProcessing

    torch.manual_seed(0)
    tokenizer = make_tokenizer(TURNS + ASK, bos_token="<s>")
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<s>", END_OF_TEXT)}
    single = f"<s> $A {END_OF_TEXT}"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=list(ids.items()))
    assert tokenizer("ab")["input_ids"][0] == ids["<s>"]
    trained = encode_answers([AnswerExample("1 + 1 =", " 2")], tokenizer, 64).prompt(0).tolist()
    model = StudentModel(ModelConfig(32, 1, 2, 1, intermediate_size=32, vocab_size=260, max_seq_len=64))
    generator = TextGenerator(model, tokenizer)
    generator.end_ids = frozenset()
    seen: list[int] = []
    model.embedding.register_forward_hook(lambda _, inputs, __: seen.extend(inputs[0][0].tolist()))
    generator.generate("1 + 1 =", GenerationConfig(max_new_tokens=1))
    assert seen == trained
    asked = render_chat(chat("Hi", "Ho"), tokenizer)
    seen.clear()
    generator.generate(asked, GenerationConfig(max_new_tokens=1))
    assert seen == encode_answers([chat("Hi", "Ho")], tokenizer, 64).prompt(0).tolist()
