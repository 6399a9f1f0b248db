"""A run of a sweep as a child process: whatever becomes of the child, it is known afterwards and costs only itself."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import kd.sweep_jobs
from kd.errors import Interrupted, KDError
from kd.runs import FAILURE, RESULT, Failure, RunState, read_failure, run_state, write_failure
from kd.stop import signals_to
from kd.sweep_jobs import Job, StopFile, SweepTask, describe_end, last_lines
from kd.sweep_share import Share

from .commands import REPOSITORY
from .fake_child import DIRECTORY, finish

RUN = Path("outputs/test/alpha1-temperature2-seed0-01234567")
HOLDER = """
import sys, time
from pathlib import Path
from filelock import FileLock
from tests.fake_child import finish

with FileLock(sys.argv[1] + "/.lock"):
    print("held", flush=True)
    time.sleep(0.8)
    finish(Path(sys.argv[1]))
"""
PARENT = """
from tests.test_sweep_jobs import task
import kd.sweep_jobs

kd.sweep_jobs.CHILD = "tests.fake_child"
task("sleep").run(0)
"""


@pytest.fixture(autouse=True)
def fake_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kd.sweep_jobs, "CHILD", "tests.fake_child")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv(DIRECTORY, str(RUN))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def task(behaviour: str, *, overwrite: bool = False, share: Share | None = None, sharing: bool = True) -> SweepTask:
    """A sweep of one run that behaves so."""
    scratch = Path("scratch")
    scratch.mkdir(exist_ok=True)
    job = Job(RUN, (behaviour,), overwrite, shares_threads=sharing, shares_gpus=sharing)
    return SweepTask((job,), share or Share(1, None, ()), scratch, StopFile(scratch / "stop"), os.getpid())


def starts() -> list[str]:
    """What each child that was started got: behaviour, further arguments, GPUs."""
    file = Path("starts")
    return file.read_text().splitlines() if file.exists() else []


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_returns_its_validation_loss_and_its_words_are_kept() -> None:
    assert task("done").run(0) == 2.5
    assert run_state(RUN) is RunState.DONE
    assert Path(f"scratch/{RUN.name}.log").read_text() == "it began\n"
    assert not (RUN / FAILURE).exists()


def test_a_finished_run_is_not_started_again_unless_it_is_to_be_overwritten() -> None:
    finish(RUN)
    assert task("raise").run(0) == 2.5
    assert starts() == []
    assert task("done", overwrite=True).run(0) == 2.5
    assert len(starts()) == 1


FAULTS = {
    "raise": (1, "ValueError: a planned fault"),
    "say": (1, "a planned refusal."),
    "exit": (5, "it began"),
    "kill": (-9, "SIGKILL"),
    "nothing": (0, "without a result"),
}


@pytest.mark.parametrize(("behaviour", "expected"), FAULTS.items(), ids=FAULTS.keys())
def test_a_fault_is_raised_and_recorded_and_a_retry_removes_it(behaviour: str, expected: tuple[int, str]) -> None:
    code, words = expected
    with pytest.raises(KDError, match=words) as caught:
        task(behaviour).run(0)
    assert "kd-train:" not in str(caught.value)
    failure = read_failure(RUN)
    assert failure is not None
    assert words in failure.error
    assert failure.exit_code == code
    assert last_lines(Path(failure.log), 100)[0] == "it began"
    assert run_state(RUN) is RunState.FAILED
    assert task("done").run(0) == 2.5
    assert run_state(RUN) is RunState.DONE
    assert not (RUN / FAILURE).exists()


def test_a_result_counts_however_its_process_ended_afterwards() -> None:
    assert task("late").run(0) == 2.5
    assert run_state(RUN) is RunState.DONE


def test_an_old_result_does_not_hide_that_doing_it_again_failed() -> None:
    finish(RUN)
    with pytest.raises(KDError, match="a planned fault"):
        task("raise", overwrite=True).run(0)


def test_who_comes_second_tries_again() -> None:
    assert task("held").run(0) == 2.5
    assert len(starts()) == 2


def test_a_run_that_is_live_elsewhere_is_waited_for() -> None:
    RUN.mkdir(parents=True)
    command = [sys.executable, "-c", HOLDER, str(RUN)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert run_state(RUN) is RunState.RUNNING
        assert task("raise").run(0) == 2.5
    assert starts() == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_sweep_asks_its_child_once_and_waits_until_it_has_saved(signum: signal.Signals) -> None:
    stopped = task("sleep")

    def ask() -> None:
        wait_for((RUN / "begun").exists)
        os.kill(os.getpid(), signum)

    threading.Thread(target=ask).start()
    with signals_to(stopped.stop.request), pytest.raises(Interrupted) as caught:
        stopped.run(0)
    assert caught.value.exit_code == 128 + signum
    assert Path("requests").read_text() == f"{signal.SIGTERM:d}\n"
    assert run_state(RUN) is RunState.INTERRUPTED
    with pytest.raises(Interrupted):
        stopped.run(0)
    assert len(starts()) == 1


def test_the_end_that_a_cluster_sets_leads_to_a_checkpoint() -> None:
    # submitit's handler of SLURM's warning puts the job back into the queue and leaves by SystemExit.
    ended = task("sleep")
    before = signal.signal(signal.SIGUSR2, lambda *_: sys.exit(-1))

    def warn() -> None:
        wait_for((RUN / "begun").exists)
        os.kill(os.getpid(), signal.SIGUSR2)

    threading.Thread(target=warn).start()
    try:
        with pytest.raises(SystemExit):
            ended.run(0)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert Path("requests").read_text() == f"{signal.SIGTERM:d}\n"
    assert run_state(RUN) is RunState.INTERRUPTED


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_worker_stops_its_run_alone(signum: signal.Signals) -> None:
    stopped = replace(task("sleep"), pid=0)

    def ask() -> None:
        wait_for((RUN / "begun").exists)
        os.kill(os.getpid(), signum)

    threading.Thread(target=ask).start()
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted):
        stopped.run(0)
    assert signal.getsignal(signum) is before
    assert Path("requests").read_text() == f"{signal.SIGTERM:d}\n"
    assert not stopped.stop.path.exists()


def test_a_second_request_does_not_wait() -> None:
    stopped = task("sleep")

    def ask() -> None:
        wait_for((RUN / "begun").exists)
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(Path("requests").exists)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=ask).start()
    with signals_to(stopped.stop.request), pytest.raises(KeyboardInterrupt):
        stopped.run(0)


def test_a_child_ends_with_its_parent_however_that_ends() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], start_new_session=True)
    wait_for((RUN / "begun").exists)
    os.killpg(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_for(Path("requests").exists)
    assert Path("requests").read_text() == f"{signal.SIGTERM:d}\n"


def test_a_child_gets_its_share() -> None:
    task("done", overwrite=True, share=Share(2, 3, ("4", "5"))).run(0)
    task("done", overwrite=True, share=Share(2, 3, ("4", "5")), sharing=False).run(0)
    task("done", overwrite=True).run(0)
    assert starts() == ["done threads=3 4", "done 4,5", "done -"]


def test_hydra_debugging_of_the_sweep_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(kd.sweep_jobs, "CHILD", "this")  # prints prose and leaves with 0
    seen: list[dict[str, str]] = []
    popen = subprocess.Popen

    def watch(*arguments: object, env: dict[str, str], **options: object) -> object:
        seen.append(env)
        return popen(*arguments, env=env, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "Popen", watch)
    with pytest.raises(KDError, match="without a result"):
        task("done").run(0)
    assert "HYDRA_FULL_ERROR" not in seen[0]


# --- states ------------------------------------------------------------------------------------------------------


def test_states_are_read_without_a_trace() -> None:
    assert run_state(RUN) is RunState.PLANNED
    assert not Path("outputs").exists()
    RUN.mkdir(parents=True)
    assert run_state(RUN) is RunState.PLANNED
    (RUN / "config.yaml").touch()
    assert run_state(RUN) is RunState.INTERRUPTED
    write_failure(RUN, Failure("it broke", 1, "x.log"))
    assert run_state(RUN) is RunState.FAILED
    assert read_failure(RUN) == Failure("it broke", 1, "x.log")
    finish(RUN)
    assert run_state(RUN) is RunState.DONE
    assert sorted(path.name for path in RUN.iterdir()) == ["config.yaml", FAILURE, RESULT]


@pytest.mark.parametrize("content", ["", "[]", '{"state": "running"}'])
def test_a_result_that_cannot_be_read_is_a_failure(content: str) -> None:
    RUN.mkdir(parents=True)
    (RUN / RESULT).write_text(content)
    assert run_state(RUN) is RunState.FAILED
    assert read_failure(RUN) is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"error": "x"}'])
def test_a_damaged_failure_is_still_a_failure(content: str) -> None:
    RUN.mkdir(parents=True)
    (RUN / FAILURE).write_text(content)
    assert run_state(RUN) is RunState.FAILED
    assert read_failure(RUN) is None


def test_a_log_that_is_not_there_or_not_text() -> None:
    assert last_lines(Path("missing"), 3) == []
    assert describe_end(1, Path("missing")) == "it printed nothing"
    Path("binary").write_bytes(b"\xff\n\n one \n two")
    assert last_lines(Path("binary"), 2) == [" one", " two"]
