"""Whether all weights train, or small adapters beside frozen ones."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from kd.config.checks import require, require_finite, require_positive
from kd.config.model import ModelConfig
from kd.errors import ConfigError

PROJECTIONS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "ffn": ("gate_proj", "up_proj", "down_proj"),
}
"""The linear layers of a student's block, by the part that they are in."""
UNSUITABLE = ("embedding", "lm_head")
"""A student's modules that no adapter can stand beside: one weight that is both."""


@dataclass
class AdapterConfig:
    """No adapters: all weights train."""

    extra: ClassVar[tuple[str, str] | None] = None
    """Package that it needs, and the extra that brings it."""

    @property
    def label(self) -> str:
        """What a run's name says of it."""
        return ""


@dataclass
class LoRAConfig(AdapterConfig):
    """Low-rank adapters: a layer gives x W^T + (lora_alpha / rank) * x A^T B^T, where A and B alone train.

    Source: Hu et al. 2021, arXiv:2106.09685.
    """

    extra: ClassVar[tuple[str, str] | None] = ("peft", "lora")

    rank: int = 8
    """Rows of A."""
    lora_alpha: int = 16
    """Scale of what the adapters add, times rank."""
    dropout: float = 0.0
    """Dropout rate on what the adapters read, in [0, 1)."""
    targets: list[str] | None = None
    """Linear layers with adapters, by the end of their names, like q_proj or layers.0.ffn.up_proj; null: all of the
    blocks."""

    def __post_init__(self) -> None:
        self.dropout = float(self.dropout)  # from Python, 0 and 0.0 must be one run
        require_finite("adapter", self, "dropout")
        require_positive("adapter", self, "rank", "lora_alpha")
        require(0 <= self.dropout < 1, "adapter.dropout", self.dropout, "it must be in [0, 1)")
        is_empty = self.targets is not None and not all(self.targets or [""])
        require(not is_empty, "adapter.targets", self.targets, "name linear layers, or leave it null for all")

    @property
    def label(self) -> str:
        """What a run's name says of it."""
        return f"-lora{self.rank}"

    def check_fits(self, model: ModelConfig) -> None:
        """Check that each target is a linear layer of a student.

        Raises:
            ConfigError: if one is not.
        """
        choose_targets(self.targets, projections(model), UNSUITABLE)


def projections(model: ModelConfig) -> list[str]:
    """Return the names of all linear layers of a student's blocks."""
    parts = [f"{part}.{name}" for part, names in PROJECTIONS.items() for name in names]
    return [f"layers.{layer}.{part}" for layer in range(model.num_layers) for part in parts]


def choose_targets(targets: Sequence[str] | None, linears: Sequence[str], unsuitable: Collection[str]) -> list[str]:
    """Return the names of the layers that targets mean.

    Args:
        targets: Names, or ends of names that begin at a dot; None: all layers.
        linears: Names of the layers to choose from.
        unsuitable: Names of the head and the embedding.

    Raises:
        ConfigError: if a target means the head or the embedding, or nothing.
    """
    if not linears:
        raise ConfigError("adapter=lora, but the model has no linear layers that adapters could stand beside.")
    known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears))
    for target in targets or ():
        if any(_is_end(target, name) for name in unsuitable):
            raise ConfigError(
                f"adapter.targets={target} is the head or the embedding: losses read the head's weight itself, and "
                f"would not see an adapter beside it. Use {known}."
            )
        if not any(_is_end(target, name) for name in linears):
            raise ConfigError(f"adapter.targets={target} fits no linear layer of the model's blocks. Known: {known}.")
    return [name for name in linears if targets is None or any(_is_end(target, name) for target in targets)]


def _is_end(target: str, name: str) -> bool:
    return f".{name}".endswith(f".{target}")
