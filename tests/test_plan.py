"""What is refused from the plan alone comes without torch, and leaves nothing behind."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

from kd.composition import register_schemas
from kd.files import publish_directory
from tests.commands import run_and_list


def nothing() -> None:
    """Most refusals need no files."""


def a_short_text() -> None:
    Path("text").mkdir()
    for number in range(3):
        Path(f"text/{number}.txt").write_text("A few words.")


def a_file_for_outputs() -> None:
    Path("outputs").write_text("mine")


def a_teacher(**config: object) -> None:
    Path("teacher").mkdir()
    values = {"model_type": "llama", "vocab_size": 300, "max_position_embeddings": 64, **config}
    Path("teacher/config.json").write_text(json.dumps(values))
    Path("teacher/model.safetensors").write_bytes(b"not read")
    Path("teacher/tokenizer.json").write_text("{}")


def a_nested_teacher() -> None:
    a_teacher(vocab_size=7, text_config={"vocab_size": 301, "max_position_embeddings": 64})


def a_teacher_by_other_names() -> None:
    a_teacher(model_type="gpt2", max_position_embeddings=None, n_positions=48)


def a_broken_gguf() -> None:
    Path("teacher").mkdir()
    Path("teacher/a.gguf").write_bytes(b"GGUF\x03")


def a_run_without_checkpoints() -> None:
    Path("run").mkdir()
    Path("run/environment.json").write_text("{}")


def a_run(name: str = "run", **model: object) -> None:
    """A finished run as far as a plan looks at it."""
    checkpoint = Path(name, "checkpoints/checkpoint-3")
    with publish_directory(checkpoint) as work:
        (work / "model.safetensors").write_bytes(b"not read")
    shape = {"hidden_size": 96, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 256}
    rest = {"vocab_size": 4096, "max_seq_len": 64, "rope_theta": 10000.0, "norm_eps": 1e-6, "dropout": 0.5}
    tokenizer = {"fingerprint": "f", "location": "nowhere", "revision": None, "gguf_file": None}
    record = {"identity": {"model": {**shape, **rest, **model}}, "inputs": {"tokenizer": tokenizer}}
    Path(name, "environment.json").write_text(json.dumps(record))


def a_wider_run() -> None:
    a_run(hidden_size=128, num_layers=3)


def two_runs() -> None:
    a_run("run-a")
    a_run("run-b")


def a_run_and_answers() -> None:
    a_run()
    rows = [{"prompt": str(n), "answer": "N/A" if n == 7 else str(n)} for n in range(20)]
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


ANSWERS = ("train=grpo", "train.reward=exact_answer", "data=examples", "data.path=answers.jsonl", "init_from=run")
TEACHER = ("teacher=local", "teacher.path=teacher")
REFUSALS: dict[tuple[str, ...], tuple[Callable[[], None], int, str]] = {
    ("train.alpha=2",): (nothing, 2, "train.alpha=2"),
    ("data=text", "data.path=missing"): (nothing, 4, "data.path=missing"),
    ("data=text", "data.path=text"): (a_short_text, 4, "data.seq_len=128"),
    (): (a_file_for_outputs, 7, "move it away"),
    ("init_from=missing",): (nothing, 4, "missing"),
    ("init_from=run", "seed=2"): (a_run_without_checkpoints, 4, "no checkpoint"),
    ("init_from=run", "model.max_seq_len=128"): (a_run, 2, "init_from=run was trained with another tokenizer"),
    ("init_from=run",): (a_wider_run, 2, "Add: model.hidden_size=128 model.num_layers=3"),
    ("init_from=run-*",): (two_runs, 2, "init_from=run-* fits 2 runs"),
    ("init_from=run-*", "seed=1"): (nothing, 4, "init_from=run-* does not exist"),
    ("train=sft", "init_from=run"): (a_run, 2, "data=instructions"),
    ("train=sft", "data=instructions"): (nothing, 2, "init_from=RUN"),
    ("train=grpo", "data=examples", "data.path=missing", "init_from=run"): (a_run, 4, "data.path=missing"),
    ANSWERS: (a_run_and_answers, 4, "answers.jsonl, line 8: The reference answer 'N/A' is not a number"),
    TEACHER: (nothing, 4, "teacher.path=teacher"),
    (*TEACHER, "model.vocab_size=299"): (a_teacher, 2, "set model.vocab_size=300"),
    (*TEACHER, "model.vocab_size=300"): (a_teacher, 2, "set data.seq_len=64"),
    (*TEACHER, "model.vocab_size=300", "data.seq_len=64"): (a_teacher_by_other_names, 2, "set data.seq_len=48"),
    (*TEACHER, "model.vocab_size=7"): (a_nested_teacher, 2, "set model.vocab_size=301"),
    (*TEACHER, "model.vocab_size=300", "data.seq_len=32", "data.tokenizer=bpe"): (a_teacher, 2, "data.tokenizer=bpe"),
    (*TEACHER, "teacher.gguf_file=b.gguf"): (a_broken_gguf, 4, "GGUF files there: a.gguf"),
    (*TEACHER, "teacher.gguf_file=a.gguf"): (a_broken_gguf, 4, "a.gguf"),
}


@pytest.mark.parametrize("overrides", REFUSALS, ids=" ".join)
def test_a_refusal_does_not_wait_for_torch(overrides: tuple[str, ...]) -> None:
    prepare, code, named = REFUSALS[overrides]
    prepare()
    before = sorted(Path().rglob("*"))
    outcome, imported = run_and_list(*overrides)
    assert outcome.code == code, outcome.errors
    assert named in outcome.errors
    assert imported == []
    assert sorted(Path().rglob("*")) == before


def test_the_config_store_is_not_copied_but_what_comes_out_of_it_is() -> None:
    register_schemas()
    store = ConfigStore.instance()
    assert copy.deepcopy(store).repo is store.repo
    first = store.load("schema/train_distillation.yaml").node
    first.alpha = 0.125
    assert store.load("schema/train_distillation.yaml").node.alpha == 0.5
