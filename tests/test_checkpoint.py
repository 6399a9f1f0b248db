"""Checkpoints give back every bit that was saved, hold no pickle, and a damaged or foreign one is refused."""

import json
import logging
import math
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd.checkpoint import (
    STATE_FILE,
    STATE_TENSORS,
    load_model_file,
    load_state,
    load_weights,
    save_checkpoint,
    save_model_file,
)
from kd.checkpoint_files import MODEL_FILE, checkpoint_folders, find_checkpoint, latest_checkpoint
from kd.config import ModelConfig
from kd.errors import IntegrityError
from kd.files import seal_directory
from kd.model import StudentModel
from kd.optim import configure_optimizer, create_schedule

SIZES = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 24}


def make_student(seed: int = 0, **changes: int) -> StudentModel:
    torch.manual_seed(seed)
    sizes = {**SIZES, "vocab_size": 31, "max_seq_len": 8, **changes}
    return StudentModel(ModelConfig(**sizes))


def train_steps(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, count: int) -> None:
    """Take a few optimizer steps on fixed tokens."""
    tokens = torch.arange(16).view(2, 8)
    for _ in range(count):
        model(tokens).float().square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def assert_same(a: Any, b: Any) -> None:
    """Compare nested values bit by bit, tensors with their dtype; lists and tuples count as the same."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert (
            a.contiguous().view(-1).numpy(force=True).tobytes() == b.contiguous().view(-1).numpy(force=True).tobytes()
        )
    elif isinstance(a, dict):
        assert list(a) == list(b)
        assert [type(key) for key in a] == [type(key) for key in b]
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    else:
        assert (type(a), a) == (type(b), b)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "checkpoint-1", make_student(), {"step": 1, "moments": torch.ones(3)})
    return tmp_path / "checkpoint-1"


# --- round trip -------------------------------------------------------------------------------------------------


def test_model_optimizer_and_scheduler_come_back_bit_by_bit(tmp_path: Path) -> None:
    model = make_student()
    optimizer = configure_optimizer(model, lr=1e-2)
    schedule = create_schedule("cosine", optimizer, 2, 10)
    train_steps(model, optimizer, schedule, 3)
    state = {"optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict()}
    save_checkpoint(tmp_path / "checkpoint-3", model, state)

    other = make_student(seed=1)
    other_optimizer = configure_optimizer(other, lr=1e-3)
    other_schedule = create_schedule("cosine", other_optimizer, 2, 10)
    load_weights(tmp_path / "checkpoint-3", other)
    loaded = load_state(tmp_path / "checkpoint-3")
    other_optimizer.load_state_dict(loaded["optimizer"])
    other_schedule.load_state_dict(loaded["scheduler"])
    assert_same(dict(model.state_dict()), dict(other.state_dict()))
    assert_same(optimizer.state_dict(), other_optimizer.state_dict())

    train_steps(model, optimizer, schedule, 2)
    train_steps(other, other_optimizer, other_schedule, 2)
    assert_same(dict(model.state_dict()), dict(other.state_dict()))


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = make_student()
    save_model_file(tmp_path / MODEL_FILE, model)
    stored = load_file(tmp_path / MODEL_FILE)
    assert sum(tensor.numel() for tensor in stored.values()) == sum(p.numel() for p in model.parameters())
    other = make_student(seed=1)
    load_model_file(tmp_path / MODEL_FILE, other)
    assert other.lm_head.weight is other.embedding.weight
    assert_same(model.embedding.weight.detach(), other.lm_head.weight.detach())


STATE: dict[str, Any] = {
    "integer keys": {0: {"step": 3, "moments": torch.randn(3)}, 7: {"step": 4}, -1: None},
    "text keys that look like numbers": {"0": 1, "1": 2},
    "numbers": [0, 1, -(2**70), 0.1, -0.0, 5e-324, 1.7976931348623157e308, True, False],
    "texts": ["", "\u6587\u7ae0", 'a"b\\c/d', "tensor"],
    "nothing": None,
    "empty": [{}, [], {"x": {}}],
    "names that mean something inside": {"tensor": 1, "dict": [1], "list": {"list": 2}},
    "a/b": {"c": torch.tensor(1.0)},
    "a": {"b/c": torch.tensor(2.0)},
    "keys of two types": {0: torch.tensor(3.0), "0": torch.tensor(4.0)},
    "dtypes": [
        torch.tensor([1.5, -2.0]).bfloat16(),
        torch.tensor([math.nan, math.inf, -0.0]).double(),
        torch.tensor([2**62, -1]),
        torch.tensor([True, False]),
        torch.tensor(7, dtype=torch.uint8),
        torch.zeros(0, 3),
        torch.arange(6.0).view(2, 3).t(),
    ],
}


def test_nested_state_comes_back_with_its_types(tmp_path: Path) -> None:
    whole = torch.arange(10.0)
    state = {**STATE, "views of one memory": [whole, whole[2:5], whole]}
    with_floats = {key: value for key, value in state.items() if key != "dtypes"}
    save_checkpoint(tmp_path / "c", make_student(), with_floats)
    assert_same(with_floats, load_state(tmp_path / "c"))


@pytest.mark.parametrize("tensor", STATE["dtypes"], ids=lambda tensor: str(tensor.dtype))
def test_tensors_of_all_kinds_come_back(tmp_path: Path, tensor: Tensor) -> None:
    save_checkpoint(tmp_path / "c", make_student(), {"x": tensor})
    back = load_state(tmp_path / "c")["x"]
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert torch.equal(back.nan_to_num(nan=9.0), tensor.nan_to_num(nan=9.0))


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", 1j], ids=lambda value: type(value).__name__)
def test_what_cannot_be_held_is_refused_by_its_place(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match=f"deep/0.*{type(value).__name__}"):
        save_checkpoint(tmp_path / "c", make_student(), {"deep": [value]})
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_holds_no_pickle(checkpoint: Path) -> None:
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {MODEL_FILE, STATE_TENSORS, STATE_FILE, "manifest.json"}
    for path in checkpoint.iterdir():
        assert not zipfile.is_zipfile(path)
        data = path.read_bytes()
        text = data if path.suffix == ".json" else data[8 : 8 + int.from_bytes(data[:8], "little")]
        assert isinstance(json.loads(text), dict)  # a safetensors file begins with the length of a JSON header


def test_saving_again_replaces_the_checkpoint(checkpoint: Path) -> None:
    save_checkpoint(checkpoint, make_student(seed=5), {"step": 2})
    assert load_state(checkpoint) == {"step": 2}
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


# --- damage -----------------------------------------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    """Remove, truncate or alter a file."""
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("name", [MODEL_FILE, STATE_TENSORS, STATE_FILE, "manifest.json"])
@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
def test_damage_to_any_file_is_found_by_both_readers(checkpoint: Path, name: str, how: str) -> None:
    damage(checkpoint / name, how)
    model = make_student(seed=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(IntegrityError, match=name):
        load_state(checkpoint)
    with pytest.raises(IntegrityError, match=name):
        load_weights(checkpoint, model)
    assert_same(before, dict(model.state_dict()))


def test_another_format_is_refused(checkpoint: Path) -> None:
    content = json.loads((checkpoint / STATE_FILE).read_text())
    (checkpoint / STATE_FILE).write_text(json.dumps({**content, "format_version": 99}))
    seal_directory(checkpoint)
    with pytest.raises(IntegrityError, match="format 99"):
        load_state(checkpoint)


@pytest.mark.parametrize(
    ("changes", "tensor"),
    [
        ({"vocab_size": 33}, r"embedding\.weight.*\(33, 16\).*\(31, 16\)"),
        ({"num_layers": 3}, r"layers\.2\..*nothing"),
        ({"num_layers": 1}, r"holds layers\.1\."),
        ({"intermediate_size": 32}, r"layers\.0\.ffn\."),
    ],
)
def test_another_architecture_is_refused_by_its_tensor(checkpoint: Path, changes: dict[str, int], tensor: str) -> None:
    model = make_student(seed=1, **changes)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(IntegrityError, match=f"another architecture.*{tensor}"):
        load_weights(checkpoint, model)
    assert_same(before, dict(model.state_dict()))


def test_a_file_that_is_not_safetensors_is_an_integrity_error(tmp_path: Path) -> None:
    (tmp_path / MODEL_FILE).write_bytes(b"not at all")
    for path in (tmp_path / MODEL_FILE, tmp_path / "none"):
        with pytest.raises(IntegrityError, match="cannot be read"):
            load_model_file(path, make_student())


# --- the latest -------------------------------------------------------------------------------------------------


def save_steps(parent: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(parent / f"checkpoint-{step}", make_student(), {"step": step})


def test_the_latest_is_that_of_the_highest_number(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    assert latest_checkpoint(tmp_path) is None
    save_steps(tmp_path, 9, 10, 100)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / ".checkpoint-200.1-ab.tmp").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_damaged_ones_are_passed_over_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_steps(tmp_path, 1, 2, 3)
    damage(tmp_path / "checkpoint-3" / MODEL_FILE, "flipped")
    damage(tmp_path / "checkpoint-2" / "manifest.json", "missing")
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "checkpoint-3" in messages[0]
    assert "checkpoint-2" in messages[1]


def test_if_all_are_damaged_nothing_is_begun_afresh(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    for step in (1, 2):
        damage(tmp_path / f"checkpoint-{step}" / STATE_FILE, "truncated")
    with pytest.raises(IntegrityError, match=r"All 2 checkpoints .* damaged.*Remove them"):
        latest_checkpoint(tmp_path)


def test_the_latest_of_several_folders_is_found_whatever_they_are_called(tmp_path: Path) -> None:
    save_steps(tmp_path / "checkpoints", 1, 9)
    save_steps(tmp_path / "a" / "deep", 10)
    save_steps(tmp_path / "z", 2)
    (tmp_path / "b" / "checkpoint-best").mkdir(parents=True)
    folders = checkpoint_folders(tmp_path)
    assert folders == [tmp_path / "a" / "deep", tmp_path / "checkpoints", tmp_path / "z"]
    assert latest_checkpoint(*folders) == find_checkpoint(tmp_path) == tmp_path / "a" / "deep" / "checkpoint-10"
    damage(tmp_path / "a" / "deep" / "checkpoint-10" / MODEL_FILE, "flipped")
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoints" / "checkpoint-9"
