"""Whether training prepares for low-bit weights and activations."""

from dataclasses import dataclass
from typing import ClassVar

from kd.config.checks import require
from kd.config.model import ModelConfig
from kd.errors import ConfigError


@dataclass
class QuantizationConfig:
    """None: weights and activations stay as they are."""

    extra: ClassVar[tuple[str, str] | None] = None
    """Package that it needs, and the extra that brings it."""

    @property
    def label(self) -> str:
        """What a run's name says of it."""
        return ""


@dataclass
class IntegerConfig(QuantizationConfig):
    """Integer weights, and activations rounded to int8 for each token as they come.

    Training rounds both, and differentiates as if it did not: what is learned stands the rounding. Weights are
    symmetric, activations have a zero point. The embedding, which is the head too, and norms stay as they are.

    Source: Jacob et al. 2017, arXiv:1712.05877, section 3 (rounding while training); the scheme is torchao's
    `Int8DynamicActivationIntxWeightConfig`.
    """

    extra: ClassVar[tuple[str, str] | None] = ("torchao", "qat")

    weight_bits: int = 8
    """Bits of a weight: 8 or 4."""
    group_size: int | None = None
    """Weights that share a scale, along a row, at least 2; null: the row."""

    def __post_init__(self) -> None:
        require(self.weight_bits in (4, 8), "quantization.weight_bits", self.weight_bits, "use 8 or 4")
        is_group = self.group_size is None or self.group_size >= 2
        require(is_group, "quantization.group_size", self.group_size, "it must be 2 or more, or null")

    @property
    def label(self) -> str:
        """What a run's name says of it."""
        return f"-int{self.weight_bits}"

    def check_fits(self, model: ModelConfig) -> None:
        """Check that each linear layer of a student's blocks can be rounded; see `check_width`."""
        for name in ("hidden_size", "intermediate_size"):
            width = getattr(model, name)
            self.check_width(width, f"model.{name}={width}")

    def check_width(self, width: int, named: str) -> None:
        """Check that a linear layer can be rounded, kept and read: groups are whole, 4 bits two to a byte.

        Args:
            width: Its inputs.
            named: They, in words.

        Raises:
            ConfigError: if it cannot.
        """
        if width < 2:
            raise ConfigError(f"quantization cannot round {named}: a row must have 2 weights or more.")
        if self.weight_bits == 4 and width % 2:
            raise ConfigError(
                f"quantization.weight_bits=4 does not go with {named}, which is odd: two weights share a byte. Use an "
                "even number, or quantization.weight_bits=8."
            )
        if self.group_size is not None and width % self.group_size:
            raise ConfigError(
                f"quantization.group_size={self.group_size} does not divide {named}: use a divisor of the inputs of "
                "every layer (model.hidden_size, model.intermediate_size), or null for a scale a row."
            )
