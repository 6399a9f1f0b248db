"""The embedded teacher: what a killed training leaves is gone on with, and what was trained is not trained again."""

import shutil
from pathlib import Path

import pytest
import torch

import kd.embedded_teacher
from kd.cache import cache_root
from kd.config import EmbeddedTeacherConfig, ModelConfig, PretrainConfig
from kd.embedded_teacher import load_embedded_teacher
from kd.stop import StopSignal
from kd.teacher import LiveTeacher

from .trainers.helpers import BYTES, LENGTH

FINGERPRINT = "f" * 64
SIZES = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 24}


def config(checkpoint_dir: str = "checkpoints/") -> EmbeddedTeacherConfig:
    model = ModelConfig(**SIZES, vocab_size=BYTES, max_seq_len=LENGTH)
    train = PretrainConfig(batch_size=4, max_steps=4, save_interval=2, warmup_steps=0, checkpoint_dir=checkpoint_dir)
    return EmbeddedTeacherConfig(model=model, train=train)


def load(store: Path, checkpoint_dir: str = "checkpoints/") -> LiveTeacher:
    return load_embedded_teacher(config(checkpoint_dir), FINGERPRINT, store, torch.device("cpu"), StopSignal())


@pytest.fixture
def entry(store: Path) -> Path:
    """The cache's entry of a teacher that was trained without any fault."""
    load(store)
    (directory,) = (path for path in (cache_root() / "teachers").iterdir() if path.is_dir())
    return directory


def test_an_entry_holds_what_is_needed_and_no_checkpoints(entry: Path) -> None:
    assert {path.name for path in entry.iterdir()} == {
        "config.json",
        "history.json",
        "manifest.json",
        "model.safetensors",
    }


def test_killed_while_it_removed_its_checkpoints_it_is_trained_already(
    store: Path, entry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = entry.with_name(f"{entry.name}.partial")
    entry.rename(work)
    (work / "manifest.json").unlink()
    damaged = work / "checkpoints" / "checkpoint-2"
    damaged.mkdir(parents=True)
    (damaged / "state.json").write_text("{}")  # its manifest is gone already
    monkeypatch.setattr(kd.embedded_teacher, "_train", _fail)
    load(store)
    assert {path.name for path in entry.iterdir()} >= {"model.safetensors", "manifest.json"}
    assert not (entry / "checkpoints").exists()


def test_its_training_goes_on_whatever_its_checkpoints_folder_is_called(
    store: Path, entry: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weights = (entry / "model.safetensors").read_bytes()
    shutil.rmtree(entry)
    with monkeypatch.context() as patch:
        patch.setattr(kd.embedded_teacher, "save_model_file", _fail)
        with pytest.raises(RuntimeError, match="not now"):
            load(store)
    with caplog.at_level("INFO", "kd"):
        load(store, "elsewhere/")
    assert not [line for line in caplog.messages if line.startswith("step 4/4")]  # the last checkpoint is of step 4
    assert (entry / "model.safetensors").read_bytes() == weights
    assert not [path for path in entry.iterdir() if path.is_dir()]


def _fail(*_: object) -> None:
    raise RuntimeError("not now")
