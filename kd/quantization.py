"""Low-bit models: rounding while training, integer weights afterwards, and their file.

Rounding and integer layers are torchao's; the model stays the object and of the class it was. A file has for each
integer weight its parts, `<name>.qdata` (int8; of 4 bits two to a byte, the first in the lower half), `<name>.scale`
and `<name>.zero_point`, and all else as it is.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kd.checkpoint_files import MODEL_FILE
from kd.config import IntegerConfig
from kd.errors import IntegrityError
from kd.extras import quiet_import, require_extra
from kd.files import check_directory, publish_directory
from kd.heads import head_and_embedding

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig

DATA = "qdata"
"""What torchao calls the integers of a weight."""


def fake_quantize(model: nn.Module, config: IntegerConfig) -> None:
    """Let a model's linear layers, but its head, round what they multiply, in place; their weights stay as they are.

    Args:
        model: A `StudentModel`, or a causal language model of transformers.
        config: What to round to.

    Raises:
        ConfigError: if torchao is not installed, or if a layer has a width that cannot be rounded.
    """
    _check_widths(model, config)
    _apply(model, config, "prepare")


def to_integers(model: nn.Module, config: IntegerConfig) -> None:
    """Give a model that `fake_quantize` has changed integer weights, in place. It computes the same, but cannot train.

    Raises:
        ConfigError: if torchao is not installed.
    """
    _apply(model, config, "convert")


def quantize(model: nn.Module, config: IntegerConfig) -> None:
    """Give a model integer weights after any training, in place; see `fake_quantize`."""
    fake_quantize(model, config)
    to_integers(model, config)


def save_quantized(directory: Path, model: nn.Module, config: IntegerConfig) -> None:
    """Publish a model with integer weights as a directory, in one step."""
    tensors = {name: _packed(tensor, name, config).contiguous() for name, tensor in _parts(model)}
    with publish_directory(directory) as work:
        save_file(tensors, work / MODEL_FILE, metadata={"format": "pt"})


def load_quantized(directory: Path, model: nn.Module, config: IntegerConfig) -> None:
    """Load what `save_quantized` wrote into a model of that architecture, whose weights may be any, in place.

    Raises:
        ConfigError: if torchao is not installed.
        IntegrityError: if the file is missing, altered, or of another architecture.
    """
    check_directory(directory, digests=True)
    quantize(model, config)
    try:
        tensors = load_file(directory / MODEL_FILE)
    except (OSError, SafetensorError) as error:
        raise IntegrityError(f"{directory / MODEL_FILE} cannot be read ({error}).") from error
    parts = dict(_parts(model))
    if parts.keys() != tensors.keys():
        other = sorted(parts.keys() ^ tensors.keys())[0]
        raise IntegrityError(f"{directory} is of another architecture: it differs in {other}.")
    for name, part in parts.items():
        found = _unpacked(tensors[name], name, config)
        if found.shape != part.shape:
            raise IntegrityError(f"{directory} is of another architecture: {name} is {tuple(found.shape)} there.")
        part.copy_(found)


def _apply(model: nn.Module, config: IntegerConfig, step: str) -> None:
    require_extra(f"quantization=int{config.weight_bits}", config.extra)
    with quiet_import():  # also while it runs: it imports some parts of itself only then
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig

        quantize_(model, QATConfig(_scheme(config), step=step), filter_fn=_is_in_body(model))


def _scheme(config: IntegerConfig) -> "AOBaseConfig":
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerAxis, PerGroup

    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int8 if config.weight_bits == 8 else torch.int4,  # type: ignore[attr-defined]
        weight_granularity=PerAxis(0) if config.group_size is None else PerGroup(config.group_size),
    )


def _is_in_body(model: nn.Module) -> Callable[[nn.Module, str], bool]:
    """Return what tells, of a module and its name, whether it is one of the model's linear layers but the head."""
    ends = head_and_embedding(model)
    return lambda module, name: isinstance(module, nn.Linear) and name not in ends


def _check_widths(model: nn.Module, config: IntegerConfig) -> None:
    is_in_body = _is_in_body(model)
    for name, module in model.named_modules():
        if is_in_body(module, name):
            assert isinstance(module, nn.Linear)
            config.check_width(module.in_features, f"the {module.in_features} inputs of {name}")


def _parts(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all weights by name, integer ones in their parts, shared ones once."""
    from torchao.utils import TorchAOBaseTensor

    for name, parameter in model.named_parameters():
        tensor: Any = parameter.data
        if isinstance(tensor, TorchAOBaseTensor):
            yield from ((f"{name}.{part}", getattr(tensor, part)) for part in tensor.tensor_data_names)
        else:
            yield name, tensor


def _packed(tensor: Tensor, name: str, config: IntegerConfig) -> Tensor:
    if config.weight_bits == 8 or not name.endswith(f".{DATA}"):
        return tensor
    return (tensor[:, ::2] & 15) | (tensor[:, 1::2] << 4)


def _unpacked(tensor: Tensor, name: str, config: IntegerConfig) -> Tensor:
    if config.weight_bits == 8 or not name.endswith(f".{DATA}"):
        return tensor
    halves = torch.stack([tensor << 4 >> 4, tensor >> 4], dim=-1)  # int8 shifts keep the sign
    return halves.flatten(1)
