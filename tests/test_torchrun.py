"""torchrun's variables: what they say, and what is said where they do not fit together."""

import logging

import pytest

from kd.config import Config, DPOConfig, GRPOConfig, PretrainConfig, TrainerConfig, TrainingConfig
from kd.errors import ConfigError
from kd.runs import Fingerprints, run_identity
from kd.torchrun import Place, find_place, is_first, num_processes, one_voice

from .commands import run_and_list

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_one_process_has_no_place_whatever_address_is_set(torchrun: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        torchrun.delenv(name)
    assert find_place() is None
    assert num_processes() == 1
    assert is_first()


def test_the_variables_say_the_place(torchrun: pytest.MonkeyPatch) -> None:
    assert find_place() == Place(rank=3, local_rank=1, world_size=4, node="1")
    assert num_processes() == 4
    assert not is_first()
    torchrun.setenv("RANK", "0")
    assert is_first()


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_is_named(torchrun: pytest.MonkeyPatch, name: str) -> None:
    torchrun.delenv(name)
    with pytest.raises(ConfigError, match=rf"but {name} is not\. .*torchrun.*unset RANK LOCAL_RANK WORLD_SIZE"):
        find_place()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "4"),
        ("RANK", "-1"),
        ("RANK", "first"),
        ("RANK", "1.0"),
        ("WORLD_SIZE", "0"),
        ("LOCAL_RANK", "2"),
        ("LOCAL_RANK", "-1"),
        ("MASTER_PORT", "0"),
        ("MASTER_PORT", "70000"),
        ("MASTER_PORT", "http"),
    ],
)
def test_a_wrong_value_is_named_with_the_way_out(torchrun: pytest.MonkeyPatch, name: str, value: str) -> None:
    torchrun.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"{name}='?{value}'? is not .*torchrun"):
        find_place()


def test_only_the_first_process_speaks(torchrun: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("kd.anything")
    with caplog.at_level(logging.INFO, "kd"):
        for rank in ("0", "1"):
            torchrun.setenv("RANK", rank)
            with one_voice():
                log.info("progress of %s", rank)
                log.error("fault of %s", rank)
        log.info("afterwards")
    assert [record.getMessage() for record in caplog.records] == [
        "progress of 0",
        "fault of 0",
        "fault of 1",
        "afterwards",
    ]


def test_processes_and_accumulation_are_one_run_where_their_product_is_one() -> None:
    def digest(accumulation: int, processes: int, strategy: str = "ddp") -> str:
        train = TrainingConfig(gradient_accumulation_steps=accumulation, strategy=strategy)
        return run_identity(Config(train=train), Fingerprints("c", "t", "w"), processes).digest

    assert digest(4, 1) == digest(2, 2) == digest(1, 4) == digest(2, 2, "fsdp")
    assert digest(1, 2) != digest(1, 1) != digest(2, 2)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"strategy": "zero"}, "train.strategy=zero"),
        ({"strategy": "fsdp", "precision": "float16"}, "train.precision=float16"),
        ({"strategy": "fsdp", "compile": True}, "train.compile=true"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, str], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        PretrainConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [DPOConfig, GRPOConfig])
def test_parts_of_weights_are_refused_where_whole_ones_are_needed(config: type[TrainerConfig]) -> None:
    with pytest.raises(ConfigError, match=r"train\.strategy=fsdp .* set train\.strategy=ddp"):
        config(strategy="fsdp")


def test_fsdp_in_one_process_is_refused_before_anything_is_loaded() -> None:
    outcome, imported = run_and_list("debug=fast", "train.strategy=fsdp")
    assert outcome.code == 2
    assert "train.strategy=fsdp" in outcome.errors
    assert "torchrun" in outcome.errors
    assert "Traceback" not in outcome.errors
    assert imported == []


def test_half_of_the_variables_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome, imported = run_and_list("debug=fast")
    assert outcome.code == 2
    assert "WORLD_SIZE=2 is set, but RANK" in outcome.errors
    assert imported == []


def test_a_sweep_under_torchrun_is_refused(torchrun: pytest.MonkeyPatch) -> None:
    torchrun.setenv("RANK", "0")
    outcome, imported = run_and_list("-m", "debug=fast", "seed=0,1")
    assert outcome.code == 2
    assert "without torchrun" in outcome.errors
    assert "hydra.launcher.tasks_per_node=4" in outcome.errors
    assert "Traceback" not in outcome.errors
    assert imported == []
