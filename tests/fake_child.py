"""`python -m tests.fake_child BEHAVIOUR ...`: stands for a run's process in tests of what becomes of it.

Of several processes each has its own behaviour: FIRST:SECOND.
The run's directory is in the environment, so that further arguments are those that the code under test adds.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from kd.runs import RESULT
from kd.sweep_child import end_with_parent
from kd.torchrun import OTHER_GONE

DIRECTORY = "KD_TEST_DIRECTORY"


def finish(directory: Path) -> None:
    """Write a result."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / RESULT).write_text('{"state": "done", "val_loss": 2.5, "val_ppl": 12.18}')


def save(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
    """Count the requests to stop, and obey the first after a moment."""
    with Path("requests").open("a") as file:
        file.write(f"{signum}\n")
    time.sleep(0.3)
    sys.exit(128 + signum)


def end(behaviour: str) -> None:
    """End without a result, if that is how to behave."""
    if behaviour == "raise":
        raise ValueError("a planned fault")
    if behaviour == "say":
        sys.exit("kd-train: a planned refusal.")
    if behaviour == "say later":
        time.sleep(0.8)
        sys.exit("kd-train (rank 1): a planned refusal.")
    if behaviour == "gone":
        sys.exit(f"kd-train: {OTHER_GONE} (reset by peer).")
    if behaviour == "exit":
        sys.exit(5)
    if behaviour == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "held" and not Path("held").exists():
        Path("held").touch()
        sys.exit(3)


def linger(behaviour: str, directory: Path) -> None:
    """Take a while: deaf, until asked to stop, or beside another process that works."""
    if behaviour in ("sleep", "beside"):
        signal.signal(signal.SIGTERM, save)
        signal.signal(signal.SIGINT, save)
        threading.Thread(target=end_with_parent, daemon=True).start()
    if behaviour == "sleep":
        directory.mkdir(parents=True)
        (directory / "begun").touch()
    if behaviour == "held":
        time.sleep(1)
    if behaviour in ("sleep", "deaf"):
        time.sleep(60)
    while behaviour == "beside" and not (directory / RESULT).exists():
        time.sleep(0.05)


def main() -> None:
    """Behave."""
    directory, behaviour = Path(os.environ[DIRECTORY]), sys.argv[1].split(":")[int(os.environ.get("RANK", "0"))]
    assert not any(name.startswith("TORCHELASTIC_") for name in os.environ)
    print("it began", flush=True)
    with Path("starts").open("a") as file:
        file.write(" ".join([behaviour, *sys.argv[2:], os.environ.get("CUDA_VISIBLE_DEVICES", "-")]) + "\n")
    end(behaviour)
    linger(behaviour, directory)
    if behaviour not in ("nothing", "beside"):
        finish(directory)
    if behaviour == "late":
        os.kill(os.getpid(), signal.SIGABRT)


if __name__ == "__main__":
    main()
