"""The teacher: how it is loaded and frozen, and the interface that trainers see."""

import logging
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kd.errors import DataError, NumericError
from kd.gguf_header import read_gguf_header
from kd.heads import LinearHead, NoLinearHeadError, SplitModel, logits_of
from kd.model import StudentModel, forward_flops_per_token, num_parameters
from kd.teacher_files import (
    PretrainedTeacher,
    cannot_load,
    check_gguf_positions,
    check_vocabulary,
    holds_adapter,
    load_errors,
    refuse_adapter,
)

log = logging.getLogger("kd")

OLD_BUFFERS = (".attn.bias", ".attention.bias", ".masked_bias", ".inv_freq")
"""Ends of the names of constants that older versions of transformers kept beside the weights."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Teacher(Protocol):
    """What a trainer sees of a teacher, live or cached."""

    description: str
    """For the log."""
    flops_per_token: float
    """Of what is computed per training token."""

    @property
    def head(self) -> LinearHead | None:
        """The head that turns `hidden` into `logits`; None for a teacher that gives logits only."""
        ...

    def hidden(self, batch: dict[str, Tensor]) -> Tensor:
        """Return what the head sees (B, L, width) for a batch with `input_ids` (B, L) and `block_id` (B,); no
        gradient. Only where there is a head.
        """
        ...

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Return next-token logits (B, L, V) of the same batch; no gradient."""
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
        self.no_head = ""
        """Why there is no head; empty if there is one."""
        self._split: SplitModel | None = None
        try:
            self._split = SplitModel(model)
        except NoLinearHeadError as error:
            self.no_head = str(error)

    @property
    def head(self) -> LinearHead | None:
        """The model's head; None where it has none that is linear."""
        return None if self._split is None else self._split.head

    # Not inference_mode: its tensors cannot enter the student's graph.
    @torch.no_grad()
    def hidden(self, batch: dict[str, Tensor]) -> Tensor:
        """Return what the head sees, (B, L, width), of a batch's `input_ids`."""
        if self._split is None:
            raise ValueError(f"The teacher has no hidden states to give: {self.no_head}.")
        with self._own_precision(batch):
            return self._split.hidden(batch["input_ids"])

    @torch.no_grad()
    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Return next-token logits (B, L, V) of a batch's `input_ids`."""
        with self._own_precision(batch):
            return logits_of(self.model(batch["input_ids"]))

    @staticmethod
    def _own_precision(batch: dict[str, Tensor]) -> AbstractContextManager[None]:
        """What the student is computed in is not the teacher's concern; cached hidden states do not know of it."""
        return torch.autocast(batch["input_ids"].device.type, enabled=False)


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

    refuse_adapter(Path(model_id), model_id)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    local_gguf = Path(model_id, gguf_file) if gguf_file and Path(model_id, gguf_file).is_file() else None
    try:
        if local_gguf is not None:
            check_gguf_positions(local_gguf)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model_id,
            revision=revision or "main",
            gguf_file=gguf_file,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except load_errors() as error:
        raise DataError(cannot_load(model_id, revision, gguf_file, error)) from error
    model, report = loaded
    unexpected = list(report["unexpected_keys"])
    if local_gguf is not None:  # what has no place is left out there before the library counts
        has_biases = any(name.endswith(".bias") for name in model.state_dict())
        num_layers = model.config.get_text_config().num_hidden_layers
        unexpected += read_gguf_header(local_gguf).unused(num_layers, has_biases=has_biases)
    _check_weights(model_id, model, list(report["missing_keys"]), unexpected)
    model.config.use_cache = False  # a teacher only ever sees whole blocks
    teacher: nn.Module = freeze(model).to(device)
    return teacher


def _check_weights(model_id: str, model: nn.Module, missing: list[str], unexpected: list[str]) -> None:
    """Check that the model took all weights of its files and found all of its own there, and no others besides."""
    if missing:  # the library would make them up at random
        raise DataError(
            f"The teacher {model_id} lacks {len(missing)} weights, like {min(missing)}: its files are damaged, or are "
            f"those of another kind of model than {type(model).__name__}."
        )
    if unused := sorted(name for name in unexpected if not name.endswith(OLD_BUFFERS)):
        raise DataError(
            f"The teacher {model_id} has {len(unused)} weights that {type(model).__name__} does not take, like "
            f"{unused[0]}: its config.json is not that of its weights, or it is another kind of model. Give a causal "
            "language model with its own config.json."
        )
    if getattr(model, "_hf_peft_config_loaded", False):  # from the Hub, whose files are not at hand before
        raise DataError(holds_adapter(model_id))


def load_pretrained(found: PretrainedTeacher, device: torch.device) -> LiveTeacher:
    """Load the weights of a teacher that was found.

    Raises:
        DataError: as `load_teacher_model`.
    """
    dtype = choose_dtype(found.dtype, device)
    log.info("Loading the teacher %s (%s)", found.model_id, str(dtype).removeprefix("torch."))
    model = load_teacher_model(found.model_id, device, dtype=dtype, revision=found.revision, gguf_file=found.gguf_file)
    return LiveTeacher(model, device)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a name; `auto` is bfloat16 on a GPU that has it, else float32."""
    if name != "auto":
        return DTYPES[name]
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def check_teacher(teacher: Teacher, batch: dict[str, Tensor], student_vocab: int) -> None:
    """Check a teacher on one batch: the width of its logits, and that what it gives is finite.

    Raises:
        ConfigError: if the width is not the student's vocabulary.
        NumericError: if a value is NaN or infinite, as happens with Qwen2 in float16.
    """
    if teacher.head is None:
        values = teacher.logits(batch)
        check_vocabulary(values.size(-1), student_vocab)
    else:  # the logits of a whole batch can be too large
        check_vocabulary(teacher.head.vocab_size, student_vocab)
        values = teacher.hidden(batch)
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).any(dim=-1).sum())
        raise NumericError(
            f"The teacher's outputs are not finite at {bad} of {values.shape[:-1].numel()} positions of the first "
            f"batch ({str(values.dtype).removeprefix('torch.')}). Its activations overflow: set teacher.dtype=bfloat16 "
            "(or float32)."
        )


def check_finite(teacher: Teacher) -> None:
    """Check a teacher's weights, as far as they are known: each NaN would spoil the tokens that meet it, maybe all.

    Raises:
        NumericError: naming the first weight that is not finite. A bias of -inf, which rules a token out, may be.
    """
    weights: dict[str, Tensor] = {}
    if isinstance(teacher, LiveTeacher):
        weights |= teacher.model.named_parameters()
    if teacher.head is not None:
        weights |= {"its head": teacher.head.weight}
        weights |= {} if teacher.head.bias is None else {"its head's bias": teacher.head.bias}
    for name, weight in weights.items():
        values = weight.clamp_min(torch.finfo(weight.dtype).min) if weight.dim() == 1 else weight
        if not torch.isfinite(values).all():
            raise NumericError(
                f"The teacher's weights are not all finite ({name}; {teacher.description}): nothing can be learned "
                "from it. Its files are damaged or were saved from a training that diverged; or set "
                "teacher.dtype=float32, if they are too large for the dtype that they were loaded in."
            )
