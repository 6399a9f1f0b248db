"""What `init_from` names: the run whose student a run goes on from. No torch here."""

import glob
from dataclasses import asdict, dataclass
from pathlib import Path

from kd.checkpoint_files import find_checkpoint, run_directory, run_record
from kd.config import ModelConfig
from kd.data import TokenizerSource
from kd.errors import ConfigError, DataError, IntegrityError
from kd.run_tokenizer import own_tokenizer

MAY_DIFFER = ("dropout", "max_seq_len")
"""Settings of a model that no weight depends on."""


@dataclass(frozen=True)
class Start:
    """A student to go on from."""

    checkpoint: Path
    tokenizer: TokenizerSource
    """That it was trained with."""


def find_start(init_from: str, model: ModelConfig) -> Start:
    """Return the last checkpoint, and the tokenizer, of the run that `init_from` names.

    Args:
        init_from: A run's directory, a checkpoint in it, or a pattern that fits one of these alone.
        model: The architecture that the weights must fit.

    Raises:
        ConfigError: if the pattern fits several, or the architecture is another.
        DataError: if there is no such run, or it has no checkpoint yet.
        IntegrityError: if its files are damaged.
    """
    path = _only_match(init_from)
    checkpoint, record = find_checkpoint(path), run_record(path)
    try:
        architecture, tokenizer = record["identity"]["model"], TokenizerSource(**record["inputs"]["tokenizer"])
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"environment.json of {path} is not as it was written ({error!r}).") from error
    _check_architecture(path, architecture, model)
    return Start(checkpoint, own_tokenizer(tokenizer, run_directory(path)))


def _only_match(init_from: str) -> Path:
    if Path(init_from).exists():
        return Path(init_from)
    found = sorted(glob.glob(init_from))
    if not found:
        raise DataError(f"init_from={init_from} does not exist: give a run's directory, like outputs/<name>/<run>.")
    if len(found) > 1:
        raise ConfigError(
            f"init_from={init_from} fits {len(found)} runs, {found[0]} and {found[1]} among them: name one."
        )
    return Path(found[0])


def _check_architecture(path: Path, theirs: dict[str, object], model: ModelConfig) -> None:
    ours = asdict(model)
    different = [name for name in ours if name not in MAY_DIFFER and theirs.get(name) != ours[name]]
    if different:
        settings = " ".join(f"model.{name}={theirs.get(name)}" for name in different)
        raise ConfigError(
            f"init_from={path} is of another architecture than this run's model "
            f"({', '.join(f'model.{name}={ours[name]}' for name in different)}). Add: {settings}"
        )
