"""Means over a log interval, summed on the device so that a step never waits for a number."""

import time
from typing import Any

import torch
from torch import Tensor

from kd.distributed import gather_objects, get_rank, is_distributed


class Meter:
    """Weighted means of named 0-d tensors, and the speed, since the last `take`; over all processes."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self.tokens = 0
        self._lengths: Tensor | None = None
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

    def add_lengths(self, lengths: Tensor) -> None:
        """Take in the lengths of sequences, (B,) int64."""
        own = torch.stack([lengths.sum(), lengths.square().sum()])
        self._lengths = own if self._lengths is None else self._lengths + own

    def sequence_tokens(self) -> tuple[int, float]:
        """Return the tokens of all sequences since the beginning, and the mean length of the sequence that one is in.

        Unlike `tokens` it leaves out padding. All processes must ask.
        """
        own = (0, 0) if self._lengths is None else tuple(self._lengths.tolist())
        tokens, squares = (sum(values) for values in zip(*gather_objects(own), strict=True))
        return tokens, squares / max(tokens, 1)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to finish the current interval as if it had not stopped.

        All processes must ask.
        """
        lengths = {} if self._lengths is None else {"lengths": self._lengths}
        return {
            "tokens": self.tokens,
            "lengths": _added(lengths),
            "sums": _added(self._sums),
            "weights": _added(self._weights),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore what `state_dict` returned; in one process, since it is of all."""
        self.tokens = state["tokens"]
        self._reset()
        if get_rank() > 0:
            self._lengths = None
            return
        lengths = state["lengths"].get("lengths")
        self._lengths = None if lengths is None else lengths.to(device)
        self._sums = {name: value.to(device) for name, value in state["sums"].items()}
        self._weights = {name: value.to(device) for name, value in state["weights"].items()}

    def latest(self) -> dict[str, float]:
        """Return the last value of each name."""
        return {name: float(value.sum()) for name, value in self._latest.items()}

    def take(self) -> tuple[dict[str, float], float]:
        """Return the means by name (NaN where nothing was added) and tokens per second, and start anew.

        All processes must ask.
        """
        sums, weights = _added(self._sums), _added(self._weights)
        means = {
            name: float((sums[name] / weights[name]).sum()) if name in sums else float("nan") for name in self._names
        }
        seconds = time.monotonic() - self._since
        speed = (self.tokens - self._tokens_before) / max(seconds, 1e-9)
        self._reset()
        return means, speed


def _added(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return sums over all processes, by name."""
    if not is_distributed():
        return own
    total: dict[str, Tensor] = {}
    for part in gather_objects({name: value.cpu() for name, value in own.items()}):
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total
