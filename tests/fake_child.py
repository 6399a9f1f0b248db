"""`python -m tests.fake_child BEHAVIOUR ...`: stands for a run's process in tests of what becomes of it.

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


def main() -> None:
    """Behave."""
    directory, behaviour = Path(os.environ[DIRECTORY]), sys.argv[1]
    print("it began", flush=True)
    with Path("starts").open("a") as file:
        file.write(" ".join([behaviour, *sys.argv[2:], os.environ.get("CUDA_VISIBLE_DEVICES", "-")]) + "\n")
    if behaviour == "raise":
        raise ValueError("a planned fault")
    if behaviour == "say":
        sys.exit("kd-train: a planned refusal.")
    if behaviour == "exit":
        sys.exit(5)
    if behaviour == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "held" and not Path("held").exists():
        Path("held").touch()
        sys.exit(3)
    if behaviour == "sleep":
        signal.signal(signal.SIGTERM, save)
        signal.signal(signal.SIGINT, save)
        threading.Thread(target=end_with_parent, daemon=True).start()
        directory.mkdir(parents=True)
        (directory / "begun").touch()
        time.sleep(60)
    if behaviour != "nothing":
        finish(directory)
    if behaviour == "late":
        os.kill(os.getpid(), signal.SIGABRT)


if __name__ == "__main__":
    main()
