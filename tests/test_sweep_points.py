"""The points of a sweep: what Hydra would compose, every fault named, each run once."""

import importlib.util
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from kd.composition import conf_dir, register_schemas, to_config
from kd.config import Config
from kd.errors import ConfigError, DataError, Interrupted, KDError
from kd.sweep_points import Point, find_points

SMALL = ("data.sample_size=400000", "model.vocab_size=512")


@contextmanager
def hydra() -> Iterator[tuple[ConfigLoader, DictConfig]]:
    """Hydra's loader, and what no arguments compose to."""
    register_schemas()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        yield loader, compose("config", return_hydra_config=True, overrides=["hydra.job.config_name=config"])


def points_of(*arguments: str, num_processes: int = 1) -> list[Point]:
    with hydra() as (loader, master):
        return find_points([*SMALL, *arguments], loader, master, num_processes)


def composed(overrides: Sequence[str]) -> Config:
    """What Hydra alone makes of a point."""
    with hydra():
        return to_config(compose("config", overrides=list(overrides)))


GRIDS = {
    "values": ["train.alpha=0.5,1", "seed=0,1"],
    "one point": ["seed=3"],
    "a range": ["seed=range(1,4)"],
    "a group": ["model=tiny,student_120m", "train.alpha=0,1"],
    "a group of the other trainer": ["train=pretrain,quick", "seed=0,1"],
    "a file of overrides": ["debug=fast", "seed=0,1"],
    "a value that others refer to": ["model.max_seq_len=64,128", "seed=0,1"],
    "a value, then the group that holds it": ["train.batch_size=2,4", "train=quick,pretrain"],
    "nested values": ["teacher.model={num_layers:1},{num_layers:2}", "teacher.model.num_heads=2,6"],
    "appended": ["++train.eval_blocks=1,2", "seed=0,1"],
    "null": ["train.max_steps=null,3"],
    "a text with a comma": ["data=text", "data.path='a,b'", "seed=0,1", "train.alpha=0"],
}


@pytest.mark.parametrize("arguments", GRIDS.values(), ids=GRIDS.keys())
def test_every_point_is_what_hydra_composes(arguments: list[str]) -> None:
    if "data=text" in arguments:
        folder = Path("a,b")
        folder.mkdir()
        for name in ("one", "two", "three"):
            (folder / f"{name}.txt").write_text(f"{name} " * 200)
    points = points_of(*arguments)
    assert len({point.overrides for point in points}) == len(points)
    for point in points:
        assert point.config == composed(point.overrides)


def test_one_baseline_for_all_temperatures() -> None:
    points = points_of("train.alpha=0,0.5,1", "train.temperature=1,2,4", "seed=0,1")
    directories = [point.directory for point in points]
    assert len(points) == 18
    assert len(set(directories)) == 14
    assert [path.name.rpartition("-")[0] for path in directories[:7:2]] == [
        "alpha0-seed0",
        "alpha0-seed0",
        "alpha0-seed0",
        "alpha0.5-temperature1-seed0",
    ]
    assert points[3].label == "train.alpha=0 train.temperature=2 seed=1"


def test_the_same_point_twice_is_one_run() -> None:
    assert len({point.directory for point in points_of("train.alpha=0.5,0.50,5e-1")}) == 1


def test_a_point_is_named_like_its_single_run() -> None:
    from kd.plan import make_plan

    for point in points_of("train.alpha=0,1", "model.max_seq_len=64,128", "data.test_ratio=0,0.1"):
        assert point.directory == make_plan(point.config).identity.directory


def test_a_point_of_several_processes_is_named_like_the_run_that_torchrun_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kd.plan import make_plan

    arguments = ("train.alpha=0,1", "train.strategy=ddp,fsdp")
    points = points_of(*arguments, num_processes=4)
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    directories = [make_plan(point.config).identity.directory for point in points]
    assert [point.directory for point in points] == directories
    assert len(set(directories)) == 2
    alone = points_of("train.alpha=0,1", "train.gradient_accumulation_steps=1,4")
    assert [point.directory in directories for point in alone] == [False, True] * 2


def test_one_process_has_none_to_share_its_weights_with() -> None:
    with pytest.raises(
        ConfigError, match=r"1 of 2 points.*\n.*train\.strategy=fsdp.*hydra\.launcher\.tasks_per_node=N"
    ):
        points_of("train.strategy=ddp,fsdp")


FAULTY: dict[str, tuple[list[str], type[KDError], list[str]]] = {
    "out of range": (
        ["train.alpha=0,1.5", "train.temperature=1,0"],
        ConfigError,
        ["3 of 4 points", "train.alpha=1.5 train.temperature=1", "it must be in [0, 1]", "greater than 0"],
    ),
    "not a number": (["train.alpha=0.5,half"], ConfigError, ["1 of 2 points", "train.alpha=half:"]),
    "no such group": (["model=tiny,huge"], ConfigError, ["1 of 2 points", "model=huge:", "student_120m"]),
    "no such key": (["train.alpa=0,1"], ConfigError, ["2 of 2 points", "train.alpha?"]),
    "another trainer's": (["train=quick,pretrain", "train.alpha=0,1"], ConfigError, ["2 of 4 points", "pretrain"]),
    "not divisible": (["model.num_heads=4,5"], ConfigError, ["1 of 2 points", "model.num_heads=5"]),
    "no such data": (
        ["data=text", "data.path=missing,gone", "train.alpha=0"],
        DataError,
        ["2 of 2 points", "data.path=missing", "data.path=gone"],
    ),
    "a single point": (["data=text", "data.path=missing"], DataError, ["1 of 1 points", "the only point"]),
}


@pytest.mark.parametrize(("arguments", "kind", "words"), FAULTY.values(), ids=FAULTY.keys())
def test_all_faulty_points_are_named_and_nothing_is_made(
    arguments: list[str], kind: type[KDError], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(kind) as caught:
        points_of(*arguments)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "package"),
    [("adapter=none,lora", "peft"), ("quantization=none,int8", "torchao"), ("seed=0,1 adapter=none,lora", "peft")],
)
def test_a_missing_package_is_found_at_whichever_point_needs_it(
    settings: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(ConfigError, match=f"points cannot be done.*\n.*needs {package}, which is not installed"):
        points_of(*settings.split())


@pytest.mark.parametrize(
    "place", ["kd.sweep_points.make_plan", "hydra._internal.config_loader_impl.ConfigLoaderImpl.load_sweep_config"]
)
def test_a_stop_while_points_are_looked_at_is_no_fault_of_theirs(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise Interrupted("Stopped.")

    with hydra() as (loader, master):
        monkeypatch.setattr(place, stop)
        with pytest.raises(Interrupted, match=r"^Stopped\.$"):
            find_points([*SMALL, "seed=0,1"], loader, master)


@pytest.mark.parametrize("values", ["seed=range(3,1)", "model=glob(x*)", "train.alpha=interval(0,1)"])
def test_a_key_without_a_value_is_named(values: str) -> None:
    with pytest.raises(ConfigError, match=rf"{re.escape(values)} (gives no value|names no values)"):
        points_of("train.alpha=0,1", values)


def test_a_fault_of_many_points_is_told_once() -> None:
    with pytest.raises(ConfigError) as caught:
        points_of("train.alpha=2", "seed=range(0,40)")
    message = str(caught.value)
    assert message.count("it must be in [0, 1]") == 1
    assert "seed=2, and 37 more" in message


def test_a_hundred_points_take_seconds() -> None:
    before = time.monotonic()
    assert len(points_of("train.alpha=range(0.01,1,0.04)", "train.temperature=1,2", "seed=0,1")) == 100
    assert time.monotonic() - before < 8
