"""Sweeps whose runs are several processes each, which submitit starts on this machine."""

import os
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from kd.sweep_jobs import CHILD
from tests.commands import TINY, begin_children_with, run, start, strict_json

from . import launch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("submitit") is None, reason="the extra slurm is not installed"),
]
IN_PAIRS = ("hydra/launcher=submitit", "hydra.launcher.tasks_per_node=2")
POINT, GRID = "train.alpha=0.5", "train.alpha=0,0.5"
LONG = (*TINY, "train.num_epochs=100", "train.max_steps=120", "train.save_interval=20", "train.eval_interval=1000")
SLURM = {
    "sbatch": r"""#!/bin/sh
of() { sed -n "s/^#SBATCH --$1=//p" "$script"; }
script=$1
export SLURM_JOB_NUM_NODES=$(of nodes) TASKS=$(of ntasks-per-node) SLURM_ARRAY_JOB_ID=7
for number in $(seq 0 $(of array | sed 's/^0-\([0-9]*\)%.*/\1/')); do
    SLURM_JOB_ID=7$number SLURM_ARRAY_TASK_ID=$number sh "$script" >/dev/null 2>&1 </dev/null &
done
echo Submitted batch job 7
""",
    "srun": """#!/bin/sh
while true; do
    case $1 in
    --output | --error) shift 2 ;;
    --*) shift ;;
    *) break ;;
    esac
done
export SLURM_NTASKS=$((SLURM_JOB_NUM_NODES * TASKS))
for rank in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$rank SLURM_LOCALID=$((rank % TASKS)) SLURM_NODEID=$((rank / TASKS)) "$@" &
done
wait
""",
    "sacct": """#!/bin/sh
printf 'JobID|State|NodeList\\n7_0|RUNNING|here\\n7_1|RUNNING|here\\n'
""",
}
"""Stand for SLURM's programs: all jobs of an array at once, all tasks of a job, on this machine."""
FAULT = """
import os
import kd.job
do_run = kd.job.do_run

def faulty(config, files):
    if config.seed == 1 and os.environ["RANK"] == "1":
        raise ValueError("a planned fault")
    return do_run(config, files)

kd.job.do_run = faulty
"""
LIMIT = 60
"""Seconds within which a group must end that has lost a process."""
CURVES = ("train_step", "train_loss", "kl_loss", "grad_norm", "val_loss", "tokens")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def environment(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_CACHE", cache)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def runs(experiment: str) -> list[Path]:
    return sorted(path for path in (Path("outputs") / experiment).iterdir() if path.name != "reports")


def curves(folder: Path) -> dict[str, Any]:
    history = strict_json(folder / "history.json")
    return {key: history[key] for key in CURVES if history[key] is not None}


def assert_same_curves(run: Path, expected: Path, tolerance: float) -> None:
    """Two directories hold the same run, to rounding."""
    assert run.name == expected.name
    found, wanted = curves(run), curves(expected)
    assert found.keys() == wanted.keys()
    for key, column in wanted.items():
        assert found[key] == pytest.approx(column, rel=tolerance), key


def children() -> dict[int, int]:
    """The processes of runs that work in this folder, by rank."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            if not folder.name.isdigit() or CHILD.encode() not in (folder / "cmdline").read_bytes().split(b"\0"):
                continue
            if (folder / "cwd").resolve() == Path.cwd() and launch.is_alive(int(folder.name)):
                (rank,) = (x for x in (folder / "environ").read_bytes().split(b"\0") if x.startswith(b"RANK="))
                found[int(rank[5:])] = int(folder.name)
        except OSError:  # it has just ended, or is somebody else's
            continue
    return found


def leftovers() -> list[str]:
    """The command lines of all processes that work in this folder, but for this one."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and int(folder.name) != os.getpid() and (folder / "cwd").resolve() == Path.cwd():
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return [command for command in found if command]


def wait_for(pattern: str, process: subprocess.Popen[str], seconds: float = 100) -> Path:
    """Return the file of the experiment that comes while a sweep works."""
    until = time.monotonic() + seconds
    while not (found := list(Path("outputs").glob(pattern))):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    return found[0]


def test_a_point_in_two_processes_is_the_run_of_one_with_twice_the_accumulation() -> None:
    outcome = run("-m", *TINY, *IN_PAIRS, POINT, "name=pairs")
    assert outcome.code == 0, outcome.errors
    assert "Each is 2 processes: nodes=1, tasks_per_node=2" in outcome.output
    assert "1 runs: 1 done" in outcome.output
    (pair,) = runs("pairs")
    assert strict_json(pair / "environment.json")["num_processes"] == 2
    alone = run(*TINY, POINT, "train.gradient_accumulation_steps=2", "name=alone")
    assert alone.code == 0, alone.errors
    assert_same_curves(pair, runs("alone")[0], 1e-5)
    again = run("-m", *TINY, *IN_PAIRS, POINT, "name=pairs", "train.strategy=fsdp")
    assert again.code == 0, again.errors
    assert "1 done, 0 to do" in again.output
    assert not leftovers()


def test_a_cluster_of_two_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rehearsed on one, by programs that stand for SLURM's; one point fails before its processes have met."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in SLURM.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    begin_children_with(FAULT, tmp_path / "site", monkeypatch)
    size = ("nodes=2", "tasks_per_node=1", "gpus_per_node=null")
    launcher = ("hydra/launcher=slurm", *(f"hydra.launcher.{value}" for value in size))
    outcome = run("-m", *TINY, *launcher, "seed=0,1", "train.strategy=fsdp")
    assert outcome.code == 1, outcome.errors
    assert "2 runs: 1 done, 1 failed" in outcome.output
    assert "process 1 of 2: ValueError: a planned fault" in outcome.output
    assert not leftovers()


def test_a_killed_process_a_stop_and_the_end() -> None:
    sweep = ("-m", *LONG, *IN_PAIRS, "hydra.launcher.cpus_per_task=999", GRID, "name=broken")  # one at a time
    process = start(*sweep)
    killed = wait_for("broken/*/checkpoints/checkpoint-20/manifest.json", process).parents[2]
    os.kill(children()[1], signal.SIGKILL)
    failure = wait_for("broken/*/failure.json", process, LIMIT)
    assert failure.parent == killed
    assert "process 1 of 2: it was killed by SIGKILL" in strict_json(failure)["error"]
    others = "alpha0.5-*" if killed.name.startswith("alpha0-") else "alpha0-*"
    other = wait_for(f"broken/{others}/checkpoints/checkpoint-20/manifest.json", process).parents[2]
    os.kill(process.pid, signal.SIGTERM)
    outcome = launch.finish(process, LIMIT)
    assert outcome.code == 143, outcome.errors
    assert "1 failed, 1 interrupted" in outcome.output or "1 interrupted, 1 failed" in outcome.output
    assert f"log: {strict_json(failure)['log']}" in outcome.output
    assert not (other / "failure.json").exists()
    assert not leftovers()

    outcome = run(*sweep)
    assert outcome.code == 0, outcome.errors
    assert "2 runs: 2 done" in outcome.output
    unbroken = run(*LONG, "train.alpha=0", "train.gradient_accumulation_steps=2", "name=unbroken")
    assert unbroken.code == 0, unbroken.errors
    assert_same_curves(runs("broken")[0], runs("unbroken")[0], 1e-4)
