"""What is made for a run is told apart by its content, where a recipe does not determine it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kd.config import Config, ModelConfig, PretrainConfig, TeacherConfig, TextDataConfig
from kd.data import Corpus, TokenizerSource
from kd.errors import ConfigError, DataError
from kd.plan import Plan, make_plan
from kd.prepare import _place_blocks, _place_tokenizer
from kd.start import Start

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
    blocks = _place_blocks(CONFIG, corpus_of(plan), first)
    assert _place_blocks(CONFIG, corpus_of(plan), _place_tokenizer(plan, corpus_of(plan))) == blocks
    train_otherwise(first)
    second = _place_tokenizer(plan, corpus_of(plan))
    assert (second.fingerprint, second.location) == (first.fingerprint, first.location)
    assert second.content != first.content
    assert _place_blocks(CONFIG, corpus_of(plan), second) != blocks
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
