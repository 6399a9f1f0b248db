"""What identifies the embedded teacher: its recipe before it is trained, its weights afterwards."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

import kd.attempt
from kd.config import EmbeddedTeacherConfig, ModelConfig, PretrainConfig, StdlibDataConfig
from kd.data import TokenizerSource
from kd.embedded_teacher import embedded_teacher_content, embedded_teacher_directory, load_embedded_teacher
from kd.errors import DataError
from kd.files import seal_directory
from kd.plan import embedded_teacher_fingerprint
from kd.stop import StopSignal

from .commands import TINY, run, strict_json
from .trainers.helpers import BYTES, LENGTH

if TYPE_CHECKING:
    from kd.runs import Run

CPU = torch.device("cpu")
MODEL = ModelConfig(
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=24,
    vocab_size=BYTES,
    max_seq_len=LENGTH,
)
CONFIG = EmbeddedTeacherConfig(model=MODEL, train=PretrainConfig(max_steps=2, warmup_steps=1, batch_size=2))


def recipe(
    config: EmbeddedTeacherConfig = CONFIG, seq_len: int = 32, corpus: str = "corpus", tokenizer: str = "tokenizer"
) -> str:
    return embedded_teacher_fingerprint(config, StdlibDataConfig(seq_len=seq_len), corpus, tokenizer)


def test_a_recipe_holds_all_that_determines_the_weights() -> None:
    recipes = [
        recipe(),
        recipe(seq_len=64),
        recipe(corpus="another"),
        recipe(tokenizer="another"),
        recipe(replace(CONFIG, seed=1)),
        recipe(replace(CONFIG, model=replace(MODEL, num_layers=2))),
        recipe(replace(CONFIG, train=replace(CONFIG.train, max_steps=3))),
    ]
    assert len(set(recipes)) == len(recipes)
    assert recipe(replace(CONFIG, cache="off", train=replace(CONFIG.train, save_interval=7))) == recipe()


def test_a_teacher_is_trained_once_for_its_recipe_and_blocks(store: Path, tmp_path: Path) -> None:
    def directory(fingerprint: str = "a recipe", blocks: Path = store) -> Path:
        return embedded_teacher_directory(CONFIG, fingerprint, blocks, CPU, StopSignal())

    first = directory()
    assert directory() == first
    (tmp_path / "other").symlink_to(store)
    others = {directory(blocks=tmp_path / "other"), directory("another recipe")}
    assert len(others | {first}) == 3
    content = embedded_teacher_content(CONFIG, first)
    assert content == embedded_teacher_content(CONFIG, directory("another recipe"))  # the same weights
    assert content != embedded_teacher_content(replace(CONFIG, model=replace(MODEL, rope_theta=5.0)), first)
    train_otherwise(first)
    assert content != embedded_teacher_content(CONFIG, first)
    assert load_embedded_teacher(CONFIG, "a recipe", store, CPU, StopSignal()).head is not None


def train_otherwise(directory: Path) -> None:
    """Give a cached teacher other weights, as the same recipe gives on another machine."""
    weights = load_file(directory / "model.safetensors")
    save_file({name: weight * 1.25 for name, weight in weights.items()}, directory / "model.safetensors")
    seal_directory(directory)


# --- attempts at one run ------------------------------------------------------------------------------------------


CONTENTS: dict[str, str | None] = {"tokenizer": "a", "teacher": "b"}


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ({"contents": CONTENTS}, None),
        ({}, None),  # of an attempt that did not record any
        ({"contents": {**CONTENTS, "teacher": "c"}}, "begun with another teacher than"),
        ({"contents": {"tokenizer": "c", "teacher": None}}, "begun with another tokenizer and teacher than"),
    ],
)
def test_an_attempt_does_not_go_on_with_another_teacher(before: dict[str, Any], words: str | None) -> None:
    run_ = cast("Run", SimpleNamespace(directory=Path("run")))
    Path("run").mkdir()
    Path("run/environment.json").write_text(json.dumps({"inputs": before}))
    kd.attempt._refuse_others(run_, CONTENTS)  # nothing was saved yet, so nothing would be mixed
    Path("run/checkpoints/checkpoint-3").mkdir(parents=True)
    if words is None:
        kd.attempt._refuse_others(run_, CONTENTS)
        return
    with pytest.raises(DataError, match=f"{words}.*KD_CACHE.*overwrite=true"):
        kd.attempt._refuse_others(run_, CONTENTS)


def test_processes_with_caches_of_their_own_do_not_train_on_different_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kd.attempt, "told_by_first", lambda contents: {**contents, "teacher": "the first one's"})
    parts = SimpleNamespace(tokenizer=TokenizerSource("a"), teacher_content="b")
    with pytest.raises(DataError, match=r"processes of this run have different tokenizers or teachers.*KD_CACHE"):
        kd.attempt._begin(cast("Any", None), cast("Any", None), {}, cast("Any", parts))


def cached(kind: str) -> list[Path]:
    return [path for path in Path("cache", kind).iterdir() if path.is_dir()]


@pytest.mark.slow
def test_states_of_one_teacher_never_meet_the_head_of_another() -> None:
    arguments = (*TINY, "train.max_steps=null", "train.log_interval=1")
    assert run(*arguments, "teacher.cache=require", "name=first").code == 0
    (teacher,) = cached("teachers")
    train_otherwise(teacher)
    for head in cached("teacher-heads"):  # as in a cache of which a part was copied
        head.rename(Path("cache", head.name))
    histories = []
    for mode, name in (("require", "cached"), ("off", "live")):
        assert run(*arguments, f"teacher.cache={mode}", f"name={name}").code == 0
        (directory,) = (path for path in Path("outputs", name).iterdir() if path.is_dir())
        histories.append(strict_json(directory / "history.json"))
    from_cache, live = histories
    assert from_cache["train_loss"][0] == pytest.approx(live["train_loss"][0], rel=1e-6)
    assert from_cache["teacher_val_ppl"] == pytest.approx(live["teacher_val_ppl"], rel=1e-4)
    (begun,) = (path for path in Path("outputs", "first").iterdir() if path.is_dir())
    (begun / "result.json").unlink()
    outcome = run(*arguments, "teacher.cache=require", "name=first")
    assert outcome.code == 4
    assert re.search("begun with another teacher than this cache holds.*overwrite=true", outcome.errors)
