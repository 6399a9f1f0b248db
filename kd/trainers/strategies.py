"""How one process, or several together, train a module and keep its state; a checkpoint is the same for all."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from kd.checkpoint import load_weights, unshared_weights
from kd.distributed import get_rank, get_world_size, is_distributed
from kd.errors import ConfigError


class OneProcess:
    """Everything is at hand.

    Args:
        trained: Gives the module whose forward pass training runs; called when it is first needed.
    """

    def __init__(self, trained: Callable[[], nn.Module]) -> None:
        self._trained = trained

    @property
    def module(self) -> nn.Module:
        """What training must call, with the arguments of the module that is trained."""
        return self._trained()

    def micro_batch(self, is_last: bool) -> AbstractContextManager[None]:  # noqa: ARG002 - nobody is told
        """Return the context of a micro-batch's forward and backward pass; `is_last`: of its optimizer step."""
        return nullcontext()

    def check_called(self) -> None:
        """Check after a backward pass that the gradients were shared."""

    def grad_norm(self, model: nn.Module) -> Tensor:
        """Return the norm of all gradients, 0-d, the same in all processes."""
        return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])

    def whole(self, tensor: Tensor) -> Tensor:
        """Return all of a tensor of which this process may hold a part; all processes must ask."""
        return tensor

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the weights as of `unshared_weights`; whole ones in the first process."""
        return unshared_weights(model)

    def load_weights(self, directory: Path, model: nn.Module) -> None:
        """Load a checkpoint's weights; see `kd.checkpoint.load_weights`."""
        load_weights(directory, model)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's state dict; with whole tensors in the first process."""
        return optimizer.state_dict()

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Restore what `optimizer_state` returned."""
        optimizer.load_state_dict(state)


class Replicated(OneProcess):
    """Each process holds the whole model; gradients, of what trains, are averaged while the backward pass runs."""

    def __init__(self, trained: Callable[[], nn.Module]) -> None:
        super().__init__(trained)
        self._was_called = False
        with warnings.catch_warnings():
            # Buffers are tables that nothing changes, not worth sending anew in each forward pass. Torch 2.13 has
            # another name for this, which earlier ones do not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self._wrapped = DistributedDataParallel(trained(), broadcast_buffers=False, gradient_as_bucket_view=True)
        self._wrapped.register_forward_pre_hook(self._note_call)

    def _note_call(self, *_: Any) -> None:
        self._was_called = True

    @property
    def module(self) -> nn.Module:
        """The module in its wrapper; the wrapper's name is in no state dict, since the model's own are saved."""
        return self._wrapped

    def micro_batch(self, is_last: bool) -> AbstractContextManager[None]:
        """Return a context that talks to the others in the last micro-batch only."""
        return nullcontext() if is_last else self._wrapped.no_sync()

    def check_called(self) -> None:
        """Check that the wrapper was called.

        Raises:
            ValueError: if it was not: each process would go its own way, and nothing would say so.
        """
        if not self._was_called:
            raise ValueError(
                "With several processes a trainer's _forward must call self.module in place of self.model: only then "
                "are gradients averaged over them."
            )


def make_strategy(name: str, trained: Callable[[], nn.Module]) -> OneProcess:
    """Return how to train a module in this process's group.

    Args:
        name: "ddp" or "fsdp".
        trained: Gives the module.

    Raises:
        ConfigError: if sharding was asked for in one process alone.
    """
    if name == "fsdp":
        if not is_distributed():
            raise ConfigError(
                "train.strategy=fsdp shares weights among processes, and there is one alone: start several with "
                "torchrun --nproc-per-node=N, or leave train.strategy out."
            )
        from kd.trainers.sharded import Sharded  # here: a plain start need not wait for it

        return Sharded(trained)
    return Replicated(trained) if get_world_size() > 1 else OneProcess(trained)


def random_numbers_of_its_own() -> None:
    """Give every process but the first other random numbers; all may have been seeded alike.

    The first one's are those of a single process, and what a checkpoint keeps. So dropout is the same after a resume
    where it was in one process; where it was in several, or becomes so, it is as random, but other.
    """
    if get_rank() > 0:
        torch.manual_seed(int(torch.randint(2**31, ())) + get_rank())
