"""The teacher: where its files are, how it is loaded and frozen, and the interface that trainers see."""

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from kd.config import HubTeacherConfig, LocalTeacherConfig
from kd.data.hub_access import hub_is_reachable, one_line
from kd.errors import ConfigError, DataError, NumericError
from kd.files import digest_of, file_digest
from kd.model import StudentModel, forward_flops_per_token, num_parameters

log = logging.getLogger("kd")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUB_TIMEOUT_SECONDS = 10.0
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json")


class Teacher(Protocol):
    """What a trainer sees of a teacher, live or cached."""

    description: str
    """For the log."""
    flops_per_token: float
    """Of what is computed per training token."""

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Return next-token logits (B, L, V) for a batch with `input_ids` (B, L) and `block_id` (B,); no gradient."""
        ...


class LiveTeacher:
    """A teacher that runs on every batch.

    Args:
        model: Takes input_ids (B, L) and returns logits as a tensor, an object with `.logits`, or a mapping
            with "logits". It is put into eval mode, frozen and moved to `device`.
        device: Where it runs.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = freeze(model).to(device)
        self.description = f"{type(model).__name__} (live, {num_parameters(model):,} parameters)"
        self.flops_per_token = 2.0 * num_parameters(model)
        if isinstance(model, StudentModel):
            self.flops_per_token = forward_flops_per_token(model.config, model.config.max_seq_len)

    # Not inference_mode: its tensors cannot enter the student's graph.
    @torch.no_grad()
    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Return next-token logits (B, L, V) of a batch's `input_ids`."""
        return logits_of(self.model(batch["input_ids"]))


def logits_of(output: Any) -> Tensor:
    """Return the logits in a model's output: a tensor, a mapping with "logits", or an object with `.logits`."""
    if isinstance(output, Tensor):
        return output
    logits = output["logits"] if isinstance(output, Mapping) else output.logits
    assert isinstance(logits, Tensor)
    return logits


def freeze(model: nn.Module) -> nn.Module:
    """Put a model into eval mode and switch off the gradients of all its parameters; return it."""
    return model.eval().requires_grad_(False)


def load_teacher_model(
    model_id: str = "Qwen/Qwen2.5-0.5B",
    device: torch.device = torch.device("cuda"),  # noqa: B008 - the contract's default
    *,
    dtype: torch.dtype = torch.float16,
    revision: str | None = None,
    gguf_file: str | None = None,
) -> nn.Module:
    """Load a causal language model to teach: eval mode, every parameter frozen.

    Args:
        model_id: Hub id, or a local directory.
        device: Where it goes.
        dtype: Of its weights. Qwen2 models can overflow in float16; bfloat16 and float32 are safe.
        revision: Branch, tag or commit of a Hub model.
        gguf_file: Name of a GGUF file inside the model's directory.

    Raises:
        DataError: if it cannot be found or read. Weights are read from safetensors or GGUF only, never from
            pickles, and no code of the model's repository is run.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model_id,
            revision=revision or "main",
            gguf_file=gguf_file,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except _load_errors() as error:
        raise DataError(_cannot_load(model_id, revision, gguf_file, error)) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):  # the library would make them up at random
        raise DataError(
            f"The teacher {model_id} lacks {len(missing)} weights, like {missing[0]}: its files are damaged."
        )
    model.config.use_cache = False  # a teacher only ever sees whole blocks
    teacher: nn.Module = freeze(model).to(device)
    return teacher


def _load_errors() -> tuple[type[Exception], ...]:
    """What the libraries raise for files that are missing, damaged, or of other shapes than config.json says."""
    from huggingface_hub.errors import StrictDataclassError

    return OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError, StrictDataclassError


def _cannot_load(model_id: str, revision: str | None, gguf_file: str | None, error: Exception) -> str:
    what = f"The teacher {model_id}" + (f" ({gguf_file})" if gguf_file else "")
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if gguf_file and isinstance(error, ImportError | ValueError) and "pip install" in str(error):
        return f"{what} needs the libraries that read GGUF: pip install 'kd-train[gguf]'. ({first_line})"
    if Path(model_id).is_dir():
        return f"{what} cannot be loaded: {first_line}. The directory must hold config.json and *.safetensors."
    return f"{what} cannot be loaded: {first_line}. Fetch it with: {fetch_command(model_id, revision)}"


def fetch_command(model_id: str, revision: str | None) -> str:
    """Return the shell command that puts a Hub model into the local cache."""
    return f"hf download {model_id}" + (f" --revision {revision}" if revision else "")


@dataclass(frozen=True)
class PretrainedTeacher:
    """A pretrained teacher whose files were found; its weights are not loaded yet."""

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

    def load(self, device: torch.device) -> LiveTeacher:
        """Load the weights."""
        dtype = choose_dtype(self.dtype, device)
        log.info("Loading the teacher %s (%s)", self.model_id, str(dtype).removeprefix("torch."))
        model = load_teacher_model(self.model_id, device, dtype=dtype, revision=self.revision, gguf_file=self.gguf_file)
        return LiveTeacher(model, device)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a name; `auto` is bfloat16 on a GPU that has it, else float32."""
    if name != "auto":
        return DTYPES[name]
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


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
    return _describe(location, commit, None, config.dtype, commit)


def _describe(
    model_id: str, revision: str | None, gguf_file: str | None, dtype: str, content: str
) -> PretrainedTeacher:
    from transformers import AutoConfig

    try:
        # **-style keyword, because from_pretrained takes a missing gguf_file only by its absence.
        named = {"gguf_file": gguf_file} if gguf_file else {}
        config = AutoConfig.from_pretrained(model_id, revision=revision or "main", trust_remote_code=False, **named)
    except _load_errors() as error:
        raise DataError(_cannot_load(model_id, revision, gguf_file, error)) from error
    text = config.get_text_config()
    fields = text.to_dict()
    fingerprint = digest_of({"content": content, "dtype": dtype})
    return PretrainedTeacher(
        model_id, revision, gguf_file, dtype, fingerprint, text.vocab_size, fields.get("max_position_embeddings")
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
    if not any(path.suffix == ".safetensors" for path in files) or not (directory / "config.json").is_file():
        raise DataError(
            f"The teacher's directory {given} must hold config.json and *.safetensors "
            "(or name a GGUF file: teacher=local teacher.path=DIR teacher.gguf_file=FILE)."
        )
    return digest_of({path.name: file_digest(path) for path in files})


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
            commit = HfApi().model_info(model_id, revision=revision, timeout=HUB_TIMEOUT_SECONDS).sha
            assert commit is not None
            return model_id, commit
    except HfHubHTTPError as error:
        reason = f"the Hub answers: {one_line(error)}"
    except Exception as error:  # a connection that breaks: its types change with the client's HTTP library
        reason = f"the Hub cannot be reached: {one_line(error)}"
    try:
        cached = hf_hub_download(model_id, "config.json", revision=revision, local_files_only=True)
    except LocalEntryNotFoundError as error:
        raise DataError(
            f"teacher.model_id={model_id} is not in the local cache, and {reason}. Fetch it where there is a network: "
            f"{fetch_command(model_id, revision)}  -- or use a local copy: teacher=local teacher.path=DIR."
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


def check_teacher(teacher: Teacher, batch: dict[str, Tensor], student_vocab: int) -> None:
    """Check a teacher on one batch: the width of its logits, and that they are finite.

    Raises:
        ConfigError: if the width is not the student's vocabulary.
        NumericError: if a logit is NaN or infinite, as happens with Qwen2 in float16.
    """
    logits = teacher.logits(batch)
    check_vocabulary(logits.size(-1), student_vocab)
    if not torch.isfinite(logits).all():
        bad = int((~torch.isfinite(logits)).any(dim=-1).sum())
        raise NumericError(
            f"The teacher's logits are not finite at {bad} of {logits.shape[:-1].numel()} positions of the first batch "
            f"({str(logits.dtype).removeprefix('torch.')}). Its activations overflow: set teacher.dtype=bfloat16 "
            "(or float32)."
        )
