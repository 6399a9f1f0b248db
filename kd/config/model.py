"""The student's architecture."""

from dataclasses import dataclass

from kd.config.checks import require, require_finite, require_positive
from kd.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """The student's architecture (a Llama-style decoder)."""

    hidden_size: int = 512
    """Width."""
    num_layers: int = 12
    """Transformer blocks."""
    num_heads: int = 8
    """Attention heads."""
    num_kv_heads: int = 2
    """Key/value heads (grouped-query attention)."""
    intermediate_size: int = 2048
    """Hidden width of the SwiGLU."""
    vocab_size: int = 151936
    """Vocabulary; the teacher's."""
    max_seq_len: int = 512
    """Longest sequence, in tokens."""
    rope_theta: float = 1000000.0
    """Base of the rotary position embedding."""
    norm_eps: float = 1e-6
    """Epsilon of RMSNorm."""
    dropout: float = 0.0
    """Dropout rate, in [0, 1)."""

    def __post_init__(self) -> None:
        require_finite("model", self, "rope_theta", "norm_eps", "dropout")
        require_positive("model", self, "hidden_size", "num_layers", "num_heads", "num_kv_heads")
        require_positive("model", self, "intermediate_size", "vocab_size", "max_seq_len", "rope_theta", "norm_eps")
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "it must be in [0, 1)")
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} is not divisible by model.num_heads={self.num_heads}: "
                "each head takes an equal share of the width."
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_heads={self.num_heads} is not divisible by model.num_kv_heads={self.num_kv_heads}: "
                "each key/value head serves an equal group of heads."
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} / model.num_heads={self.num_heads} gives heads of odd size "
                f"{self.head_dim}: rotary positions turn pairs, so it must be even."
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads
