"""What a sweep launches, with what share of the machine, and what it says in the end."""

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.callbacks import Callbacks
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

import kd.sweep_share
from kd.errors import ConfigError, Interrupted, KDError
from kd.runs import RESULT, Failure, RunState, run_state, write_failure
from kd.sweep import HydraTask, group_for, run_sweep, share_for, summary
from kd.sweep_group import GroupSize
from kd.sweep_share import Share

from .fake_child import finish
from .test_composition import composed
from .test_sweep_points import SMALL, hydra

GRID = ["train.alpha=0,1", "train.temperature=1,2"]
needs_submitit = pytest.mark.skipif(find_spec("submitit") is None, reason="the extra slurm is not installed")


class Launcher:
    """Stands for a launcher: notes what it gets, and does to each run what the test says."""

    def __init__(self, task: HydraTask, act: Callable[[HydraTask, int], None]) -> None:
        self.task, self.act = task, act
        self.launched: list[list[str]] = []

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        self.launched += [list(overrides) for overrides in job_overrides]
        return [self.one(initial_job_idx + number) for number in range(len(job_overrides))]

    def one(self, number: int) -> JobReturn:
        try:
            self.act(self.task, number)
        except KDError as error:
            return JobReturn(status=JobStatus.FAILED, _return_value=error)
        return JobReturn(status=JobStatus.COMPLETED, _return_value=0.0)


def stop_child(task: HydraTask, number: int) -> None:
    if number == 1:
        raise Interrupted("It was stopped.")
    do(task, number)


def do(task: HydraTask, number: int) -> None:
    finish(task.task.jobs[number].directory)


def fail(task: HydraTask, number: int) -> None:  # noqa: ARG001
    raise KDError("it broke")


def crash(task: HydraTask, number: int) -> None:
    if number == 1:
        raise RuntimeError("the cluster is down")
    do(task, number)


def stop(task: HydraTask, number: int) -> None:
    if number == 1:
        task.task.stop.request(15)
        raise Interrupted("Stopped.")
    do(task, number)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Launcher | None]:
    """A function that does a sweep with a stand-in for the launcher, which it returns; None if none was made."""

    def sweep(act: Callable[[HydraTask, int], None], *arguments: str) -> Launcher | None:
        made: list[Launcher] = []

        def instantiate(self: Plugins, task_function: HydraTask, **_: Any) -> Launcher:  # noqa: ARG001
            made.append(Launcher(task_function, act))
            return made[0]

        monkeypatch.setattr(Plugins, "instantiate_launcher", instantiate)
        monkeypatch.setattr("kd.sweep.configure_log", lambda *_: None)  # it would take the log from pytest
        with hydra() as (loader, master):
            run_sweep([*SMALL, *GRID, *arguments], HydraContext(config_loader=loader, callbacks=Callbacks()), master)
        return made[0] if made else None

    return sweep


Sweep = Callable[..., Launcher | None]


def test_only_what_is_missing_is_launched_each_run_once(launched: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    first = launched(do)
    assert first is not None
    alphas = [[text for text in overrides if text.startswith("train")] for overrides in first.launched]
    assert alphas == [
        ["train.alpha=0", "train.temperature=1"],
        ["train.alpha=1", "train.temperature=1"],
        ["train.alpha=1", "train.temperature=2"],
    ]
    assert "3 runs: 3 done" in capsys.readouterr().out.splitlines()
    assert launched(do) is None
    second = launched(do, "train.temperature=1,2,4")
    assert second is not None
    assert len(second.launched) == 1
    again = launched(do, "overwrite=true")
    assert again is not None
    assert len(again.launched) == 3


def test_the_report_is_made_where_it_is_missing_and_its_fault_is_not_the_sweep_s(
    launched: Sweep, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reported: list[Path] = []

    def broken(path: Path) -> None:
        reported.append(path)
        raise ValueError("no ink")

    monkeypatch.setattr("kd.analysis.report.write_report", broken)
    for _ in range(2):
        launched(do)
    assert reported == [Path("outputs/default")] * 2
    assert "no ink). To try again: python -m kd.compare outputs/default" in caplog.text
    Path("outputs/default/reports").mkdir()
    Path("outputs/default/reports/report.html").touch()
    launched(do)
    assert len(reported) == 2
    launched(do, "seed=1")
    assert len(reported) == 3


def test_a_child_is_one_run_of_the_same_files(launched: Sweep) -> None:
    launcher = launched(do)
    assert launcher is not None
    for job, overrides in zip(launcher.task.task.jobs, launcher.launched, strict=True):
        assert list(job.arguments) == [
            "hydra.job.config_name=config",
            *overrides,
            "hydra.mode=RUN",
        ]


def test_a_launcher_that_dies_does_not_hide_what_is_done(launched: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KDError, match="2 of 3 runs are missing") as caught:
        launched(crash)
    assert caught.value.exit_code == 1
    assert "3 runs: 1 done, 2 planned" in capsys.readouterr().out.splitlines()


def test_a_finished_run_whose_overwriting_failed_is_not_called_done(launched: Sweep) -> None:
    launched(do)
    with pytest.raises(KDError, match="3 of 3 runs are missing"):
        launched(fail, "overwrite=true")


def test_a_sweep_that_was_stopped_says_so(launched: Sweep) -> None:
    with pytest.raises(Interrupted, match="of 3 runs missing") as caught:
        launched(stop)
    assert caught.value.exit_code == 143
    assert not list(Path("outputs/.hydra").rglob("stop"))


def test_a_sweep_that_overwrites_goes_on_where_it_was_stopped(
    launched: Sweep, caplog: pytest.LogCaptureFixture
) -> None:
    launched(do)
    with pytest.raises(Interrupted):
        launched(stop, "overwrite=true")
    with caplog.at_level("INFO", "kd"):
        rest = launched(do, "overwrite=true")
    assert rest is not None
    assert len(rest.launched) == 1
    assert "Going on with what overwrite=true began" in caplog.text
    anew = launched(do, "overwrite=true")
    assert anew is not None
    assert len(anew.launched) == 3


@pytest.mark.parametrize("again", [[], ["overwrite=true"]], ids=["a new run", "a finished run, done again"])
def test_a_run_that_was_asked_to_stop_has_not_failed(
    launched: Sweep, again: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if again:
        launched(do)
    with pytest.raises(Interrupted, match="1 of 3 runs were stopped") as caught:
        launched(stop_child, *again)
    assert caught.value.exit_code == 143
    assert "failed" not in capsys.readouterr().out


def test_the_summary_names_states_errors_logs_and_last_lines() -> None:
    directories = [Path(f"outputs/x/run{number}") for number in range(5)]
    finish(directories[0])
    log = Path("job.log")
    log.write_text("".join(f"line {number}\n" for number in range(10)))
    write_failure(directories[1], Failure("it broke", 1, str(log)))
    directories[2].mkdir()
    (directories[2] / "config.yaml").touch()
    directories[4].mkdir()
    (directories[4] / RESULT).touch()
    text = summary({directory: run_state(directory) for directory in directories}, {})
    assert text.splitlines() == [
        "run   state        outcome",
        "run0  done         validation perplexity 12.18",
        "run1  failed       it broke",
        "    log: job.log",
        *(f"    | line {number}" for number in range(5, 10)),
        "run2  interrupted",
        "run3  planned",
        "run4  failed       result.json cannot be read: set overwrite=true",
        "5 runs: 1 done, 2 failed, 1 interrupted, 1 planned",
    ]
    assert run_state(directories[3]) is RunState.PLANNED


@pytest.mark.parametrize(
    ("name", "settings", "num_jobs", "share"),
    [
        ("BasicLauncher", {}, 9, (1, None)),
        ("JoblibLauncher", {"n_jobs": 2}, 9, (2, 4)),
        ("JoblibLauncher", {"n_jobs": -1}, 9, (8, 1)),
        ("JoblibLauncher", {"n_jobs": -3}, 9, (6, 1)),
        ("JoblibLauncher", {"n_jobs": -20}, 9, (1, None)),
        ("JoblibLauncher", {"n_jobs": 4}, 2, (2, 4)),
        ("LocalLauncher", {"cpus_per_task": None, "tasks_per_node": 1}, 9, (8, 1)),
        ("LocalLauncher", {"cpus_per_task": 3, "tasks_per_node": 1}, 9, (2, 4)),
        ("LocalLauncher", {"cpus_per_task": 99, "tasks_per_node": 1}, 9, (1, None)),
        ("LocalLauncher", {"cpus_per_task": None, "tasks_per_node": 2}, 9, (4, 1)),
        ("LocalLauncher", {"cpus_per_task": 2, "tasks_per_node": 2}, 9, (2, 2)),
        ("LocalLauncher", {"cpus_per_task": 1, "tasks_per_node": 2}, 1, (1, 4)),
        ("LocalLauncher", {"cpus_per_task": 8, "tasks_per_node": 3}, 9, (1, 2)),
        ("SlurmLauncher", {"cpus_per_task": 6}, 9, (None, 6)),
        ("RayLauncher", {}, 9, (None, None)),
    ],
)
def test_each_launcher_shares_out_eight_cores(
    name: str,
    settings: dict[str, Any],
    num_jobs: int,
    share: tuple[int | None, int | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kd.sweep.num_cores", lambda: 8)
    monkeypatch.setattr(kd.sweep_share, "num_cores", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    launcher = OmegaConf.create({"_target_": f"some.module.{name}", **settings})
    assert share_for(launcher, num_jobs) == Share(*share, ())


def launcher_of(*settings: str) -> DictConfig:
    launcher = composed(*settings, with_hydra=True).hydra.launcher
    assert isinstance(launcher, DictConfig)
    return launcher


def test_no_run_at_a_time_is_refused() -> None:
    launcher = OmegaConf.create({"_target_": "some.module.JoblibLauncher", "n_jobs": 0})
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.n_jobs=0"):
        group_for(launcher)


@needs_submitit
def test_a_job_is_as_many_processes_as_its_launcher_has_tasks() -> None:
    assert group_for(launcher_of()) == GroupSize(1, 1)
    assert group_for(launcher_of("hydra/launcher=submitit")) == GroupSize(1, 1)
    assert group_for(launcher_of("hydra/launcher=submitit", "hydra.launcher.tasks_per_node=2")) == GroupSize(1, 2)
    on_cluster = ("hydra/launcher=slurm", "hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=4")
    for gpus in ("4", "null", "0"):
        group = group_for(launcher_of(*on_cluster, f"hydra.launcher.gpus_per_node={gpus}"))
        assert (group, group.num_processes) == (GroupSize(2, 4), 8)


@needs_submitit
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("slurm", "gpus_per_node=4"), ["gpus_per_node=4", "tasks_per_node=1", "set both to 4"]),
        (("slurm", "tasks_per_node=4"), ["gpus_per_node=1", "tasks_per_node=4", "gpus_per_node=null"]),
        (("slurm", "gpus_per_node=4", "tasks_per_node=2"), ["gpus_per_node=4", "tasks_per_node=2"]),
        (("slurm", "gpus_per_node=2", "tasks_per_node=2", "gpus_per_task=1"), ["gpus_per_task=1", "null"]),
        (("slurm", "nodes=0"), ["hydra.launcher.nodes=0", "at least 1"]),
        (("submitit", "nodes=2"), ["hydra.launcher.nodes=2", "hydra/launcher=slurm"]),
        (("submitit", "gpus_per_node=2"), ["gpus_per_node=2"]),
    ],
)
def test_tasks_that_cannot_be_are_refused_with_the_way_out(settings: tuple[str, ...], words: list[str]) -> None:
    name, *values = settings
    with pytest.raises(ConfigError) as caught:
        group_for(launcher_of(f"hydra/launcher={name}", *(f"hydra.launcher.{value}" for value in values)))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@needs_submitit
def test_the_batch_script_limits_time_and_memory_and_requeues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = sbatch_flags(tmp_path, monkeypatch, "hydra.launcher.partition=long")
    assert {"time=240", "mem=32GB", "cpus-per-task=8", "gpus-per-node=1", "partition=long"} <= flags
    assert {"requeue", "signal=USR2@180", "array=0-1%2", "open-mode=append"} <= flags
    assert {"nodes=1", "ntasks-per-node=1"} <= flags


@needs_submitit
def test_the_batch_script_asks_for_all_nodes_and_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = [f"hydra.launcher.{value}" for value in ("nodes=2", "tasks_per_node=4", "gpus_per_node=4")]
    assert {"nodes=2", "ntasks-per-node=4", "gpus-per-node=4"} <= sbatch_flags(tmp_path, monkeypatch, *size)


def sbatch_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *settings: str) -> set[str]:
    """What SLURM would be asked for."""
    from submitit import SlurmJob

    for name in ("srun", "sbatch"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\ncp "$1" {tmp_path}/script.sh\necho Submitted batch job 7\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(SlurmJob, "results", lambda _: [JobReturn(status=JobStatus.COMPLETED)])
    slurm = ["hydra/launcher=slurm", "hydra.sweep.dir=scratch", *settings]
    config = composed(*slurm, with_hydra=True)
    with hydra() as (loader, _):
        context = HydraContext(config_loader=loader, callbacks=Callbacks())
        launcher = Plugins.instance().instantiate_launcher(context, print, config)
        launcher.launch([["seed=0"], ["seed=1"]], initial_job_idx=0)
    lines = (tmp_path / "script.sh").read_text().splitlines()
    assert lines[-1].startswith("srun ") or lines[-2].startswith("srun ")
    return {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
