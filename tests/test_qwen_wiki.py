"""The specified experiment with teacher and data in local directories of the Hub's formats."""

from pathlib import Path

import numpy as np
import pytest

from tests.commands import only_run, run, strict_json
from tests.qwen import VOCAB_SIZE, save_teacher, save_wikipedia

SMALL_STUDENT = (
    "model.hidden_size=16",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.intermediate_size=32",
    "data.seq_len=64",
    "train.batch_size=2",
    "data.max_eval_blocks=8",
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hub")
    save_teacher(directory / "Qwen2.5-0.5B")
    save_wikipedia(directory / "wikipedia")
    return directory


def experiment(hub: Path, *more: str) -> tuple[str, ...]:
    paths = (f"teacher.model_id={hub / 'Qwen2.5-0.5B'}", f"data.path={hub / 'wikipedia'}")
    return ("experiment=qwen_wiki_zh", *paths, "train.max_steps=3", "threads=1", *more)


def check_run(steps: int) -> None:
    directory = only_run("qwen_wiki_zh")
    history = strict_json(directory / "history.json")
    assert history["train_step"] == [steps]
    assert history["train_loss"][0] == pytest.approx(np.log(VOCAB_SIZE) / 2, rel=0.15)  # half of it is the KL
    assert history["teacher_val_ppl"] > 1000
    blocks = np.load(directory / "val_blocks.npy", allow_pickle=False)
    assert blocks["nll"].sum() / blocks["tokens"].sum() == pytest.approx(history["val_loss"][-1])


def test_three_steps_with_a_small_student(hub: Path) -> None:
    outcome = run(*experiment(hub, *SMALL_STUDENT))
    assert outcome.code == 0, outcome.errors
    check_run(3)


@pytest.mark.slow
def test_three_steps_with_the_specified_student(hub: Path) -> None:
    # A batch of 8 needs more than 20 GB through plain logits.
    outcome = run(*experiment(hub, "train.batch_size=1", "threads=2"), timeout=550)
    assert outcome.code == 0, outcome.errors
    check_run(3)
    assert strict_json(only_run("qwen_wiki_zh") / "history.json")["parameters"] > 115_000_000


def test_a_wrong_vocabulary_size_is_refused_before_any_weights(hub: Path) -> None:
    outcome = run(*experiment(hub, "model.vocab_size=152064"))
    assert outcome.code == 2
    assert "model.vocab_size=152064" in outcome.errors
    assert "151936" in outcome.errors
    assert not Path("outputs").exists()
    assert not Path("cache").exists()


def test_the_same_size_with_permuted_ids_is_refused(hub: Path, tmp_path: Path) -> None:
    permuted = tmp_path / "permuted"
    save_permuted_tokenizer(hub / "Qwen2.5-0.5B", permuted)
    outcome = run(*experiment(hub, *SMALL_STUDENT, f"data.tokenizer={permuted}"))
    assert outcome.code == 2, outcome.errors
    assert "data.tokenizer=" in outcome.errors
    assert "Set data.tokenizer=teacher" in outcome.errors
    assert "Traceback" not in outcome.errors
    assert not Path("outputs").exists()


def save_permuted_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer, exchanging the ids of two tokens."""
    target.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = (source / name).read_text(encoding="utf-8")
        if name == "tokenizer.json":
            first, second = '"!": 0,', '"\\"": 1,'
            assert first in content
            assert second in content
            content = content.replace(first, '"!": 1,').replace(second, '"\\"": 0,')
        (target / name).write_text(content, encoding="utf-8")


def test_offline_names_the_model_and_the_command() -> None:
    outcome = run("experiment=qwen_wiki_zh", HF_HUB_OFFLINE="1", timeout=10, HF_HOME=str(Path("no-hub").absolute()))
    assert outcome.code == 4
    assert "hf download Qwen/Qwen2.5-0.5B" in outcome.errors
    assert "Traceback" not in outcome.errors
    assert not Path("outputs").exists()
