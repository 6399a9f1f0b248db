"""What the machine holds and can do: random-number states, memory, a compiler."""

import resource
import sys
from typing import Any

import torch

from kd.errors import ConfigError


def rng_state() -> dict[str, Any]:
    """Return torch's random-number states, of the CPU and of each CUDA device in use."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_rng(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned; states of CUDA devices that are not here are left out."""
    torch.set_rng_state(state["cpu"])
    for index, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(value, index)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory held so far: a GPU's allocations, or on the CPU the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS


def require_compiler(device: torch.device) -> None:
    """Try torch's compiler on something small, so that its absence shows before anything is made.

    Raises:
        ConfigError: if it cannot compile for the device.
    """
    try:
        torch.compile(torch.square)(torch.ones(2, device=device))
    except RuntimeError as error:
        raise ConfigError(
            f"train.compile=true, but torch cannot compile here: {str(error).strip().splitlines()[0]} A CPU needs a "
            "C++ compiler, a GPU needs Triton. Install it, or set train.compile=false."
        ) from error
