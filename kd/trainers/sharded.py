"""Training with a part of the weights, gradients and optimizer's state in each process: PyTorch's FSDP2.

Source: Rajbhandari et al. 2020 (ZeRO, stage 3), arXiv:1910.02054; Zhao et al. 2023 (FSDP), arXiv:2304.11277.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from kd.checkpoint import read_weights
from kd.distributed import get_rank, get_world_size
from kd.trainers.linear import LinearLoss
from kd.trainers.strategies import OneProcess


class Sharded(OneProcess):
    """Weights are gathered block by block while a forward or backward pass needs them.

    Gradients are shared in every micro-batch: to keep whole ones until the last would take the memory that this saves.
    """

    def __init__(self, trained: Callable[[], nn.Module]) -> None:
        super().__init__(trained)
        root = trained()
        for parameter in root.parameters():  # as DistributedDataParallel does it
            dist.broadcast(parameter.detach(), src=0)
        # Of the device in use: left to itself, torch takes the GPU of a machine that has one.
        mesh = init_device_mesh(next(root.parameters()).device.type, (get_world_size(),))
        for block in _blocks(root):
            fully_shard(block, mesh=mesh)
        # The root holds embedding and head, which may be one: it must be what the loss is computed in.
        fully_shard(root, mesh=mesh)
        if isinstance(root, LinearLoss):
            register_fsdp_forward_method(root, "scores")
        assert isinstance(root, FSDPModule)
        self._root: FSDPModule = root

    def grad_norm(self, model: nn.Module) -> Tensor:
        """Return the norm of all gradients over all processes."""
        return self.whole(super().grad_norm(model))

    def whole(self, tensor: Tensor) -> Tensor:
        """Return all of a tensor; all processes must ask."""
        return _whole(tensor)

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the weights by name, whole, on the CPU; in the first process alone."""
        self._root.reshard()  # after an evaluation it still holds whole weights
        return _on_first(_unshared_parts(model))

    def load_weights(self, directory: Path, model: nn.Module) -> None:
        """Load this process's part of a checkpoint's weights."""
        self._root.reshard()
        parts = _unshared_parts(model)
        tensors = read_weights(directory, parts)
        with torch.no_grad():
            for name, part in parts.items():
                part.copy_(_part_like(tensors[name], part))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state dict; whole tensors in the first process, nothing of them in the others."""
        state = optimizer.state_dict()
        return {**state, "state": {index: _on_first(values) for index, values in state["state"].items()}}

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Restore this process's part of a state dict with whole tensors."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        parts = {
            index: {name: _part_like(value, parameters[index]) for name, value in values.items()}
            for index, values in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": parts})


def _blocks(root: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of a model: what is in its outermost lists of modules."""
    for child in root.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)


def _unshared_parts(model: nn.Module) -> dict[str, Tensor]:
    """Return what `unshared_weights` does, of tensors that have no storage by which they could be told apart."""
    seen: set[int] = set()
    parts: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            parts[name] = tensor.detach()
    return parts


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _on_first(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whole, one after the other, on the CPU of the first process."""
    gathered = {}
    for name, value in values.items():
        whole = _whole(value)  # all processes take part
        if get_rank() == 0:
            gathered[name] = whole.cpu().contiguous()
    return gathered


def _part_like(value: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a whole tensor, or all of it where the other one is no part either."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    whole = value.to(device=like.device, dtype=value.dtype)
    # Without a source rank: every process has read the file.
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
