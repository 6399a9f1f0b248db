"""A sweep from its command to its summary: what is done stays, what is missing runs, what fails is listed."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, configure_log
from hydra.types import HydraContext
from omegaconf import DictConfig

from kd.composition import CONFIG_NAME, conf_dir
from kd.errors import ConfigError, IntegrityError, Interrupted, KDError
from kd.outcome import headline, objective
from kd.overwriting import SweepOverwriting
from kd.runs import RunState, holder_of, read_failure, read_result, run_state
from kd.stop import signals_to
from kd.sweep_group import GroupSize
from kd.sweep_jobs import Job, StopFile, SweepTask, last_lines
from kd.sweep_points import Point, find_points
from kd.sweep_share import Share, num_cores, share_out

log = logging.getLogger("kd")

NOT_FOR_CHILDREN = ("hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweep", "hydra.mode")
"""Beginnings of Hydra's own overrides that concern the sweep, not its runs."""
LOG_LINES = 5


@dataclass(frozen=True)
class HydraTask:
    """The task function that launchers get: the sweep's run of the number that Hydra gives it."""

    task: SweepTask

    def __call__(self, values: DictConfig) -> float:  # noqa: ARG002 - a task function's signature
        """Do the run; see `SweepTask.run`. What Hydra composed for it, its process composes itself."""
        return self.task.run(int(HydraConfig.get().job.num))


def run_sweep(arguments: list[str], context: HydraContext, master: DictConfig) -> list[float]:
    """Do all runs of a sweep that are not done yet, and print what became of each.

    Args:
        arguments: The overrides, some of them with several values.
        context: Of Hydra.
        master: What the command line composes to, with Hydra's own settings.

    Returns:
        The number to be minimised of each run, in the points' order; see `kd.outcome.objective`.

    Raises:
        KDError: if points or the launcher's settings are not allowed (nothing was started then), or some runs failed.
        Interrupted: if a signal stopped the sweep.
    """
    configure_log(master.hydra.job_logging, master.hydra.verbose)
    group = group_for(master.hydra.launcher)
    points = find_points(arguments, context.config_loader, master, group.num_processes)
    runs: dict[Path, Point] = {}
    for point in points:
        runs.setdefault(point.directory, point)
    again = SweepOverwriting(runs)
    todo = [run for run in runs.values() if not _is_done(run, again)]
    _announce(len(points), len(runs), len(todo), group)
    if any(run.config.overwrite for run in todo):
        again.begin()
    ended = _launch(todo, context, master, group) if todo else Ended({}, set(), set(), None)
    states = {directory: ended.state(directory) for directory in runs}
    print(summary(states, ended.logs), flush=True)
    if ended.signum is None:
        for experiment in dict.fromkeys(directory.parent for directory in states):
            _report(experiment, anew=bool(todo))
    _raise_unless_done(states, ended)
    again.end()
    return [objective(_result_of(directory)) for directory in runs]


def _is_done(run: Point, again: SweepOverwriting) -> bool:
    if run_state(run.directory) is not RunState.DONE:
        return False
    return not run.config.overwrite or again.has_done(run.directory)


def _announce(num_points: int, num_runs: int, num_todo: int, group: GroupSize) -> None:
    shared = f" ({num_points} points, some of which are the same run)" if num_points > num_runs else ""
    log.info("Sweep of %d runs%s: %d done, %d to do", num_runs, shared, num_runs - num_todo, num_todo)
    if group.num_processes > 1:
        log.info("Each is %d processes: nodes=%d, tasks_per_node=%d", group.num_processes, *astuple(group))


# --- launching ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a launch ended."""

    logs: dict[Path, Path]
    """What each run printed, by its directory."""
    failed: set[Path]
    """Runs whose job raised."""
    stopped: set[Path]
    """Runs whose process was asked to stop, by whomever."""
    signum: int | None
    """The signal that stopped the sweep."""

    def state(self, directory: Path) -> RunState:
        """Return the state of a run; an attempt to do a finished one again may have failed, or have been stopped."""
        state = run_state(directory)
        if state is RunState.DONE and directory in self.failed:
            return RunState.FAILED
        return RunState.INTERRUPTED if state is RunState.DONE and directory in self.stopped else state


def _launch(points: Sequence[Point], context: HydraContext, master: DictConfig, group: GroupSize) -> Ended:
    """Do runs by the configured launcher."""
    task = _make_task(points, master, group)
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=context, task_function=HydraTask(task), config=master
    )
    log.info("What each run prints goes to %s/", task.scratch)
    returns: Sequence[JobReturn] = []
    try:
        with signals_to(task.stop.request):
            returns = launcher.launch([list(point.overrides) for point in points], initial_job_idx=0)
    except KeyboardInterrupt:  # a second request to stop
        log.warning("Stopped at once; what was not saved yet is lost")
    except Exception as error:  # a worker of the launcher's died, or its cluster refused: see what is done all the same
        log.warning("The launcher ended early: %s", str(error).strip())
    signum = task.stop.signum()
    task.stop.path.unlink(missing_ok=True)
    raised = {
        job.directory: end._return_value
        for job, end in zip(task.jobs, returns, strict=False)
        if end.status is JobStatus.FAILED
    }
    stopped = {directory for directory, error in raised.items() if isinstance(error, Interrupted)}
    return Ended({job.directory: task.log_of(job) for job in task.jobs}, set(raised) - stopped, stopped, signum)


def _make_task(points: Sequence[Point], master: DictConfig, group: GroupSize) -> SweepTask:
    scratch = _make_scratch(Path(master.hydra.sweep.dir))
    jobs = tuple(
        Job(
            point.directory,
            (*_settings_of_children(master), *point.overrides, "hydra.mode=RUN"),
            point.config.overwrite,
            shares_threads=point.config.threads is None,
            shares_gpus=point.config.device in ("auto", "cuda"),
        )
        for point in points
    )
    pid = os.getpid()
    share = share_for(master.hydra.launcher, len(jobs))
    return SweepTask(jobs, share, scratch, StopFile(scratch / "stop"), pid, group)


def _make_scratch(wanted: Path) -> Path:
    """Make a folder of this sweep's own: another may have begun in the same second."""
    try:
        wanted.mkdir(parents=True)
    except FileExistsError:
        wanted = wanted.with_name(f"{wanted.name}-{os.getpid()}")
        wanted.mkdir()
    return wanted


def _settings_of_children(master: DictConfig) -> list[str]:
    """Return the options and overrides with which a child finds the same configuration files."""
    hydra = master.hydra
    arguments = [] if hydra.job.config_name == CONFIG_NAME else ["--config-name", hydra.job.config_name]
    for source in hydra.runtime.config_sources:
        if source.provider == "command-line":
            arguments += ["--config-dir", source.path]
        if source.provider == "main" and source.path != conf_dir():
            arguments += ["--config-path", source.path]
    own = [text for text in hydra.overrides.hydra if not text.lstrip("+~").startswith(NOT_FOR_CHILDREN)]
    return arguments + own


def group_for(launcher: DictConfig) -> GroupSize:
    """Return how many processes each job is under a launcher's settings.

    Raises:
        ConfigError: if each process would not have one GPU, or the launcher cannot start so many, or none.
    """
    name = _name_of(launcher)
    if name == "JoblibLauncher" and launcher.n_jobs == 0:
        raise ConfigError("hydra.launcher.n_jobs=0 is not allowed: give how many runs at a time, or -1 for all cores.")
    if name not in ("LocalLauncher", "SlurmLauncher"):
        return GroupSize()
    group = GroupSize(launcher.nodes, launcher.tasks_per_node)
    for key, count in asdict(group).items():
        if count < 1:
            raise ConfigError(f"hydra.launcher.{key}={count} is not allowed: it must be at least 1.")
    if name == "LocalLauncher" and group.nodes > 1:
        raise ConfigError(
            f"hydra.launcher.nodes={group.nodes}, but hydra/launcher=submitit starts processes on this machine alone: "
            "leave nodes at 1, or choose hydra/launcher=slurm."
        )
    _check_gpus(launcher, group)
    return group


def _check_gpus(launcher: DictConfig, group: GroupSize) -> None:
    gpus, tasks = launcher.gpus_per_node, group.tasks_per_node
    if gpus and gpus != tasks:
        raise ConfigError(
            f"hydra.launcher.gpus_per_node={gpus} with hydra.launcher.tasks_per_node={tasks}: a process uses one GPU, "
            f"so set both to {max(gpus, tasks)}{' (without GPUs: gpus_per_node=null)' if tasks > 1 else ' or to 1'}."
        )
    if tasks > 1 and _name_of(launcher) == "SlurmLauncher" and launcher.gpus_per_task:
        raise ConfigError(
            f"hydra.launcher.gpus_per_task={launcher.gpus_per_task} with hydra.launcher.tasks_per_node={tasks}: each "
            "process takes the GPU of its number among those of its machine, so it must see all of them. Set "
            f"gpus_per_task=null and gpus_per_node={tasks}."
        )


def _name_of(launcher: DictConfig) -> str:
    return str(launcher._target_.rpartition(".")[2])


def share_for(launcher: DictConfig, num_jobs: int) -> Share:
    """Return what each job may use under a launcher's settings."""
    name = _name_of(launcher)
    if name == "BasicLauncher":
        return share_out(1)
    if name == "JoblibLauncher":
        wanted = launcher.n_jobs
        # As joblib counts: -1 is all cores, -2 all but one.
        return share_out(min(wanted if wanted > 0 else max(1, num_cores() + 1 + wanted), num_jobs))
    if name == "LocalLauncher":  # submitit starts all at once, so the places are the only limit
        tasks = launcher.tasks_per_node
        cores = (launcher.cpus_per_task or 1) * tasks
        return share_out(min(max(1, num_cores() // cores), num_jobs), tasks)
    if name == "SlurmLauncher":
        return Share(None, launcher.cpus_per_task, ())
    return Share(None, None, ())


# --- what became of it -------------------------------------------------------------------------------------------


def summary(states: dict[Path, RunState], logs: dict[Path, Path]) -> str:
    """Return the table of a sweep's runs: state, outcome, and of failed ones the error and the log.

    Args:
        states: By the runs' directories.
        logs: What each run printed, where this sweep worked on it.
    """
    width = max(len(directory.name) for directory in states)
    lines = [f"{'run':{width}}  {'state':11}  outcome"]
    for directory, state in states.items():
        lines.append(f"{directory.name:{width}}  {state:11}  {_remark(directory, state)}".rstrip())
        if state is RunState.FAILED:
            lines += _details(directory, logs)
    counted = ", ".join(f"{count} {state}" for state, count in Counter(states.values()).items())
    return "\n".join([*lines, f"{len(states)} runs: {counted}"])


def _report(experiment: Path, *, anew: bool) -> None:
    """Write an experiment's report and print its answer; a sweep that did nothing makes only one that is missing."""
    if not anew and (experiment / "reports" / "report.html").is_file():
        log.info("The report is there already: %s", experiment / "reports" / "report.html")
        return
    try:
        from kd.analysis.report import write_report  # here, because it loads pandas, scipy and matplotlib

        print(f"\n{write_report(experiment).text()}", flush=True)
    except Interrupted:
        raise
    except Exception as error:  # the runs are safe, so their sweep has not failed
        log.warning(
            "No report (%s: %s). To try again: python -m kd.compare %s", type(error).__name__, error, experiment
        )


def _remark(directory: Path, state: RunState) -> str:
    if state is RunState.DONE:
        return headline(_result_of(directory))
    if state is RunState.RUNNING:
        return f"by {holder_of(directory)}"
    if state is not RunState.FAILED:
        return ""
    failure = read_failure(directory)
    return "result.json cannot be read: set overwrite=true" if failure is None else failure.error


def _details(directory: Path, logs: dict[Path, Path]) -> list[str]:
    failure = read_failure(directory)
    log_file = logs.get(directory) if failure is None else Path(failure.log)
    if log_file is None:
        return []
    return [f"    log: {log_file}", *(f"    | {line}" for line in last_lines(log_file, LOG_LINES))]


def _result_of(directory: Path) -> dict[str, float]:
    result = read_result(directory)
    if result is None:
        raise IntegrityError(f"{directory}/result.json was there and is gone: run the same command again.")
    return result


def _raise_unless_done(states: dict[Path, RunState], ended: Ended) -> None:
    missing = {directory for directory, state in states.items() if state is not RunState.DONE}
    many = f"{len(missing)} of {len(states)} runs"
    if ended.signum is not None:
        raise Interrupted(
            f"Interrupted with {many} missing. The same command goes on from what is saved.", ended.signum
        )
    if missing and missing <= ended.stopped:
        raise Interrupted(f"{many} were stopped (see above). The same command goes on from what is saved.")
    if missing:
        raise KDError(f"{many} are missing (see above). The same command runs them again.")
