"""Which checkpoints a run has, and which of them are whole; what is in them needs `kd.checkpoint`, and torch."""

import logging
import re
from pathlib import Path
from typing import Any

from kd.errors import DataError, IntegrityError
from kd.files import check_directory, read_json

log = logging.getLogger(__name__)

MODEL_FILE = "model.safetensors"
ADAPTER_FILE = "adapters.safetensors"
"""In place of the model's, where adapters train: they alone."""
MERGED = "merged"
"""Folder of a finished run with adapters: the model's file, with what they have learned in its weights."""
QUANTIZED = "quantized"
"""Folder of a finished run that trained for integer weights: the model's file with these (`kd.quantization`)."""


def latest_checkpoint(*folders: Path) -> Path | None:
    """Return the `checkpoint-{step}` of some folders with the highest step that is whole, or None if there is none.

    Damaged ones are passed over with a warning.

    Raises:
        IntegrityError: if there are checkpoints but every one is damaged.
    """
    paths = {path for folder in folders for path in folder.glob("checkpoint-*")}
    found = [(int(match[1]), path) for path in paths if (match := _step_of(path))]
    for _, path in sorted(found, reverse=True):
        try:
            check_directory(path, digests=True)
        except IntegrityError as error:
            log.warning("Passing over a damaged checkpoint: %s", error)
            continue
        return path
    if found:
        places = " and ".join(sorted({str(path.parent) for _, path in found}))
        raise IntegrityError(
            f"All {len(found)} checkpoints in {places} are damaged, so the run cannot be "
            "continued. Remove them to start it afresh."
        )
    return None


def checkpoint_folders(directory: Path) -> list[Path]:
    """Return the folders inside a run's directory that hold checkpoints, whatever train.checkpoint_dir called them."""
    return sorted({path.parent for path in directory.glob("**/checkpoint-*/") if _step_of(path)})


def _step_of(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"checkpoint-(\d+)", path.name)


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a path means: a run's last one, or the checkpoint itself.

    Of a run with adapters these are the merged weights.

    Raises:
        DataError: if there is none, or none but of adapters or integers.
        IntegrityError: if all of a run's checkpoints are damaged.
    """
    if path.resolve().name == QUANTIZED:
        raise DataError(f"{path} holds integer weights, which cannot train: give the run's directory.")
    for directory in (path, path / MERGED):
        if (directory / MODEL_FILE).is_file():
            return directory
    _refuse_adapters(path)
    if (latest := latest_checkpoint(*checkpoint_folders(path))) is not None:
        _refuse_adapters(latest)
        return latest
    raise DataError(f"{path} holds no checkpoint: give a run's directory, like outputs/<name>/<run>.")


def _refuse_adapters(checkpoint: Path) -> None:
    if (checkpoint / ADAPTER_FILE).is_file():
        raise DataError(
            f"{checkpoint} holds adapters alone, without the weights that they stand beside: finish the run by the "
            f"command that began it, and give its directory, which then has whole weights in {MERGED}/."
        )


def run_record(path: Path) -> dict[str, Any]:
    """Return environment.json of the run that a path (a run's directory or a checkpoint in it) belongs to.

    Raises:
        DataError: if it belongs to no run.
    """
    record = read_json(run_directory(path) / "environment.json")
    assert isinstance(record, dict)
    return record


def run_directory(path: Path) -> Path:
    """Return the directory of the run that a path (this directory itself or a checkpoint in it) belongs to.

    Raises:
        DataError: if it belongs to no run.
    """
    for directory in (path, *path.resolve().parents[:3]):
        if (directory / "environment.json").is_file():
            return directory
    raise DataError(f"{path} is not a run: give a directory like outputs/<name>/<run>.")
