"""Parallel jobs share one machine: as many at a time as there are places, their threads within the cores."""

import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kd.sweep_share
from kd.sweep_share import Share, num_cores, share_out, visible_gpus


def never() -> bool:
    return False


@pytest.mark.parametrize("places", [1, 2])
def test_no_more_jobs_at_a_time_than_places(places: int) -> None:
    share = Share(places, None, ())
    busy: set[int] = set()
    most = 0

    def work() -> None:
        nonlocal most
        with share.place(Path(), never) as place:
            assert place is not None
            assert place not in busy
            busy.add(place)
            most = max(most, len(busy))
            time.sleep(0.1)
            busy.remove(place)

    threads = [threading.Thread(target=work) for _ in range(2 * places + 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == places


def test_waiting_for_a_place_can_be_given_up() -> None:
    share = Share(1, None, ())
    with share.place(Path(), never) as first, share.place(Path(), lambda: True) as second:
        assert (first, second) == (0, None)


def test_a_cluster_has_no_places() -> None:
    with Share(None, 8, ()).place(Path("missing"), never) as place:
        assert place is None


@given(cores=st.integers(1, 64), jobs=st.integers(1, 64))
def test_threads_of_all_jobs_fit_the_cores(cores: int, jobs: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kd.sweep_share, "num_cores", lambda: cores)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        share = share_out(jobs)
    assert share.places == jobs
    if jobs == 1:
        assert share.threads is None
    else:
        assert share.threads is not None
        assert share.threads >= 1
        assert share.threads == 1 or jobs * share.threads <= cores < jobs * (share.threads + 1)


def test_gpus_go_by_turns() -> None:
    share = Share(4, 1, ("0", "GPU-a"))
    names = [share.environment(place, by_turns=True)["CUDA_VISIBLE_DEVICES"] for place in range(4)]
    assert names == ["0", "GPU-a", "0", "GPU-a"]
    assert share.environment(1, by_turns=False) == {"CUDA_VISIBLE_DEVICES": "0,GPU-a"}
    assert Share(4, 1, ()).environment(1, by_turns=True) == {}


@pytest.mark.parametrize(
    ("gpus", "processes", "turns"),
    [
        ("0,1,2,3", 1, ("0", "1", "2", "3")),
        ("0,1,2,3", 2, ("0,1", "2,3")),
        ("0,1,2", 2, ("0,1",)),
        ("0", 2, ("0",)),
        ("", 2, ()),
    ],
)
def test_processes_of_a_job_take_gpus_together(
    gpus: str, processes: int, turns: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    assert share_out(2, processes).gpus == turns


@pytest.mark.parametrize(("value", "gpus"), [("", ()), ("-1", ()), ("3", ("3",)), ("1,GPU-a", ("1", "GPU-a"))])
def test_the_environment_says_which_gpus_there_are(
    value: str, gpus: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert visible_gpus() == gpus


@pytest.mark.parametrize(
    ("answer", "code", "gpus"),
    [
        (
            "GPU 0: H100 (UUID: GPU-1)\n  MIG 1g.10gb Device 0: (UUID: MIG-1)\nGPU 1: H100 (UUID: GPU-2)\n",
            0,
            ("0", "1"),
        ),
        ("No devices were found\n", 6, ()),
    ],
)
def test_the_driver_is_asked_otherwise(
    answer: str, code: int, gpus: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<END\n{answer}END\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert visible_gpus() == gpus


def test_this_machine_has_cores() -> None:
    assert 1 <= num_cores() <= (os.cpu_count() or 1)
