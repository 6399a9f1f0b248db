"""Where a pretrained teacher's files are and what they say, without loading it: no torch, and rarely transformers."""

import importlib.util
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kd.config import HubTeacherConfig, LocalTeacherConfig
from kd.data.hub_access import hub_is_reachable, one_line
from kd.errors import ConfigError, DataError, KDError
from kd.files import digest_of, file_digest
from kd.gguf_header import read_gguf_header, read_gguf_sizes

log = logging.getLogger("kd")

HUB_TIMEOUT_SECONDS = 10.0
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json")
ADAPTER = "adapter_config.json"
"""File beside which transformers, where peft is installed, adds an adapter to whatever weights it loads."""
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")
"""What configurations call the longest sequence; the first that one states counts."""


@dataclass(frozen=True)
class PretrainedTeacher:
    """A pretrained teacher whose files were found; `kd.teacher` loads its weights."""

    model_id: str
    revision: str | None
    gguf_file: str | None
    dtype: str
    fingerprint: str
    """Identity by content: of the files, or of the Hub's commit; with the dtype."""
    vocab_size: int
    """Columns of its logits."""
    max_seq_len: int | None
    """Longest sequence that it was made for, if it says so."""
    commit: str | None = None
    """Of a Hub model, wherever its files are; None for a directory, which is identified by its files."""


def find_teacher(config: HubTeacherConfig | LocalTeacherConfig) -> PretrainedTeacher:
    """Find a pretrained teacher's files and read its configuration, without its weights.

    Raises:
        DataError: if it is not there, or not in the local cache and the Hub cannot be reached.
    """
    if isinstance(config, LocalTeacherConfig):
        return _describe(config.path, None, config.gguf_file, config.dtype, _local_fingerprint(config))
    if Path(config.model_id).is_dir():
        fingerprint = _directory_fingerprint(Path(config.model_id), config.model_id)
        return _describe(config.model_id, config.revision, None, config.dtype, fingerprint)
    location, commit = _locate_on_hub(config.model_id, config.revision)
    return replace(_describe(location, commit, None, config.dtype, commit), commit=commit)


def _describe(
    model_id: str, revision: str | None, gguf_file: str | None, dtype: str, content: str
) -> PretrainedTeacher:
    refuse_adapter(Path(model_id), model_id)
    try:
        vocab_size, max_seq_len = _sizes(model_id, revision, gguf_file)
    except load_errors() as error:
        raise DataError(cannot_load(model_id, revision, gguf_file, error)) from error
    fingerprint = digest_of({"content": content, "dtype": dtype})
    return PretrainedTeacher(model_id, revision, gguf_file, dtype, fingerprint, vocab_size, max_seq_len)


def _sizes(model_id: str, revision: str | None, gguf_file: str | None) -> tuple[int, int | None]:
    """Vocabulary size and longest sequence of a model."""
    if gguf_file is not None:
        _check_gguf_libraries()
        check_gguf_positions(Path(model_id) / gguf_file)
        sizes = read_gguf_sizes(Path(model_id) / gguf_file)
        return sizes.vocab_size, sizes.max_seq_len
    fields = json.loads(_config_file(model_id, revision).read_text(encoding="utf-8"))
    text = fields.get("text_config") or fields if isinstance(fields, dict) else None
    if not isinstance(text, dict):
        raise ValueError("its config.json is not an object of named values")
    vocab_size, max_seq_len = text.get("vocab_size"), _positions(text)
    # What a file does not say is a default of the model's class, and whether a class exists without the
    # repository's own code ("auto_map"), the library knows. Both are rare, and cost the time it takes to import.
    if vocab_size is None or max_seq_len is None or "model_type" not in fields or "auto_map" in fields:
        return _sizes_by_class(model_id, revision)
    return int(vocab_size), max_seq_len


def _positions(fields: dict[str, Any]) -> int | None:
    stated = (fields.get(name) for name in POSITIONS)
    return next((int(value) for value in stated if value is not None), None)


def _config_file(model_id: str, revision: str | None) -> Path:
    if Path(model_id).is_dir():
        return Path(model_id) / "config.json"
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model_id, "config.json", revision=revision))


def _sizes_by_class(model_id: str, revision: str | None) -> tuple[int, int | None]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_id, revision=revision or "main", trust_remote_code=False)
    text = config.get_text_config()
    return text.vocab_size, _positions(text.to_dict())


def _check_gguf_libraries() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"not installed: {', '.join(missing)}; pip install them")


def check_gguf_positions(file: Path) -> None:
    """Raise ValueError if a GGUF file scales its rotary positions in a way that transformers leaves out."""
    if (scaling := read_gguf_header(file).rope_scaling()) is not None:
        raise ValueError(
            f"it scales its rotary positions ({scaling}), which transformers leaves out of what it reads from GGUF, so "
            "its logits would be others. Use the model in Hugging Face's format"
        )


def refuse_adapter(directory: Path, given: str) -> None:
    """Raise DataError if an adapter lies beside a model's weights: whether these have it already, no file says."""
    if (directory / ADAPTER).is_file():
        raise DataError(holds_adapter(given))


def holds_adapter(given: str) -> str:
    """Return the message for a model with an adapter beside its weights."""
    return (
        f"The teacher {given} holds an adapter ({ADAPTER}) beside its weights, and transformers would add it to them, "
        "once more if they have it already. If they have, move the adapter's files away; if not, merge it (peft: "
        "merge_and_unload), save the whole model, and give that."
    )


def _local_fingerprint(config: LocalTeacherConfig) -> str:
    directory = Path(config.path)
    if not directory.is_dir():
        raise DataError(f"teacher.path={config.path} is not a directory: give the folder that holds the model.")
    if config.gguf_file is None:
        return _directory_fingerprint(directory, config.path)
    file = directory / config.gguf_file
    if not file.is_file():
        there = ", ".join(sorted(path.name for path in directory.glob("*.gguf"))) or "none"
        raise DataError(f"teacher.gguf_file={config.gguf_file} is not in {config.path}; GGUF files there: {there}.")
    return file_digest(file)


def _directory_fingerprint(directory: Path, given: str) -> str:
    files = sorted({path for pattern in WEIGHT_FILES for path in directory.glob(pattern)})
    files += [path for path in _shards(directory, given) if path not in files]
    if not any(path.suffix == ".safetensors" for path in files) or not (directory / "config.json").is_file():
        raise DataError(
            f"The teacher's directory {given} must hold config.json and *.safetensors "
            "(or name a GGUF file: teacher=local teacher.path=DIR teacher.gguf_file=FILE)."
        )
    return digest_of({path.relative_to(directory).as_posix(): file_digest(path) for path in files})


def _shards(directory: Path, given: str) -> list[Path]:
    """The files, perhaps in folders, that the index of weights names, where that is what is read."""
    index = directory / INDEX_FILE
    if (directory / WEIGHTS_FILE).is_file() or not index.is_file():
        return []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        paths = sorted(directory / name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{index.name} of the teacher {given} cannot be read ({error!r}): its files are damaged."
        ) from error
    if missing := [path.name for path in paths if not path.is_file()]:
        raise DataError(f"The teacher {given} lacks {missing[0]}, which its {index.name} names: its files are damaged.")
    return paths


def _locate_on_hub(model_id: str, revision: str | None) -> tuple[str, str]:
    """Where to load a Hub model from, and its commit: the Hub's word if it can be reached, else the local cache's."""
    from huggingface_hub import HfApi, hf_hub_download, is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(model_id)
    except HFValidationError as error:
        raise DataError(
            f"teacher.model_id={model_id} is neither a directory nor a Hub id: {one_line(error)}"
        ) from error
    reason = "HF_HUB_OFFLINE is set" if is_offline_mode() else "the Hub cannot be reached"
    try:
        if hub_is_reachable():
            info = HfApi().model_info(model_id, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
            assert info.sha is not None
            if any(file.rfilename == ADAPTER for file in info.siblings or ()):
                raise DataError(holds_adapter(model_id))
            return model_id, info.sha
    except HfHubHTTPError as error:
        reason = f"the Hub answers: {one_line(error)}"
    except KDError:
        raise
    except Exception as error:  # a connection that breaks: its types change with the client's HTTP library
        reason = f"the Hub cannot be reached: {one_line(error)}"
    try:
        cached = hf_hub_download(model_id, "config.json", revision=revision, local_files_only=True)
    except LocalEntryNotFoundError as error:
        raise DataError(
            f"teacher.model_id={model_id} is not in the local cache, and {reason}. Fetch it where there is a network: "
            f"{fetch_command(model_id, revision)}  -- or use a local copy: teacher=local teacher.path=DIR "
            f"(a relative path counts from the working directory, {Path.cwd()})."
        ) from error
    log.info("Using the cached copy of %s, since %s", model_id, reason)
    snapshot = Path(cached).parent  # by path: under its id every file would be asked of the Hub again
    return str(snapshot), snapshot.name


def check_vocabulary(teacher_vocab: int, student_vocab: int) -> None:
    """Check that both models' logits have the same columns.

    Raises:
        ConfigError: naming both sizes.
    """
    if teacher_vocab != student_vocab:
        raise ConfigError(
            f"model.vocab_size={student_vocab}, but the teacher's logits have {teacher_vocab} columns, so they cannot "
            f"be compared: set model.vocab_size={teacher_vocab}."
        )


def load_errors() -> tuple[type[Exception], ...]:
    """Return what the libraries raise for files that are missing, damaged, or of other shapes than config.json says."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError, StrictDataclassError


def cannot_load(model_id: str, revision: str | None, gguf_file: str | None, error: Exception) -> str:
    """Return the message for a model that cannot be read, in one line: what is wrong and the way out."""
    what = f"The teacher {model_id}" + (f" ({gguf_file})" if gguf_file else "")
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if gguf_file and isinstance(error, ImportError | ValueError) and "pip install" in str(error):
        return f"{what} needs the libraries that read GGUF: pip install 'kd-train[gguf]'. ({first_line})"
    if gguf_file:
        return f"{what} cannot be loaded: {first_line}."
    if Path(model_id).is_dir():
        return f"{what} cannot be loaded: {first_line}. The directory must hold config.json and *.safetensors."
    return f"{what} cannot be loaded: {first_line}. Fetch it with: {fetch_command(model_id, revision)}"


def fetch_command(model_id: str, revision: str | None) -> str:
    """Return the shell command that puts a Hub model into the local cache."""
    return f"hf download {model_id}" + (f" --revision {revision}" if revision else "")
