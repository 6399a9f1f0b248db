"""The teacher cache: the same values as the live teacher, computed once, kept whole, and never of other tokens."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import kd.teacher_cache
from kd.cache import cache_root
from kd.config import TrainingConfig
from kd.data import PackedBlocks, eval_loader, train_loader
from kd.errors import DataError, IntegrityError, NumericError, ResourceError
from kd.linear_distillation import linear_scores
from kd.model import StudentModel
from kd.teacher import LiveTeacher
from kd.teacher_cache import CachedTeacher, TeacherCacheKey, has_states, open_cached_teacher
from kd.trainers import DistillationTrainer

from .small_disk import fill, small_disk
from .test_heads import make_model
from .trainers.helpers import BYTES, LENGTH, make_student

CPU = torch.device("cpu")
KEY = TeacherCacheKey("a teacher", "float32")


@pytest.fixture
def parts(store: Path) -> list[PackedBlocks]:
    return [PackedBlocks(store, "train"), PackedBlocks(store, "validation")]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four blocks a shard, three a forward pass."""
    monkeypatch.setattr(kd.teacher_cache, "SHARD_BYTES", 4 * LENGTH * 16 * 4)
    monkeypatch.setattr(kd.teacher_cache, "BATCH_TOKENS", 3 * LENGTH)


class Counted(NamedTuple):
    """A live teacher, and the rows of tokens that its body saw."""

    load: Callable[[], LiveTeacher]
    rows: list[tuple[int, ...]]


def interrupt() -> None:
    raise KeyboardInterrupt


def counted(model: nn.Module | None = None, at: int | None = None, act: Callable[[], None] = interrupt) -> Counted:
    """Return a loader whose teacher's body, when it is given its row number `at`, first acts."""
    model = make_student(seed=7, vocab_size=BYTES) if model is None else model
    rows: list[tuple[int, ...]] = []

    def see(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        if at is not None and len(rows) <= at < len(rows) + len(arguments[0]):
            act()
        rows.extend(tuple(row) for row in arguments[0].tolist())

    def load() -> LiveTeacher:
        teacher = LiveTeacher(model, CPU)
        # After the trial on made-up tokens, which is no block.
        embedding = model.embedding if isinstance(model, StudentModel) else model.get_input_embeddings()  # type: ignore[operator]
        embedding.register_forward_pre_hook(see)
        return teacher

    return Counted(load, rows)


def never() -> LiveTeacher:
    raise AssertionError("the teacher was loaded")


def rows_of(parts: list[PackedBlocks]) -> list[tuple[int, ...]]:
    return [tuple(part[i]["input_ids"].tolist()) for part in parts for i in range(len(part))]


@pytest.mark.usefixtures("small_shards")
def test_every_block_gives_what_the_live_teacher_gives(parts: list[PackedBlocks]) -> None:
    live = counted()
    cached = open_cached_teacher(KEY, parts, live.load, CPU)
    teacher = live.load()
    for part in parts:
        for indexes in ([0], [4, 1, 3], list(range(len(part)))):
            batch = part[indexes]
            torch.testing.assert_close(cached.hidden(batch), teacher.hidden(batch), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(cached.logits(batch), teacher.logits(batch), rtol=1e-6, atol=1e-5)
    assert cached.head.vocab_size == BYTES
    assert "27 blocks" in cached.description


@pytest.mark.usefixtures("small_shards")
def test_the_body_sees_each_block_once_and_is_not_loaded_again(parts: list[PackedBlocks]) -> None:
    assert not has_states(KEY, parts)
    live = counted()
    open_cached_teacher(KEY, parts, live.load, CPU)
    assert sorted(live.rows) == sorted(rows_of(parts))
    assert has_states(KEY, parts)
    batch = parts[0][[2, 3]]
    assert open_cached_teacher(KEY, parts, never, CPU).hidden(batch).shape == (2, LENGTH, 16)


@pytest.mark.usefixtures("small_shards")
def test_an_interrupted_build_goes_on_where_it_stopped(parts: list[PackedBlocks]) -> None:
    first, second = counted(at=11), counted()
    with pytest.raises(KeyboardInterrupt):
        open_cached_teacher(KEY, parts, first.load, CPU)
    assert not has_states(KEY, parts)
    cached = open_cached_teacher(KEY, parts, second.load, CPU)
    # Two shards of four blocks were whole; the third, with one row of it seen, is made again.
    assert sorted(second.rows) == sorted(rows_of(parts)[8:])
    for index, part in enumerate(parts):
        batch = part[list(range(len(part)))]
        expected = LiveTeacher(make_student(seed=7, vocab_size=BYTES), CPU).hidden(batch)
        torch.testing.assert_close(cached.hidden(batch), expected, rtol=1e-6, atol=1e-6, msg=f"part {index}")


def test_a_half_written_shard_is_not_taken(parts: list[PackedBlocks]) -> None:
    work = cache_root() / "teacher-states" / f"{KEY.of_states(parts[0])}.partial"
    work.mkdir(parents=True)
    (work / ".states-00000.safetensors.tmp").write_bytes(b"half")
    live = counted()
    open_cached_teacher(KEY, parts, live.load, CPU)
    assert sorted(live.rows) == sorted(rows_of(parts))


def test_keys_differ_by_all_that_matters(store: Path) -> None:
    train, some = PackedBlocks(store, "train"), PackedBlocks(store, "train", 5)
    keys = [TeacherCacheKey(teacher, dtype) for teacher in ("a", "b") for dtype in ("float32", "bfloat16")]
    parts = (train, some, PackedBlocks(store, "validation"))
    assert len({key.of_states(blocks) for key in keys for blocks in parts}) == 12
    assert len({key.of_head() for key in keys}) == 4
    assert KEY.of_states(train) == KEY.of_states(PackedBlocks(store, "train", 10**6))


def test_a_selection_of_blocks_is_all_that_is_computed(store: Path) -> None:
    some = PackedBlocks(store, "train", 5)
    live = counted()
    cached = open_cached_teacher(KEY, [some], live.load, CPU)
    assert sorted(live.rows) == sorted(rows_of([some]))
    with pytest.raises(DataError, match=r"not in the cache.*teacher\.cache=off"):
        cached.hidden(PackedBlocks(store, "train")[[0, 1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_are_kept_in_the_teachers_dtype(parts: list[PackedBlocks], dtype: torch.dtype) -> None:
    model = make_model("phi", vocab_size=BYTES).to(dtype)
    key = TeacherCacheKey("phi", str(dtype))
    cached = open_cached_teacher(key, parts, counted(model).load, CPU)
    batch = parts[0][[0, 5, 2]]
    assert cached.hidden(batch).dtype == cached.head.weight.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(cached.hidden(batch), LiveTeacher(model, CPU).hidden(batch), rtol=8 * eps, atol=8 * eps)
    expected = model(batch["input_ids"]).logits
    torch.testing.assert_close(cached.logits(batch), expected, rtol=16 * eps, atol=16 * eps)
    assert cached.head.bias is not None


def test_soft_capping_reaches_the_loss(parts: list[PackedBlocks]) -> None:
    model = make_model("gemma2", vocab_size=BYTES, final_logit_softcapping=0.3)
    cached = open_cached_teacher(TeacherCacheKey("gemma", "float32"), parts, counted(model).load, CPU)
    batch = parts[1][[0, 1]]
    expected = model(batch["input_ids"]).logits
    torch.testing.assert_close(cached.logits(batch), expected, rtol=1e-5, atol=1e-5)
    student = make_student(vocab_size=BYTES)
    scores = linear_scores(
        student.hidden_states(batch["input_ids"]),
        student.lm_head.weight,
        cached.hidden(batch),
        cached.head.weight,
        batch["labels"],
        teacher_softcap=cached.head.softcap,
    )
    nll = torch.nn.functional.cross_entropy(expected.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    assert scores.teacher_nll is not None
    torch.testing.assert_close(scores.teacher_nll.flatten(), nll)


# --- what must not pass unnoticed ---------------------------------------------------------------------------------


def test_a_state_that_is_not_finite_stops_the_build(parts: list[PackedBlocks]) -> None:
    model = make_student(vocab_size=BYTES)
    token = int(parts[0][7]["input_ids"][3])
    model.embedding.weight.data[token] = float("inf")
    first = next(i for i in range(len(parts[0])) if token in parts[0][i]["input_ids"])
    with pytest.raises(NumericError, match=rf"block {first} are not finite in float32.*teacher\.dtype=bfloat16"):
        open_cached_teacher(KEY, parts, counted(model).load, CPU)
    assert not has_states(KEY, parts)


@pytest.fixture
def disk(parts: list[PackedBlocks], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small disk with the cache on it: the head, and the states of the validation part, are there."""
    with small_disk(tmp_path / "disk", "256k") as mounted:
        monkeypatch.setenv("KD_CACHE", str(mounted / "cache"))
        open_cached_teacher(KEY, [parts[1]], counted().load, CPU)
        yield mounted


def test_what_does_not_fit_on_the_disk_is_refused_before_work(parts: list[PackedBlocks], disk: Path) -> None:
    filling = fill(disk)
    os.truncate(filling, filling.stat().st_size - 2 * 4096)  # the states take 11 kB
    live = counted()
    with pytest.raises(ResourceError, match=r"need 0\.0 MB, and only 0\.0 MB are free.*KD_CACHE.*teacher\.cache=off"):
        open_cached_teacher(KEY, parts, live.load, CPU)
    assert not live.rows
    filling.unlink()
    open_cached_teacher(KEY, parts, live.load, CPU)


@pytest.mark.usefixtures("small_shards")
def test_a_disk_that_fills_in_the_middle_costs_one_shard(parts: list[PackedBlocks], disk: Path) -> None:
    fillings: list[Path] = []
    first = counted(at=11, act=lambda: fillings.append(fill(disk)))
    with pytest.raises(ResourceError, match=r"No space left on device.*KD_CACHE"):
        open_cached_teacher(KEY, parts, first.load, CPU)
    fillings[0].unlink()
    second = counted()
    open_cached_teacher(KEY, parts, second.load, CPU)
    # Two shards of four blocks were whole.
    assert sorted(second.rows) == sorted(rows_of(parts[:1])[8:])


def test_a_teacher_without_a_linear_head_is_refused_with_the_reason(parts: list[PackedBlocks]) -> None:
    def load() -> LiveTeacher:
        return LiveTeacher(nn.Sequential(make_student(vocab_size=BYTES)), CPU)

    with pytest.raises(DataError, match=r"does not say which module is its head\. Set teacher\.cache=off"):
        open_cached_teacher(KEY, parts, load, CPU)


def states_directory(part: PackedBlocks) -> Path:
    return cache_root() / "teacher-states" / KEY.of_states(part)


def test_altered_states_are_noticed_at_their_first_reading(parts: list[PackedBlocks]) -> None:
    open_cached_teacher(KEY, parts, counted().load, CPU)
    file = states_directory(parts[0]) / "states-00000.safetensors"
    content = {name: tensor.clone() for name, tensor in load_file(file).items()}
    content["hidden"][6, 2, 3] += 1
    save_file(content, file)
    cached = open_cached_teacher(KEY, parts, never, CPU)
    cached.hidden(parts[0][[5, 7]])
    with pytest.raises(IntegrityError, match=r"block 6 in .* are not what was written"):
        cached.hidden(parts[0][[5, 6]])


def test_a_cut_file_is_noticed_at_opening(parts: list[PackedBlocks]) -> None:
    open_cached_teacher(KEY, parts, counted().load, CPU)
    file = states_directory(parts[0]) / "states-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="manifest says"):
        open_cached_teacher(KEY, parts, never, CPU)


def test_other_tokens_under_the_same_id_are_refused(parts: list[PackedBlocks]) -> None:
    cached = open_cached_teacher(KEY, parts, counted().load, CPU)
    batch = parts[1][[0, 2]]
    changed: Tensor = batch["input_ids"].clone()
    changed[1, 4] += 1
    with pytest.raises(DataError, match=f"Block {int(batch['block_id'][1])} holds other tokens"):
        cached.hidden(batch | {"input_ids": changed})


def test_block_ids_are_unique_over_all_parts(parts: list[PackedBlocks]) -> None:
    ids = np.concatenate([part.block_ids for part in parts])
    assert len(set(ids.tolist())) == len(ids) == sum(len(part) for part in parts)
    for part in parts:
        assert part[[3, 1]]["block_id"].tolist() == part.block_ids[[3, 1]].tolist()


# --- training -----------------------------------------------------------------------------------------------------


def train(teacher: nn.Module | CachedTeacher, parts: list[PackedBlocks]) -> dict[str, Any]:
    torch.manual_seed(3)
    trainer = DistillationTrainer(
        make_student(vocab_size=BYTES),
        teacher,
        train_loader(parts[0], 4, seed=0),
        eval_loader(parts[1], 2),
        TrainingConfig(num_epochs=2, warmup_steps=0, learning_rate=1e-2, log_interval=1, eval_interval=3),
        CPU,
    )
    return trainer.train()


def test_a_run_from_the_cache_is_the_run_with_the_live_teacher(parts: list[PackedBlocks]) -> None:
    live = train(make_student(seed=7, vocab_size=BYTES), parts)
    cached = train(open_cached_teacher(KEY, parts, counted().load, CPU), parts)
    assert cached["train_loss"][0] == pytest.approx(live["train_loss"][0], rel=1e-6)
    assert cached["kl_loss"][0] == pytest.approx(live["kl_loss"][0], rel=1e-6)
    assert cached["val_ppl"][-1] == pytest.approx(live["val_ppl"][-1], rel=1e-4)
    assert cached["val_kl"] == pytest.approx(live["val_kl"], rel=1e-4)
    assert cached["val_agreement"] == pytest.approx(live["val_agreement"], abs=0.03)
