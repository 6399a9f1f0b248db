"""Runs training commands, each killed at a chosen call to the file system, and tells what a whole run comes to.

A process that has imported everything forks a child for each command: a start costs milliseconds, not seconds.
As a program it is that process: it reads a line of JSON for each command, and answers with a line.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from .commands import TINY, environment

CALLS = ("rename", "replace", "unlink", "remove", "rmdir", "mkdir", "link", "fsync")
"""Of the module os: what changes which files there are, or makes them last."""
COMMAND = (
    *TINY,
    "teacher.cache=require",
    "data.test_ratio=0.1",
    "train.early_stopping_patience=9",  # saves a step twice, so that a checkpoint is replaced
)
"""Makes everything: tokenizer, blocks, teacher, hidden states, checkpoints, scores, samples."""
OF_AN_ATTEMPT = ("environment.json", "train.log", "config.yaml", "overrides.yaml", "hydra.yaml", "manifest.json")
"""Files that differ between attempts at one run, or hold digests of files that do."""
LEFT = (".*.tmp", ".*.old", "*.partial", ".overwriting")


@dataclass(frozen=True)
class Ending:
    """How a command ended."""

    code: int
    """Minus the signal's number if one killed it."""
    calls: list[str]
    """Those of `CALLS` that it came to, with what they were about."""
    output: str


class Forker:
    """The process that forks, as seen from the one that asks it to."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def run(self, *arguments: str, kill_at: int | None = None, is_done: bool = False, **variables: str) -> Ending:
        """Run a training command in the present folder, killed just before its call number `kill_at` (from 0).

        Args:
            arguments: Of the command.
            kill_at: Which call; None: none.
            is_done: Kill just after the call, not before.
            variables: Of the environment.
        """
        request = {"arguments": arguments, "kill_at": kill_at, "is_done": is_done}
        request |= {"folder": str(Path.cwd()), "variables": variables}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return Ending(**json.loads(self._process.stdout.readline()))


@contextmanager
def forker() -> Iterator[Forker]:
    """Start a process that forks, until the block ends."""
    command = [sys.executable, "-m", "tests.kill_points"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment(), stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield Forker(process)
        finally:
            process.kill()


def fingerprint(outputs: Path, cache: Path) -> dict[str, str]:
    """Return the digests of all that finished runs and the cache hold, by file, apart from what a clock determines."""
    from kd.checkpoint import load_state

    found: dict[str, str] = {}
    for path in sorted([*outputs.glob("*/*/**/*"), *cache.glob("*/*/**/*")]):
        name = path.relative_to(outputs.parent).as_posix()
        if path.name == "state.json":
            state = load_state(path.parent)
            del state["wall_seconds"], state["history"]["timing"]
            found[name] = _digest(json.dumps(state, default=lambda tensor: tensor.tolist()).encode())
        elif path.name in ("history.json", "result.json"):
            values = json.loads(path.read_text())
            del values["timing"]
            found[name] = _digest(json.dumps(values).encode())
        elif path.is_file() and path.name not in OF_AN_ATTEMPT:
            found[name] = _digest(path.read_bytes())
    return found


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def left_over(folder: Path) -> list[str]:
    """Return the names of what killed processes have left, and nobody has removed."""
    return sorted(str(path.relative_to(folder)) for pattern in LEFT for path in folder.rglob(pattern))


# --- the process that forks ---------------------------------------------------------------------------------------


def _serve() -> None:
    for module in ("kd.attempt", "kd.job", "kd.train", "transformers.models.auto.tokenization_auto"):
        import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(request["folder"])
        files = [folder / ".output", folder / ".calls"]
        for path in files:
            path.write_bytes(b"")
        child = os.fork()
        if child == 0:
            _be_a_command(request, *files)
        _, status = os.waitpid(child, 0)
        output, calls = (path.read_text() for path in files)
        for path in files:
            path.unlink()
        answer = {"code": os.waitstatus_to_exitcode(status), "calls": calls.splitlines(), "output": output}
        print(json.dumps(answer), flush=True)


def _be_a_command(request: dict[str, Any], output: Path, calls: Path) -> None:
    """Run one command and end the process; never returns."""
    code = 1
    try:
        os.chdir(request["folder"])
        os.environ.update(request["variables"])
        for stream in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), stream)
        _watch(os.open(calls, os.O_WRONLY | os.O_APPEND), request["kill_at"], request["is_done"])
        sys.argv = ["kd-train", *request["arguments"]]
        from kd.train import main

        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _watch(log: int, kill_at: int | None, is_done: bool) -> None:
    """Note each of the calls in a file, and kill this process at one of them."""
    count = 0

    def watched(name: str) -> Any:
        call = getattr(os, name)

        def noted(*arguments: Any, **keywords: Any) -> Any:
            nonlocal count
            if not _has_effect(name, arguments, keywords):
                return call(*arguments, **keywords)
            number, count = count, count + 1
            about = os.readlink(f"/proc/self/fd/{arguments[0]}") if name == "fsync" else " ".join(map(str, arguments))
            os.write(log, f"{name} {about}\n".encode())
            if number == kill_at and not is_done:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return call(*arguments, **keywords)
            finally:
                if number == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        return noted

    for name in CALLS:
        setattr(os, name, watched(name))


def _has_effect(name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """Return whether a call does anything: not if it makes a folder that is there, or removes what is not."""
    if "dir_fd" in keywords:  # of a tree that is being removed
        return True
    is_there = name != "fsync" and os.path.lexists(arguments[0])
    return {"mkdir": not is_there, "unlink": is_there, "remove": is_there}.get(name, True)


if __name__ == "__main__":
    _serve()
