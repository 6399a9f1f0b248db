"""A run on disk: its identity, directory, state, lock, history and result. No torch here.

outputs/<name>/<settings>-<hash>/
  config.yaml, .hydra/     the resolved configuration, and Hydra's own record
  environment.json         versions, commit, and what the identity was made of
  history.json             all measured series (strict JSON)
  checkpoints/             checkpoint-{step}/
  tokenizer/               the tokenizer, shared with the cache by hard links where that is on the same disk
  val_blocks.npy, test_blocks.npy, samples.txt, train.log
  result.json              written last: the run is done
  failure.json             how the last attempt of a sweep at it failed; the next attempt removes it
"""

import importlib.metadata
import logging
import math
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from kd.config import Config, DPOConfig, ORPOConfig, TrainingConfig
from kd.errors import IntegrityError, ResourceError, RunHeldError
from kd.files import canonical_json, digest_of, file_digest, read_json, remove_path, write_json, write_text
from kd.torchrun import num_processes

log = logging.getLogger(__name__)

OUTPUTS = Path("outputs")
RESULT, FAILURE, ENVIRONMENT, LOCK = "result.json", "failure.json", "environment.json", ".lock"
PATIENCE_SECONDS = 0.3
"""How long a lock is asked for before its run counts as held: whoever reads a state holds it for an instant."""
SCHEMA_VERSION = 1
HALF_PRECISION = 2
"""What it rounds: the student in training alone. In runs without this mark in their identity: the scores too."""
LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "safetensors", "numpy", "hydra-core", "peft", "torchao")
COLUMNS = (
    "train_step",
    "train_loss",
    "kl_loss",
    "ce_loss",
    "learning_rate",
    "grad_norm",
    "val_step",
    "val_loss",
    "val_ppl",
    "val_kl",
    "val_agreement",
    "val_bits_per_byte",
)
"""Series that every history has, null where they cannot be known."""
TOTALS = ("teacher_val_ppl", "tokens", "flops", "parameters")
Number = float | int | None


@dataclass(frozen=True)
class Fingerprints:
    """The inputs of a run by content: SHA-256 digests, or a Hub commit."""

    corpus: str
    tokenizer: str
    teacher: str | None
    init_from: str | None = None


@dataclass(frozen=True)
class RunIdentity:
    """What determines a run's result, and the name that follows from it."""

    experiment: str
    settings: str
    content: dict[str, Any]

    @property
    def digest(self) -> str:
        """First 8 hexadecimal digits of the content's SHA-256."""
        return digest_of(self.content)[:8]

    @property
    def directory(self) -> Path:
        """The run's directory, relative to the working directory."""
        return OUTPUTS / self.experiment / f"{self.settings}-{self.digest}"


def run_identity(config: Config, fingerprints: Fingerprints, num_processes: int = 1) -> RunIdentity:
    """Return the identity of the run that a configuration and its inputs determine.

    Several processes are the same run as one that accumulates as many micro-batches: what counts is their product.
    Device, threads, tracker, paths and the intervals of logging and saving do not enter. At `alpha=0`
    neither temperature nor teacher do: there is one baseline.
    """
    train = config.train.identity()
    train["gradient_accumulation_steps"] *= num_processes
    teacher, settings = fingerprints.teacher, config.train.trainer
    if isinstance(config.train, TrainingConfig):
        settings = f"alpha{config.train.alpha:g}"
        if config.train.alpha > 0:
            settings += f"-temperature{config.train.temperature:g}".replace("+", "")  # of 1e+06: names have no plus
        else:
            teacher = None
            del train["temperature"]
    elif isinstance(config.train, DPOConfig | ORPOConfig):
        settings += f"-beta{config.train.beta:g}"
    settings += config.adapter.label + config.quantization.label
    content = {
        "schema": SCHEMA_VERSION,
        "trainer": config.train.trainer,
        "model": asdict(config.model),
        "train": train,
        **config.data.identity(),
        "seed": config.seed,
        "corpus": fingerprints.corpus,
        "tokenizer": fingerprints.tokenizer,
        "teacher": teacher,
        "init_from": fingerprints.init_from,
    }
    # Only where there is any, so that runs from before there was such a thing are still known.
    half = HALF_PRECISION if config.train.precision != "float32" else None
    later = {"adapter": asdict(config.adapter), "quantization": asdict(config.quantization), "half_precision": half}
    content |= {name: values for name, values in later.items() if values}
    return RunIdentity(config.name, f"{settings}-seed{config.seed}", content)


def check_outputs(experiment: str) -> None:
    """Check that runs of an experiment can be written, without making anything.

    Raises:
        ResourceError: if a file stands in the way or a folder cannot be written.
    """
    for path in (OUTPUTS, OUTPUTS / experiment):
        if path.exists() and not path.is_dir():
            raise ResourceError(f"{path.absolute()} is a file, but runs need a folder there: move it away.")
    existing = next(path for path in (OUTPUTS / experiment, OUTPUTS, Path.cwd()) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ResourceError(f"{existing.absolute()} cannot be written: change its permissions or work elsewhere.")


class RunState(StrEnum):
    """What a run's directory says about it."""

    PLANNED = "planned"
    """Nothing was made yet."""
    RUNNING = "running"
    """A live process holds it."""
    INTERRUPTED = "interrupted"
    """Begun and given up; the same command goes on from the last checkpoint."""
    FAILED = "failed"
    """The last attempt ended with a fault, or the result cannot be read."""
    DONE = "done"
    """The result is there."""


def run_state(directory: Path) -> RunState:
    """Return the state of the run in a directory, from the disk alone; nothing is made or changed."""
    before = _finished(directory)
    held = before is None and is_held(directory)
    # Asked again: a run may end between the two questions, and it writes its result before it lets go.
    finished = before if before is not None else _finished(directory)
    if finished is not None:
        return finished
    if held:
        return RunState.RUNNING
    if (directory / FAILURE).is_file():
        return RunState.FAILED
    begun = directory.is_dir() and any(path.name != LOCK for path in directory.iterdir())
    return RunState.INTERRUPTED if begun else RunState.PLANNED


def _finished(directory: Path) -> RunState | None:
    try:
        return None if read_result(directory) is None else RunState.DONE
    except IntegrityError:
        return RunState.FAILED


def is_held(directory: Path) -> bool:
    """Return whether a live process holds the run in a directory; makes nothing."""
    if not (directory / LOCK).is_file():
        return False
    lock = FileLock(directory / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # a folder of somebody else's, which no process of ours can hold
        return False
    lock.release()
    return False


def holder_of(directory: Path) -> str:
    """Return in words which process holds, or last held, the run in a directory."""
    try:
        process = read_json(directory / ENVIRONMENT)["process"]
        return f"process {process['pid']} on {process['host']}"
    except (IntegrityError, KeyError, TypeError):
        return "another process"


def read_result(directory: Path) -> dict[str, Any] | None:
    """Return the result of the run in a directory, or None while it is not done.

    Raises:
        IntegrityError: if the file is there but unreadable.
    """
    file = directory / RESULT
    if not file.is_file():
        return None
    result = read_json(file)
    if not isinstance(result, dict) or result.get("state") != "done":
        raise IntegrityError(f"{file} is not a result. Set overwrite=true to do the run again.")
    return result


@dataclass(frozen=True)
class Failure:
    """How an attempt at a run ended that failed."""

    error: str
    """In a line, with the way out where one is known."""
    exit_code: int | None
    """Of its process; minus the signal's number if one killed it."""
    log: str
    """File with all that it printed."""


def write_failure(directory: Path, failure: Failure) -> None:
    """Record in a run's directory, made if need be, that the last attempt failed."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / FAILURE, asdict(failure))


def read_failure(directory: Path) -> Failure | None:
    """Return how the last attempt at the run in a directory failed; None if nothing readable says that it did."""
    try:
        values = read_json(directory / FAILURE)
        return Failure(str(values["error"]), values["exit_code"], str(values["log"]))
    except (IntegrityError, KeyError, TypeError):
        return None


def forget_failure(directory: Path) -> None:
    """Remove the record of a failed attempt, since a new one begins."""
    (directory / FAILURE).unlink(missing_ok=True)


@dataclass
class History:
    """Everything a run measures. Columns of `train` share `train_step`, those of `validation` share `val_step`."""

    train: dict[str, list[Number]] = field(default_factory=dict)
    validation: dict[str, list[Number]] = field(default_factory=dict)
    totals: dict[str, Number] = field(default_factory=dict)
    """Single values: tokens, flops, parameters, teacher_val_ppl, test_loss, ..."""
    notes: dict[str, str] = field(default_factory=dict)
    """Why a value is null, by key."""
    timing: dict[str, Any] = field(default_factory=dict)
    """All that a clock or the machine determines; equality of runs leaves it out."""

    def append(self, columns: dict[str, list[Number]], row: dict[str, Number]) -> None:
        """Add a row to `self.train` or `self.validation`; a value that is not finite becomes null with a note."""
        for key, value in row.items():
            columns.setdefault(key, []).append(self.finite(key, value))

    def finite(self, key: str, value: Number) -> Number:
        """Return the value, or None with a note where it is NaN or infinite (strict JSON has neither)."""
        if value is None or math.isfinite(value):
            return value
        self.notes[key] = f"a value was {value}"
        return None

    def to_json(self) -> dict[str, Any]:
        """Return the history as one flat object; a column that is null throughout is null as a whole."""
        columns: dict[str, Any] = dict.fromkeys(COLUMNS, None)
        for key, values in (self.train | self.validation).items():
            columns[key] = None if values and all(value is None for value in values) else values
        flat = {"schema_version": SCHEMA_VERSION} | columns | dict.fromkeys(TOTALS, None) | self.totals
        unknown = {key: "not measured in this run" for key, value in flat.items() if value is None}
        return flat | {"notes": unknown | self.notes, "timing": self.timing}


class Run:
    """One run's directory and what may be done with it."""

    def __init__(self, identity: RunIdentity) -> None:
        self.identity = identity
        self.directory = identity.directory

    @property
    def result_file(self) -> Path:
        """`result.json`, whose presence says that the run is done."""
        return self.directory / RESULT

    def result(self) -> dict[str, Any] | None:
        """Return the finished run's result, or None while the run is not done; see `read_result`."""
        return read_result(self.directory)

    def refuse_if_held(self) -> None:
        """Raise RunHeldError if a live process holds the run; makes nothing."""
        if self.directory.is_dir():
            with self.hold():
                pass

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Make the directory and hold it against other processes until the block ends.

        Raises:
            RunHeldError: if a live process holds it. The lock is the operating system's: it ends with its process.
            ResourceError: if the directory cannot be made.
        """
        lock = self._acquire()
        try:
            yield
        finally:
            lock.release()

    def _acquire(self) -> BaseFileLock:
        lock = FileLock(self.directory / LOCK)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=PATIENCE_SECONDS)
        except Timeout as error:
            raise RunHeldError(
                f"{self.directory} is being worked on by {holder_of(self.directory)}: wait for it."
            ) from error
        except OSError as error:
            raise ResourceError(f"{self.directory.absolute()} cannot be made or written: {error}.") from error
        return lock

    def clear(self) -> None:
        """Remove what an earlier attempt left, result first, so that a half-cleared run never counts as done."""
        self.result_file.unlink(missing_ok=True)
        for path in list(self.directory.iterdir()):
            if path.name != LOCK:
                remove_path(path)

    def write_configuration(self, files: dict[str, str], environment: dict[str, Any]) -> None:
        """Write config.yaml and Hydra's files (by relative name) and environment.json; say what changed since."""
        forget_failure(self.directory)
        before = self.directory / ENVIRONMENT
        if before.is_file():
            _warn_of_changes(read_json(before), environment)
        for name, text in files.items():
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
        write_json(before, environment)

    def write_result(self, result: dict[str, Any]) -> None:
        """Mark the run as done."""
        write_json(self.result_file, {"state": "done", "run": self.directory.name, **result})


def _warn_of_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    for key in ("libraries", "code", "python"):
        if canonical_json(before.get(key)) != canonical_json(now[key]):
            log.warning("Continuing a run that was started with another %s: %s, now %s", key, before.get(key), now[key])


def describe_environment(identity: RunIdentity, **inputs: Any) -> dict[str, Any]:
    """Return what environment.json holds: versions, code, machine, process, identity and the given inputs."""
    return {
        "libraries": {name: _version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "code": _code_version(),
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
        "process": {"pid": os.getpid(), "host": socket.gethostname(), "arguments": sys.argv[1:]},
        "num_processes": num_processes(),
        "identity": identity.content,
        "inputs": inputs,
    }


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _code_version() -> dict[str, str | None]:
    package = Path(__file__).parent
    digests = {str(path.relative_to(package)): file_digest(path) for path in sorted(package.rglob("*.py"))}
    commit, git = None, shutil.which("git")
    if git is not None and (package.parent / ".git").exists():
        command = [git, "-C", str(package.parent), "rev-parse", "HEAD"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        commit = answer.stdout.strip() or None
    return {"sha256": digest_of(digests), "commit": commit}
