"""A checkpoint: a directory of safetensors and JSON, published whole, checked before use, without pickle.

checkpoint-300/
  model.safetensors      the model's weights by name, each shared tensor once
  state.safetensors      the tensors of everything else (optimizer moments, random-number states)
  state.json             the rest of it, with references to those tensors
  manifest.json          size and SHA-256 of each file, written last

Of a model with adapters only these are stored, as adapters.safetensors.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kd.checkpoint_files import ADAPTER_FILE, MODEL_FILE
from kd.errors import IntegrityError
from kd.files import check_directory, publish_directory, read_json, write_json

FORMAT_VERSION = 1
STATE_TENSORS = "state.safetensors"
STATE_FILE = "state.json"
ADAPTER_MARKS = (".lora_A.", ".lora_B.")
"""What the names of adapters' weights have in them."""


def save_checkpoint(directory: Path, model: nn.Module | dict[str, Tensor], state: dict[str, Any]) -> None:
    """Publish a checkpoint in one step, replacing one of the same name.

    Args:
        directory: The checkpoint's directory.
        model: Its weights, or its adapters alone, are stored by their names in the state dict. Or these tensors, as of
            `unshared_weights`.
        state: Nested dicts, lists, numbers, strings, None and tensors. Floats must be finite.
    """
    tensors: dict[str, Tensor] = {}
    packed = _pack(state, "", tensors)
    with publish_directory(directory) as work:
        weights = _weights_of(model)
        save_model_file(work / _file_of(weights), weights)
        save_file(tensors, work / STATE_TENSORS)
        write_json(work / STATE_FILE, {"format_version": FORMAT_VERSION, "state": packed})


def load_state(directory: Path) -> dict[str, Any]:
    """Return the `state` that was saved, its tensors on the CPU.

    Raises:
        IntegrityError: if a file is missing or altered, or has another format version.
    """
    check_directory(directory, digests=True)
    content = read_json(directory / STATE_FILE)
    if content["format_version"] != FORMAT_VERSION:
        raise IntegrityError(
            f"{directory} has checkpoint format {content['format_version']}, this version reads {FORMAT_VERSION}. "
            "Load it with the version that wrote it."
        )
    state = _unpack(content["state"], load_file(directory / STATE_TENSORS))
    assert isinstance(state, dict)
    return state


def load_weights(directory: Path, model: nn.Module) -> None:
    """Load a checkpoint's weights into a model of the same architecture.

    Raises:
        IntegrityError: if the file is missing, altered, or holds another architecture's weights.
    """
    # Not strict: what is left out shares storage with what is there, or is not an adapter's.
    model.load_state_dict(read_weights(directory, unshared_weights(model)), strict=False)


def holds_adapters(model: nn.Module) -> bool:
    """Return whether a model has adapters: then they alone train, and are stored."""
    return any(_is_adapter(name) for name, _ in model.named_parameters())


def save_model_file(path: Path, model: nn.Module | dict[str, Tensor]) -> None:
    """Write a model's weights, or its adapters, as one safetensors file, each shared tensor once."""
    save_file(_weights_of(model), path, metadata={"format": "pt"})


def _file_of(names: Iterable[str]) -> str:
    """Return the name of the file of a checkpoint that holds the weights of these names."""
    return ADAPTER_FILE if any(map(_is_adapter, names)) else MODEL_FILE


def _weights_of(model: nn.Module | dict[str, Tensor]) -> dict[str, Tensor]:
    return unshared_weights(model) if isinstance(model, nn.Module) else model


def load_model_file(path: Path, model: nn.Module) -> None:
    """Load one safetensors file of weights into a model of the same architecture.

    Raises:
        IntegrityError: if the file is missing, unreadable, or holds another architecture's weights.
    """
    # Not strict, as above.
    model.load_state_dict(read_model_file(path, unshared_weights(model)), strict=False)


def read_weights(directory: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's weights, on the CPU; as `read_model_file`, but its digests are checked first."""
    check_directory(directory, digests=True)
    return read_model_file(directory / _file_of(expected), expected)


def read_model_file(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights in one safetensors file, on the CPU.

    Args:
        path: The file.
        expected: What must be there, by name; compared in shape.

    Raises:
        IntegrityError: if the file is missing, unreadable, or holds another architecture's weights.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise IntegrityError(f"{path} cannot be read ({error}).") from error
    for name, tensor in expected.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise IntegrityError(
                f"{path} is of another architecture: for {name} the model has {tuple(tensor.shape)}, "
                f"the file {found}. Use the model settings of the run that wrote it (its config.yaml)."
            )
    if extra := sorted(tensors.keys() - expected.keys()):
        raise IntegrityError(f"{path} is of another architecture: it holds {extra[0]}, which the model has not.")
    weights: dict[str, Tensor] = tensors
    return weights


def unshared_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's tensors by name, leaving out every name but the first of a shared tensor.

    Of a model with adapters: these alone.
    """
    seen: set[tuple[int, torch.Size]] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if key in seen and tensor.numel() > 0:
            continue
        seen.add(key)
        tensors[name] = tensor.detach().contiguous()
    return {name: tensors[name] for name in tensors if _is_adapter(name)} or tensors


def _is_adapter(name: str) -> bool:
    return any(mark in name for mark in ADAPTER_MARKS)


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Turn a nested value into JSON, moving its tensors to `tensors` under a number and their path."""
    if isinstance(value, Tensor):
        name = f"{len(tensors)}{path}"  # numbered, because keys may hold a slash, or differ in type only
        # A copy: safetensors refuses tensors that share memory.
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        # Pairs, because JSON would turn integer keys (an optimizer's) into strings.
        return {"dict": [[key, _pack(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_pack(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold {path or 'a value'} of type {type(value).__name__}")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "list" in value:
        return [_unpack(item, tensors) for item in value["list"]]
    return {key: _unpack(item, tensors) for key, item in value["dict"]}
