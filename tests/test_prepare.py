"""What is made for a run is told apart by its content, where a recipe does not determine it."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kd.config import (
    Config,
    ExampleFilesConfig,
    ModelConfig,
    PretrainConfig,
    SFTConfig,
    TeacherConfig,
    TextDataConfig,
    TrainingConfig,
)
from kd.data import Corpus, TokenizerSource, num_token_ids, train_bpe
from kd.errors import ConfigError, DataError
from kd.plan import Plan, make_plan
from kd.prepare import _place_blocks, _place_tokenizer, build_parts
from kd.start import Start
from kd.stop import StopSignal
from kd.teacher_files import PretrainedTeacher

VOCAB = 270
CONFIG = Config(
    model=ModelConfig(vocab_size=VOCAB, max_seq_len=64),
    train=PretrainConfig(),
    data=TextDataConfig(path="text", tokenizer="bpe", seq_len=16, val_ratio=0.3),
    teacher=TeacherConfig(),
)


@pytest.fixture
def plan() -> Plan:
    Path("text").mkdir()
    for number in range(9):
        Path(f"text/{number}.txt").write_text(f"some words, and the number {number}, and the words again\n" * 9)
    return make_plan(CONFIG)


def corpus_of(plan: Plan) -> Corpus:
    assert isinstance(plan.data, Corpus)
    return plan.data


def train_otherwise(source: TokenizerSource) -> None:
    """Give a cached BPE other merges, as the same recipe may give with another version of the library."""
    assert source.location is not None
    path = Path(source.location, "tokenizer.json")
    content = json.loads(path.read_text())
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False))
    manifest = path.with_name("manifest.json")
    sizes = json.loads(manifest.read_text())
    sizes["files"]["tokenizer.json"]["bytes"] = path.stat().st_size
    manifest.write_text(json.dumps(sizes))


def test_blocks_are_those_of_the_tokens_and_not_of_the_recipe(plan: Plan) -> None:
    first = _place_tokenizer(plan, corpus_of(plan))
    blocks = _place_blocks(plan, corpus_of(plan), first)
    assert _place_blocks(plan, corpus_of(plan), _place_tokenizer(plan, corpus_of(plan))) == blocks
    train_otherwise(first)
    second = _place_tokenizer(plan, corpus_of(plan))
    assert (second.fingerprint, second.location) == (first.fingerprint, first.location)
    assert second.content != first.content
    assert _place_blocks(plan, corpus_of(plan), second) != blocks
    with pytest.raises(DataError, match="another than the one that was used"):
        first.load()


def test_init_from_goes_on_with_its_own_tokens_alone(plan: Plan) -> None:
    source = _place_tokenizer(plan, corpus_of(plan))
    begun = replace(plan, start=Start(Path("unread"), source))
    assert _place_tokenizer(begun, corpus_of(plan)) == source
    older = replace(plan, start=Start(Path("unread"), replace(source, content=None)))
    assert _place_tokenizer(older, corpus_of(plan)) == source
    train_otherwise(source)
    with pytest.raises(ConfigError, match=r"another BPE than the one in .*data\.tokenizer=init_from"):
        _place_tokenizer(begun, corpus_of(plan))


# --- a tokenizer with more tokens than the model has rows ----------------------------------------------------------


@pytest.fixture
def larger() -> str:
    """A folder with a tokenizer of one token more, which text can hold."""
    tokenizer = train_bpe(["some words, and the words again"] * 9, VOCAB)
    tokenizer.add_tokens(["<extra>"])
    assert num_token_ids(tokenizer) == VOCAB + 1
    tokenizer.save_pretrained("larger")
    return "./larger"


def plan_of(tokenizer: str, text: str, **parts: Any) -> Plan:
    Path("text").mkdir(exist_ok=True)
    for number in range(9):
        Path(f"text/{number}.txt").write_text(f"some words, and the number {number}, and the words again\n" * 9)
    Path("text/9.txt").write_text(text * 50)
    plan = make_plan(replace(CONFIG, data=replace(CONFIG.data, tokenizer=tokenizer)))
    return replace(plan, **parts)


def test_tokens_that_never_occur_need_no_row(larger: str) -> None:
    assert build_parts(plan_of(larger, "words"), StopSignal()).train_loader.dataset is not None


TEACHER = PretrainedTeacher("teacher", None, None, "auto", "a", VOCAB, None)
START = Start(Path("unread"), TokenizerSource("a"))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({}, "set model.vocab_size=271 or more"),
        ({"start": START}, "the model of init_from=None has no row for it"),
        ({"teacher": TEACHER, "config": replace(CONFIG, train=TrainingConfig(alpha=0))}, "the teacher has no logit"),
    ],
)
def test_a_token_that_occurs_and_has_no_row_is_named(larger: str, parts: dict[str, Any], words: str) -> None:
    if "config" in parts:
        parts = parts | {"config": replace(parts["config"], data=replace(CONFIG.data, tokenizer=larger))}
    plan = plan_of(larger, "words <extra> ", **parts)
    with pytest.raises(ConfigError, match=rf"model\.vocab_size=270.*271 tokens.* the id 270: {words}"):
        build_parts(plan, StopSignal())


def test_an_end_of_text_token_without_a_row_is_refused_before_anything_is_encoded(larger: str) -> None:
    settings = json.loads(Path(larger, "tokenizer_config.json").read_text())
    Path(larger, "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<extra>"}))
    with pytest.raises(ConfigError, match="id 270"):
        build_parts(plan_of(larger, "words"), StopSignal())
    assert not Path("cache", "blocks").exists()


@pytest.mark.parametrize(("response", "is_fine"), [("Yes", True), ("<extra>", False)])
def test_the_same_holds_for_examples(larger: str, response: str, is_fine: bool) -> None:
    rows = [{"prompt": f"Say {number}. ", "response": response} for number in range(60)]
    Path("rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    config = Config(
        model=CONFIG.model,
        train=SFTConfig(batch_size=2),
        data=ExampleFilesConfig(path="rows.jsonl", tokenizer=larger),
        teacher=TeacherConfig(),
    )
    with nullcontext() if is_fine else pytest.raises(ConfigError, match=r"id 270: set model\.vocab_size=271"):
        build_parts(make_plan(config), StopSignal())
