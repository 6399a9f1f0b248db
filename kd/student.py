"""A trained student, read back from its run's directory."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.checkpoint import MODEL_FILE, latest_checkpoint, load_weights
from kd.config import ModelConfig
from kd.data import load_tokenizer
from kd.errors import DataError, IntegrityError
from kd.files import read_json
from kd.model import StudentModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class TrainedStudent:
    """A student with the tokenizer that it was trained with."""

    model: StudentModel
    tokenizer: "PreTrainedTokenizerFast"


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a path means: a run's last one, or the checkpoint itself.

    Raises:
        DataError: if there is none.
        IntegrityError: if all of a run's checkpoints are damaged.
    """
    if (path / MODEL_FILE).is_file():
        return path
    # The folder's name is the run's train.checkpoint_dir.
    for folder in sorted({found.parent for found in path.glob("**/checkpoint-*/")}):
        if (latest := latest_checkpoint(folder)) is not None:
            return latest
    raise DataError(f"{path} holds no checkpoint: give a run's directory, like outputs/<name>/<run>.")


def run_record(path: Path) -> dict[str, Any]:
    """Return environment.json of the run that a path (a run's directory or a checkpoint in it) belongs to.

    Raises:
        DataError: if it belongs to no run.
    """
    for directory in (path, *path.resolve().parents[:3]):
        if (directory / "environment.json").is_file():
            record = read_json(directory / "environment.json")
            assert isinstance(record, dict)
            return record
    raise DataError(f"{path} is not a run: give a directory like outputs/<name>/<run>.")


def load_student(path: Path) -> TrainedStudent:
    """Load a run's student, in eval mode, and its tokenizer.

    Args:
        path: A run's directory, or a checkpoint in it.

    Raises:
        DataError: if it is not a run with a checkpoint, or its tokenizer is no longer where it was.
        IntegrityError: if its files are damaged.
    """
    record = run_record(path)
    try:
        config = ModelConfig(**record["identity"]["model"])
        tokenizer = record["inputs"]["tokenizer"]
        source = (tokenizer["location"], tokenizer["revision"], tokenizer["gguf_file"])
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"environment.json of {path} is not as it was written ({error!r}).") from error
    model = StudentModel(config)
    load_weights(find_checkpoint(path), model)
    return TrainedStudent(model.eval(), load_tokenizer(*source))
