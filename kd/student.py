"""A trained student, read back from its run's directory."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kd.checkpoint import load_weights
from kd.checkpoint_files import find_checkpoint, run_record
from kd.config import ModelConfig
from kd.data import load_tokenizer
from kd.errors import IntegrityError
from kd.model import StudentModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class TrainedStudent:
    """A student with the tokenizer that it was trained with."""

    model: StudentModel
    tokenizer: "PreTrainedTokenizerFast"


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
