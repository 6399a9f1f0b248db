"""A trained student, read back from its run's directory."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kd.checkpoint import load_weights
from kd.checkpoint_files import QUANTIZED, find_checkpoint, run_directory, run_record
from kd.config import IntegerConfig, ModelConfig
from kd.data import TokenizerSource
from kd.errors import IntegrityError
from kd.model import StudentModel
from kd.quantization import load_quantized, quantize
from kd.run_tokenizer import own_tokenizer, require_there

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class TrainedStudent:
    """A student with the tokenizer that it was trained with."""

    model: StudentModel
    tokenizer: "PreTrainedTokenizerFast"


def load_student(path: Path) -> TrainedStudent:
    """Load a run's student, in eval mode, and its tokenizer.

    That of a run which trained for integer weights has these; it is made from the checkpoint's where one is named, or
    where the run is not done.

    Args:
        path: A run's directory, or a checkpoint in it.

    Raises:
        ConfigError: if a package that it needs is not installed.
        DataError: if it is not a run with a checkpoint, or it is an older one whose tokenizer is gone.
        IntegrityError: if its files are damaged.
    """
    record = run_record(path)
    try:
        config = ModelConfig(**record["identity"]["model"])
        integers = record["identity"].get("quantization")
        quantization = None if integers is None else IntegerConfig(**integers)
        source = TokenizerSource(**record["inputs"]["tokenizer"])
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"environment.json of {path} is not as it was written ({error!r}).") from error
    source = own_tokenizer(source, run_directory(path))
    require_there(source, run_directory(path))
    model = StudentModel(config)
    integers_at = path if path.resolve().name == QUANTIZED else path / QUANTIZED
    if quantization is not None and integers_at.is_dir():
        load_quantized(integers_at, model, quantization)
    else:
        load_weights(find_checkpoint(path), model)
        if quantization is not None:
            quantize(model, quantization)
    return TrainedStudent(model.eval(), source.load())
