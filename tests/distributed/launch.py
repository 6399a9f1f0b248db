"""Real processes of torchrun that talk through gloo."""

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.commands import Outcome, environment

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def start(*arguments: str, module: str, ranks: int = 2, **changes: str) -> subprocess.Popen[str]:
    """Start a module in several processes, on one machine, without waiting for them."""
    one_machine = ("--standalone", f"--nproc-per-node={ranks}", "-m", module)
    return start_agent(*one_machine, *arguments, **changes)


def start_agent(*arguments: str, **changes: str) -> subprocess.Popen[str]:
    """Start torchrun itself."""
    return subprocess.Popen(
        [*TORCHRUN, *arguments],
        env=environment(**{"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **changes}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 120) -> Outcome:
    """Wait for the end, and kill all that is left if it does not come."""
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        raise
    return Outcome(process.returncode, output, errors)


def run(*arguments: str, module: str, ranks: int = 2, timeout: float = 120, **changes: str) -> Outcome:
    """Run a module in several processes to its end."""
    return finish(start(*arguments, module=module, ranks=ranks, **changes), timeout)


def ranks_of(agent: subprocess.Popen[str]) -> dict[int, int]:
    """Return the process ids of torchrun's workers, by rank."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            variables = dict(
                entry.split("=", 1) for entry in (folder / "environ").read_text().split("\0") if "=" in entry
            )
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended, or is somebody else's
            continue
        if parent == agent.pid and "RANK" in variables:
            found[int(variables["RANK"])] = int(folder.name)
    return found


def wait_for(path: Path, seconds: float = 60) -> None:
    """Wait until a file is there."""
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not come"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Return whether a process runs."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
