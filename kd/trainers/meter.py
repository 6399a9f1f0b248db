"""Means over a log interval, summed on the device so that a step never waits for a number."""

import time
from typing import Any

import torch
from torch import Tensor


class Meter:
    """Weighted means of named 0-d tensors, and the speed, since the last `take`."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self.tokens = 0
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        self._latest: dict[str, Tensor] = {}
        self._tokens_before = self.tokens
        self._since = time.monotonic()

    def add(self, values: dict[str, Tensor], weight: Tensor) -> None:
        """Add values (detached) that count `weight` units; both 0-d, or (K,) for a sum of K means."""
        weight = weight.double()
        for name, value in values.items():
            # A batch without units has no say, also where its value is not a number.
            part = torch.where(weight > 0, value.to(weight.dtype) * weight, torch.zeros_like(weight))
            self._sums[name] = self._sums[name] + part if name in self._sums else part
            self._weights[name] = self._weights[name] + weight if name in self._weights else weight
        self._latest |= values

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to finish the current interval as if it had not stopped."""
        return {"tokens": self.tokens, "sums": self._sums, "weights": self._weights}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore what `state_dict` returned."""
        self.tokens = state["tokens"]
        self._reset()
        self._sums = {name: value.to(device) for name, value in state["sums"].items()}
        self._weights = {name: value.to(device) for name, value in state["weights"].items()}

    def latest(self) -> dict[str, float]:
        """Return the last value of each name."""
        return {name: float(value.sum()) for name, value in self._latest.items()}

    def take(self) -> tuple[dict[str, float], float]:
        """Return the means by name (NaN where nothing was added) and tokens per second, and start anew."""
        means = {
            name: float((self._sums[name] / self._weights[name]).sum()) if name in self._sums else float("nan")
            for name in self._names
        }
        seconds = time.monotonic() - self._since
        speed = (self.tokens - self._tokens_before) / max(seconds, 1e-9)
        self._reset()
        return means, speed
