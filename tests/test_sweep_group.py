"""Jobs of several processes: how their tasks meet, what their children are told, and what all say of a fault of one."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

import kd.sweep_group
import kd.sweep_jobs
from kd.errors import Interrupted, KDError
from kd.files import read_json
from kd.runs import RunState, read_failure, run_state
from kd.sweep_group import Call, End, GroupSize, Meeting, Member, find_member, free_port
from kd.sweep_jobs import Job, StopFile, SweepTask
from kd.sweep_share import Share
from kd.torchrun import OTHER_GONE, Place, find_place

from .commands import REPOSITORY
from .fake_child import DIRECTORY, finish

needs_submitit = pytest.mark.skipif(find_spec("submitit") is None, reason="the extra slurm is not installed")
RUN = Path("outputs/test/alpha1-temperature2-seed0-01234567")
PAIR = GroupSize(1, 2)
LIFE = "7-0"
SLURM = {
    "SUBMITIT_EXECUTOR": "slurm",
    "SLURM_JOB_ID": "73",
    "SLURM_ARRAY_JOB_ID": "70",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_NTASKS": "8",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


def never() -> bool:
    return False


def for_a_while(seconds: float = 0.4) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kd.sweep_group, "WAIT_SECONDS", 0.05)


def meeting(rank: int, *, life: str = LIFE, size: GroupSize = PAIR) -> Meeting:
    member = Member(rank, rank % size.tasks_per_node, rank // size.tasks_per_node, life)
    return Meeting(Path(), "run", size, member)


# --- who am I ----------------------------------------------------------------------------------------------------


@needs_submitit
def test_a_task_of_a_cluster_has_the_place_that_torchrun_would_give_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    size = GroupSize(2, 4)
    member = find_member(size)
    assert member == Member(rank=5, local_rank=1, node=1, life="70_3-0")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert find_member(size).life == "70_3-2"
    seat = Meeting(Path(), "run", size, member).seat(Call(1, "node07", 29500, None))
    assert seat.environment["LOCAL_WORLD_SIZE"] == "4"
    assert (seat.environment["MASTER_ADDR"], seat.environment["MASTER_PORT"]) == ("node07", "29500")
    for name, value in seat.environment.items():
        monkeypatch.setenv(name, value)
    assert find_place() == Place(rank=5, local_rank=1, world_size=8, node="1")


@needs_submitit
@pytest.mark.parametrize("size", [GroupSize(1, 8), GroupSize(2, 2)])
def test_another_number_of_tasks_than_asked_for_is_a_fault(size: GroupSize, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(KDError, match="8 tasks on 2 machines"):
        find_member(size)


# --- meeting -----------------------------------------------------------------------------------------------------


def test_the_others_hear_every_call_once_and_the_end() -> None:
    first, second = meeting(0), meeting(1)
    assert second.next_call(0, for_a_while()) is None
    with first.held():
        assert second.next_call(0, for_a_while()) is None
        call = first.call(3)
        assert second.next_call(0, never) == call
        assert (call.attempt, call.address, call.place) == (1, "127.0.0.1", 3)
        assert second.next_call(1, for_a_while()) is None
        assert not second.seat(call).is_lost()
        again = first.call(3)
        assert second.seat(call).is_lost()
        assert second.next_call(1, never) == again
        assert not second.seat(again).is_lost()
    assert second.next_call(2, never) is None
    assert second.seat(again).is_lost()
    assert meeting(1).next_call(0, never) is None


def test_several_machines_meet_at_the_name_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "node07")
    assert meeting(0, size=GroupSize(2, 4)).call(None).address == "node07"


def test_what_a_killed_job_left_is_not_for_its_next_life() -> None:
    meeting(0, life="7-0").call(None)
    assert meeting(1, life="7-1").next_call(0, for_a_while()) is None


def test_a_job_that_goes_back_into_the_queue_leaves_nothing_to_a_life_of_the_same_name() -> None:
    def ended() -> None:
        first = meeting(0)
        with first.held():
            call = first.call(None)
            first.note(call.attempt, End(1, 143, "stopped"))
            raise SystemExit(144)

    with pytest.raises(SystemExit):
        ended()
    second = meeting(1)
    assert second.next_call(0, for_a_while()) is None
    with (again := meeting(0)).held():
        call = again.call(None)
        assert second.next_call(0, never) == call
        assert not second.seat(call).is_lost()


def test_a_first_task_that_was_killed_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kd.sweep_group, "GONE_SECONDS", 0.5)
    first, second = meeting(0), meeting(1)
    call = first.call(None)  # without `held`, it shows no life
    assert second.next_call(0, never) == call
    begin = time.monotonic()
    assert second.next_call(1, never) is None
    assert 0.4 < time.monotonic() - begin < 3
    assert second.seat(call).is_lost()
    assert meeting(1, life="8-0").next_call(0, never) is None  # it never came


def test_a_first_task_that_lives_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kd.sweep_group, "GONE_SECONDS", 0.5)
    monkeypatch.setattr(kd.sweep_group, "BEAT_SECONDS", 0.1)
    first, second = meeting(0), meeting(1)
    with first.held():
        assert second.next_call(0, for_a_while(1.2)) is None
        call = first.call(None)
        assert second.next_call(0, never) == call


FAULT, STOP = End(1, -9, "it was killed"), End(1, 143, "stopped")
GONE = End(0, 7, f"{OTHER_GONE} (reset by peer)")


@pytest.mark.parametrize(
    ("noted", "kept"),
    [((FAULT, STOP), FAULT), ((STOP, FAULT), STOP), ((GONE, FAULT), FAULT), ((GONE, STOP), STOP), ((GONE,), GONE)],
)
def test_the_first_end_that_explains_the_others_is_kept(noted: tuple[End, ...], kept: End) -> None:
    members = [meeting(0), meeting(1)]
    call = members[0].call(None)
    for end in noted:
        members[end.rank].note(call.attempt, end)
    assert [member.noted(call.attempt) for member in members] == [kept, kept]
    assert members[0].seat(call).is_lost()
    assert members[0].noted(call.attempt + 1) is None


def test_ports_are_free() -> None:
    assert len({free_port() for _ in range(20)}) > 10


# --- runs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kd.sweep_jobs, "CHILD", "tests.fake_child")
    monkeypatch.setattr(kd.sweep_jobs, "find_member", lambda _: member_of_thread())
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv(DIRECTORY, str(RUN))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def member_of_thread() -> Member:
    rank, life = threading.current_thread().name.split()
    return Member(int(rank), int(rank), 0, life)


class Pair:
    """The two tasks of one job, in threads."""

    def __init__(self, behaviour: str, share: Share | None = None) -> None:
        scratch = Path("scratch")
        scratch.mkdir(exist_ok=True)
        job = Job(RUN, (behaviour,), False, shares_threads=True, shares_gpus=True)
        stop = StopFile(scratch / "stop")
        self.task = SweepTask((job,), share or Share(1, None, ()), scratch, stop, os.getpid(), PAIR)
        self.ends: list[object] = [None, None]
        life = f"7-{len(list(scratch.glob('*.meeting')))}"
        self.threads = [threading.Thread(target=self._run, args=(rank,), name=f"{rank} {life}") for rank in range(2)]
        for thread in self.threads:
            thread.start()

    def _run(self, rank: int) -> None:
        try:
            self.ends[rank] = self.task.run(0)
        except KDError as error:
            self.ends[rank] = error

    def finish(self) -> object:
        """What the first task returned or raised; the other returns quietly whatever happens."""
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive()
        assert isinstance(self.ends[1], float)
        assert math.isnan(self.ends[1])
        return self.ends[0]


def do(behaviour: str, share: Share | None = None) -> object:
    return Pair(behaviour, share).finish()


def count(name: str) -> int:
    return len(Path(name).read_text().splitlines()) if Path(name).exists() else 0


@pytest.mark.usefixtures("fake_child")
def test_each_task_has_a_child_with_its_share_and_its_log() -> None:
    assert do("done:beside", Share(1, 3, ("4,5",))) == 2.5
    assert sorted(Path("starts").read_text().splitlines()) == ["beside threads=3 4,5", "done threads=3 4,5"]
    for name in (f"{RUN.name}.log", f"{RUN.name}-rank1.log"):
        assert Path("scratch", name).read_text() == "it began\n"
    assert read_json(Path(f"scratch/{RUN.name}-{LIFE}.meeting")) is None


@pytest.mark.usefixtures("fake_child")
def test_a_finished_run_is_started_nowhere() -> None:
    finish(RUN)
    assert do("raise:raise") == 2.5
    assert count("starts") == 0


@pytest.mark.usefixtures("fake_child")
@pytest.mark.parametrize(
    ("behaviour", "rank", "code", "words"),
    [
        ("sleep:kill", 1, -9, "process 1 of 2: it was killed by SIGKILL"),
        ("sleep:raise", 1, 1, "process 1 of 2: ValueError: a planned fault"),
        ("gone:say later", 1, 1, "process 1 of 2: a planned refusal."),
        ("say:beside", 0, 1, "process 0 of 2: a planned refusal."),
        ("exit:beside", 0, 5, "process 0 of 2: it began"),
    ],
)
def test_a_fault_of_one_ends_all_and_is_named(behaviour: str, rank: int, code: int, words: str) -> None:
    error = do(behaviour)
    assert isinstance(error, KDError)
    assert words in str(error)
    failure = read_failure(RUN)
    assert failure is not None
    assert words in failure.error
    assert (failure.exit_code, failure.log) == (code, f"scratch/{RUN.name}{'-rank1' if rank else ''}.log")
    assert run_state(RUN) is RunState.FAILED
    assert not Path("requests").exists() or count("requests") == 1
    assert do("done:beside") == 2.5
    assert run_state(RUN) is RunState.DONE


@pytest.mark.usefixtures("fake_child")
def test_an_end_that_no_log_explains_leads_to_all_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kd.sweep_group, "CAUSE_SECONDS", 0.2)
    error = do("gone:nothing")
    assert isinstance(error, KDError)
    assert f"scratch/{RUN.name}-rank*.log" in str(error)


@pytest.mark.usefixtures("fake_child")
def test_who_comes_second_tries_again_with_all() -> None:
    assert do("held:beside") == 2.5
    starts = Path("starts").read_text().splitlines()
    assert [sum(line.startswith(name) for line in starts) for name in ("held", "beside")] == [2, 2]


@pytest.mark.usefixtures("fake_child")
def test_a_stop_reaches_all_once() -> None:
    pair = Pair("sleep:beside")
    while count("starts") < 2 or not (RUN / "begun").exists():
        time.sleep(0.02)
    pair.task.stop.request(signal.SIGTERM)
    assert isinstance(pair.finish(), Interrupted)
    assert Path("requests").read_text() == f"{signal.SIGTERM:d}\n" * 2
    assert run_state(RUN) is RunState.INTERRUPTED
    assert isinstance(do("done:done"), Interrupted)
    assert count("starts") == 2


@pytest.mark.usefixtures("fake_child")
def test_a_child_that_waits_for_nobody_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kd.sweep_jobs, "GRACE_SECONDS", 0.3)
    begin = time.monotonic()
    error = do("deaf:kill")
    assert time.monotonic() - begin < 10
    assert "process 1 of 2: it was killed by SIGKILL" in str(error)
