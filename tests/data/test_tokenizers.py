"""Tokenizers: the BPE trained here, loading, fingerprints, and the comparison of vocabularies."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.data import (
    bpe_fingerprint,
    bpe_tokenizer_directory,
    chat_template_fingerprint,
    directory_tokenizer_fingerprint,
    end_of_text_id,
    load_tokenizer,
    num_token_ids,
    tokenizer_object_fingerprint,
    train_bpe,
    vocabulary_difference,
)
from kd.errors import DataError

from .conftest import MakeCorpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXTS = [f"def function_{i}(value):\n    return value + {i}  # \u4e2d\u6587\n" for i in range(50)]


@pytest.fixture(scope="module")
def bpe() -> "PreTrainedTokenizerFast":
    return train_bpe(TEXTS, 300)


@pytest.fixture
def saved(bpe: "PreTrainedTokenizerFast", tmp_path: Path) -> Path:
    bpe.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_training_is_deterministic(bpe: "PreTrainedTokenizerFast") -> None:
    again = train_bpe(iter(TEXTS), 300)
    assert again.get_vocab() == bpe.get_vocab()
    assert tokenizer_object_fingerprint(again) == tokenizer_object_fingerprint(bpe)
    assert len(bpe) == num_token_ids(bpe) == 300
    assert end_of_text_id(bpe) == 0


@given(text=st.text())
def test_any_text_is_encoded_without_loss(text: str, byte_tokenizer: "PreTrainedTokenizerFast") -> None:
    ids = byte_tokenizer(text, split_special_tokens=True)["input_ids"]
    assert len(ids) == len(text.encode())
    assert byte_tokenizer.decode(ids) == text


def test_too_little_text_for_the_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match=r"model\.vocab_size=4096.*model\.vocab_size=\d+"):
        train_bpe(["short"], 4096)


def test_the_bpe_of_a_corpus_sees_its_training_part_alone(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus({"train": TEXTS, "validation": ["zzzz qqqq " * 100]})
    directory = bpe_tokenizer_directory(corpus, 300)
    assert vocabulary_difference(load_tokenizer(str(directory)), train_bpe(TEXTS, 300)) is None
    assert directory.name == bpe_fingerprint(corpus, 300) != bpe_fingerprint(corpus, 301)
    assert bpe_tokenizer_directory(corpus, 300) == directory


def test_a_directory_is_identified_by_content(saved: Path, tmp_path: Path) -> None:
    before = directory_tokenizer_fingerprint(saved)
    shutil.copytree(saved, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("not a part of it")
    assert directory_tokenizer_fingerprint(tmp_path / "copy") == before
    path = tmp_path / "copy" / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    assert directory_tokenizer_fingerprint(tmp_path / "copy") != before
    with pytest.raises(DataError, match="holds no tokenizer"):
        directory_tokenizer_fingerprint(tmp_path)


def test_using_a_tokenizer_does_not_change_its_fingerprint() -> None:
    tokenizer = train_bpe(TEXTS, 300)
    before = tokenizer_object_fingerprint(tokenizer)
    tokenizer(["some text"], truncation=True, max_length=2)
    tokenizer(["some text"], split_special_tokens=True)
    assert tokenizer_object_fingerprint(tokenizer) == before
    assert tokenizer_object_fingerprint(train_bpe(TEXTS, 299)) != before


def test_vocabularies_are_compared_id_by_id(bpe: "PreTrainedTokenizerFast", saved: Path) -> None:
    assert vocabulary_difference(bpe, load_tokenizer(str(saved))) is None
    assert vocabulary_difference(bpe, train_bpe(TEXTS, 299)) == "One vocabulary has 300 tokens, the other 299."
    path = saved / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    by_id = {token_id: token for token, token_id in vocabulary.items()}
    vocabulary[by_id[40]], vocabulary[by_id[41]] = 41, 40
    path.write_text(json.dumps(content))
    difference = vocabulary_difference(bpe, load_tokenizer(str(saved)))
    assert difference is not None
    assert f"id 40 is {by_id[40]!r} and {by_id[41]!r}" in difference


def merges_swapped(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]


def with_normalizer(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "NFKC"}


def with_prefix_space(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["add_prefix_space"] = True


def with_ignored_merges(content: dict[str, Any]) -> None:
    content["model"]["ignore_merges"] = True


def with_single_word(content: dict[str, Any]) -> None:
    content["added_tokens"][0]["single_word"] = True


def with_beginning(content: dict[str, Any]) -> None:
    token = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    special = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    pair = [*[token, text], {"Sequence": {"id": "B", "type_id": 1}}]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [token, text],
        "pair": pair,
        "special_tokens": special,
    }


def with_other_offsets(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["trim_offsets"] = not content["pre_tokenizer"]["trim_offsets"]


def with_empty_prefix(content: dict[str, Any]) -> None:
    content["model"]["continuing_subword_prefix"] = ""


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (merges_swapped, "merges"),
        (with_normalizer, "normalizer"),
        (with_prefix_space, "pre_tokenizer"),
        (with_ignored_merges, "model"),
        (with_single_word, "added_tokens"),
        (with_beginning, None),
        (with_other_offsets, None),
        (with_empty_prefix, None),
    ],
)
def test_what_cuts_text_in_another_way_is_a_difference(
    bpe: "PreTrainedTokenizerFast", saved: Path, change: Callable[[dict[str, Any]], None], part: str | None
) -> None:
    path = saved / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    difference = vocabulary_difference(bpe, load_tokenizer(str(saved)))
    assert (difference is None) == (part is None)
    assert part is None or f"they differ in their {part}." in str(difference)


def test_scores_of_a_unigram_model_decide_how_text_is_cut() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    first, second = (
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", -1.0), ("aa", score)], None, False)))
        for score in (-1.5, -3.0)
    )
    assert first.encode("aaaa") != second.encode("aaaa")
    assert "their scores" in str(vocabulary_difference(first, second))
    assert vocabulary_difference(first, first) is None


def test_templates_and_the_tokens_that_they_name_identify_what_renders_chats(saved: Path) -> None:
    prints = [chat_template_fingerprint(load_tokenizer(str(saved)))]
    (saved / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0]['content'] }}")
    prints.append(chat_template_fingerprint(load_tokenizer(str(saved))))
    (saved / "additional_chat_templates").mkdir()
    (saved / "additional_chat_templates" / "tools.jinja").write_text("another")
    prints.append(chat_template_fingerprint(load_tokenizer(str(saved))))
    config = json.loads((saved / "tokenizer_config.json").read_text())
    (saved / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "a"}))
    prints.append(chat_template_fingerprint(load_tokenizer(str(saved))))
    assert len(set(prints)) == 4
    assert chat_template_fingerprint(load_tokenizer(str(saved))) == prints[-1]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("folder/bpe", "hf download folder/bpe"),
        ("./folder/bpe", "./folder/bpe is no directory"),
        ("some/folder/bpe", "some/folder/bpe is no directory"),
    ],
)
def test_a_relative_path_is_said_to_count_from_the_working_directory(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(DataError, match="a relative path counts from the working directory") as caught:
        load_tokenizer(name)
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert ("hf download" in str(caught.value)) == ("hf download" in words)


@pytest.mark.parametrize("content", [None, "{not json", '{"version": "1.0"}'])
def test_a_directory_without_a_whole_tokenizer_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer of .* cannot be loaded") as caught:
        load_tokenizer(str(tmp_path))
    assert caught.value.exit_code == 4


def test_a_tokenizer_without_end_of_text_is_refused(saved: Path) -> None:
    config = json.loads((saved / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (saved / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="no end-of-text token"):
        end_of_text_id(load_tokenizer(str(saved)))


def test_a_tokenizer_out_of_reach_says_how_to_fetch_it(tmp_path: Path) -> None:
    script = (
        "from kd.data import load_tokenizer; from kd.errors import DataError\n"
        "try: load_tokenizer('Qwen/Qwen2.5-0.5B')\n"
        "except DataError as error: print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    environment["HF_HOME"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True, timeout=60
    )
    assert "hf download Qwen/Qwen2.5-0.5B" in done.stdout
    assert len(done.stdout.splitlines()) == 1
