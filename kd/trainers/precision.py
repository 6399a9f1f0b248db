"""Mixed precision: the weights stay float32, products are computed in half precision.

Source: Micikevicius et al. 2018, arXiv:1710.03740 (loss scaling: section 3.2).
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.optim import Optimizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Precision:
    """What forward passes are computed in, and the loss scale that float16's narrow range asks for.

    Args:
        name: float32, bfloat16 or float16.
        device: Where training happens.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self._dtype = DTYPES[name]
        self._device = device.type
        self._scaler = torch.amp.GradScaler(self._device, enabled=name == "float16")

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context of a forward pass and its loss."""
        # Its cache of cast weights would outlive an optimizer step inside one context; here a context is a micro-batch.
        return torch.autocast(self._device, self._dtype, enabled=self._dtype != torch.float32)

    def scale(self, loss: Tensor) -> Tensor:
        """Return what to differentiate in place of the loss."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        """Turn the gradients into those of the loss itself; before they are measured or clipped."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer) -> None:
        """Take an optimizer step with unscaled gradients."""
        self._scaler.step(optimizer)

    def adapt(self) -> None:
        """Lower the scale after gradients that overflowed, raise it after a long time without."""
        self._scaler.update()

    @property
    def can_lower_scale(self) -> bool:
        """Whether gradients that are not finite may come from the loss scale alone."""
        return self._scaler.is_enabled() and self._scaler.get_scale() > 1

    @property
    def scale_factor(self) -> float:
        """The loss scale, 1 where none is used."""
        return self._scaler.get_scale()

    def state_dict(self) -> dict[str, float]:
        """Return the scale and how long it has stood; empty where none is used."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what `state_dict` returned."""
        if self._scaler.is_enabled() and state:
            self._scaler.load_state_dict(state)
