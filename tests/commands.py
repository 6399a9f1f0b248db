"""Runs the command line as a user does: a process of its own, in a folder of its own."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kd.sweep_jobs import CHILD

REPOSITORY = Path(__file__).resolve().parents[1]

TINY = (
    "debug=fast",
    "model.vocab_size=512",
    "data.sample_size=400000",
    "teacher.model.hidden_size=32",
    "teacher.model.num_layers=1",
    "teacher.model.num_heads=2",
    "teacher.model.num_kv_heads=1",
    "teacher.model.intermediate_size=64",
    "teacher.train.max_steps=4",
    "teacher.train.save_interval=2",
    "teacher.train.warmup_steps=1",
    "data.seq_len=32",
    "threads=1",
)
"""The embedded default at the size of seconds."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    output: str
    errors: str


def environment(**changes: str) -> dict[str, str]:
    """This process's environment with the checkout importable."""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(REPOSITORY)]))
    return {**os.environ, "PYTHONPATH": path, **changes}


def begin_children_with(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every process that a sweep starts for a run begin with a program."""
    lines = ["import sys", "", f"if {CHILD!r} in sys.orig_argv:", textwrap.indent(program, "    ")]
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("\n".join(lines))
    monkeypatch.setenv("PYTHONPATH", str(folder))


def start(*arguments: str, module: str = "kd.train", **changes: str) -> subprocess.Popen[str]:
    """Start a command without waiting for it."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(*arguments: str, module: str = "kd.train", timeout: float = 120, **changes: str) -> Outcome:
    """Run a command to its end."""
    process = start(*arguments, module=module, **changes)
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Outcome(process.returncode, output, errors)


def only_run(experiment: str = "debug") -> Path:
    """The one run directory of an experiment."""
    (directory,) = (path for path in (Path("outputs") / experiment).iterdir() if path.is_dir())
    return directory


def strict_json(path: Path) -> Any:
    """Read JSON, refusing the NaN and Infinity that Python's reader lets pass."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{path} holds {word}")

    return json.loads(path.read_text(), parse_constant=refuse)


HEAVY = ("torch", "transformers", "datasets")
LISTING = f"""
import sys
from kd.train import main
try:
    main()
finally:
    print("imported:", *sorted(set({HEAVY}) & sys.modules.keys()))
"""


def run_and_list(*arguments: str) -> tuple[Outcome, list[str]]:
    """Run a training command to its end; return also which of torch, transformers and datasets it imported."""
    answer = subprocess.run(
        [sys.executable, "-c", LISTING, *arguments], env=environment(), capture_output=True, text=True, check=False
    )
    output, _, imported = answer.stdout.rpartition("imported:")
    return Outcome(answer.returncode, output, answer.stderr), imported.split()
