"""Which tokenizer a run uses: one identity for one tokenizer, whatever the way to it."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

import kd.teacher_files
from kd.config import Config, ExampleFilesConfig, HubTeacherConfig, ModelConfig, SFTConfig, TextDataConfig
from kd.data import Corpus, TokenizerSource, tokenizer_object_fingerprint, train_bpe
from kd.errors import ConfigError
from kd.plan import make_plan
from kd.start import Start
from kd.teacher_files import PretrainedTeacher, find_teacher
from kd.tokenizer_choice import find_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCAB = 300
NO_CORPUS = cast("Corpus", None)
"""Only a BPE that is to be trained looks at one."""
TEXTS = [f"def function_{i}(value):\n    return value + {i}\n" for i in range(50)]


@pytest.fixture(scope="module")
def bpe() -> "PreTrainedTokenizerFast":
    return train_bpe(TEXTS, VOCAB)


@pytest.fixture
def folder(bpe: "PreTrainedTokenizerFast", tmp_path: Path) -> Path:
    """A teacher's directory, as far as a plan looks at it."""
    bpe.save_pretrained(tmp_path / "teacher")
    sizes = {"model_type": "llama", "vocab_size": VOCAB, "max_position_embeddings": 64}
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(sizes))
    (tmp_path / "teacher" / "model.safetensors").write_bytes(b"not read")
    return tmp_path / "teacher"


def config_of(tokenizer: str, model_id: str = "teacher") -> Config:
    data = TextDataConfig(path="unread", tokenizer=tokenizer, seq_len=16)
    model = ModelConfig(vocab_size=VOCAB, max_seq_len=64)
    return Config(model=model, data=data, teacher=HubTeacherConfig(model_id=model_id))


def source_of(tokenizer: str, start: TokenizerSource | None = None, model_id: str = "teacher") -> TokenizerSource:
    teacher = find_teacher(HubTeacherConfig(model_id=model_id)) if tokenizer == "teacher" else None
    begun = None if start is None else Start(Path("unread"), start)
    return find_tokenizer(replace(config_of(tokenizer, model_id), init_from="run"), NO_CORPUS, teacher, begun)


# --- the Hub --------------------------------------------------------------------------------------------------------


def test_a_hub_teacher_is_the_same_in_and_out_of_reach(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "a" * 40
    snapshots = tmp_path / "hub" / "models--org--tiny" / "snapshots"
    snapshots.mkdir(parents=True)
    folder.rename(snapshots / commit)
    (tmp_path / "hub" / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "hub" / "models--org--tiny" / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    answer = SimpleNamespace(sha=commit, siblings=None)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: answer)
    found: list[tuple[PretrainedTeacher, TokenizerSource]] = []
    for reachable in (True, False):
        monkeypatch.setattr(kd.teacher_files, "hub_is_reachable", lambda answer=reachable: answer)
        # What is fetched of a model that is in the cache already is found there.
        found.append((find_teacher(HubTeacherConfig(model_id="org/tiny")), source_of("teacher", model_id="org/tiny")))
    (online, online_source), (offline, offline_source) = found
    assert online.fingerprint == offline.fingerprint
    assert online_source.fingerprint == offline_source.fingerprint == commit
    assert source_of("teacher", start=online_source, model_id="org/tiny") == offline_source


# --- what init_from had ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("before", "now"), [("teacher", "./teacher"), ("./teacher", "teacher")])
def test_the_same_tokenizer_by_another_way_is_the_same(before: str, now: str) -> None:
    earlier = source_of(before)
    assert source_of(now, earlier).fingerprint != earlier.fingerprint


def lower_case(content: dict[str, dict[str, str]]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def test_a_tokenizer_of_other_rules_is_told_apart_from_that_of_init_from(folder: Path) -> None:
    earlier = source_of("teacher")
    other = folder.with_name("other")
    os.rename(folder, other)
    content = json.loads((other / "tokenizer.json").read_text())
    lower_case(content)
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"another tokenizer.*cannot be loaded.*data\.tokenizer=init_from"):
        source_of("./other", earlier)
    os.rename(other, folder)
    changed = TokenizerSource("changed", str(folder))
    train_bpe(TEXTS, VOCAB).save_pretrained(other)
    with pytest.raises(ConfigError, match=r"another tokenizer.*they differ in their normalizer\. So use the same"):
        source_of("./other", changed)


# --- where it is ----------------------------------------------------------------------------------------------------


def test_a_path_is_kept_so_that_it_means_the_same_from_anywhere(
    folder: Path, bpe: "PreTrainedTokenizerFast", monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("./teacher", "teacher"):
        source = source_of(name)
        assert source.location == str(folder)
    by_path = source_of("./teacher")
    (folder.parent / "elsewhere").mkdir()
    monkeypatch.chdir(folder.parent / "elsewhere")
    assert source_of("../teacher").fingerprint == by_path.fingerprint == tokenizer_object_fingerprint(bpe)
    assert by_path.load().get_vocab() == bpe.get_vocab()


# --- chats ----------------------------------------------------------------------------------------------------------


def plain() -> str:
    rows = [{"prompt": f"Say {number}. ", "response": "Yes"} for number in range(9)]
    return "\n".join(json.dumps(row) for row in rows)


def chats() -> str:
    roles = [{"role": "user", "content": "Say {}."}, {"role": "assistant", "content": "Yes"}]
    rows = [[{**roles[0], "content": f"Say {number}."}, roles[1]] for number in range(9)]
    return "\n".join(json.dumps({"messages": row}) for row in rows)


@pytest.mark.parametrize(("rows", "matters"), [(plain, False), (chats, True)])
def test_a_template_is_a_part_of_a_run_where_it_renders_something(
    folder: Path, rows: Callable[[], str], matters: bool
) -> None:
    Path("rows.jsonl").write_text(rows())
    config = Config(
        model=ModelConfig(vocab_size=VOCAB, max_seq_len=64),
        train=SFTConfig(),
        data=ExampleFilesConfig(path="rows.jsonl", tokenizer="./teacher"),
        teacher=HubTeacherConfig(model_id="teacher"),
    )
    plans = []
    for template in ("{{ messages[0]['content'] }}", "User: {{ messages[0]['content'] }}"):
        (folder / "chat_template.jinja").write_text(template)
        plans.append(make_plan(config))
    assert (plans[0].identity != plans[1].identity) == matters
    assert plans[0].tokenizer == plans[1].tokenizer
