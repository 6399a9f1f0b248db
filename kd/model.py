"""The student: a Llama-style decoder (RMSNorm, rotary positions, grouped-query attention, SwiGLU) with a tied head.

Weights map one to one to Hugging Face's `LlamaForCausalLM`. Shape letters: B batch, L tokens, H width, V vocabulary,
N heads, K key/value heads, D head width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kd.config import ModelConfig

INIT_STD = 0.02


@dataclass(frozen=True)
class Positions:
    """What every layer of one forward pass shares: where its tokens stand and which of them they may see."""

    cos: Tensor
    """(L, D) float32, from `rotary_tables`."""
    sin: Tensor
    """(L, D) float32, from `rotary_tables`."""
    visible: Tensor | None = None
    """Bool, broadcastable to (B, N, L, past + L); None: a single token sees all, several see each its past."""


class LayerCache:
    """Keys and values that one layer has computed so far."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys  # (B, K, max_len, D)
        self.values = values  # (B, K, max_len, D)
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, L, D) new keys and values; return views of all that are held, (B, K, length, D)."""
        start, self.length = self.length, self.length + keys.size(2)
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def repeated(self, times: int) -> "LayerCache":
        """Return a copy in which each sequence stands so many times, next to itself."""
        copy = LayerCache(self.keys.repeat_interleave(times, dim=0), self.values.repeat_interleave(times, dim=0))
        copy.length = self.length
        return copy


class KeyValueCache:
    """Keys and values of a batch, kept so that a forward pass computes new tokens only.

    Memory is taken once and written in place: use it without gradients (`torch.no_grad` or `torch.inference_mode`).

    Args:
        config: of the model that fills it.
        batch_size: sequences, B.
        max_len: most tokens per sequence.
        device: of the model.
        dtype: of the model's activations.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, max_len: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (2, batch_size, config.num_kv_heads, max_len, config.head_dim)
        buffers = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.layers = [LayerCache(keys, values) for keys, values in buffers]
        self.batch_size = batch_size
        self.max_len = max_len

    @property
    def length(self) -> int:
        """Tokens held per sequence."""
        return self.layers[0].length

    def repeat(self, times: int) -> None:
        """Hold each sequence so many times, next to itself: for several continuations of what was read once."""
        self.layers = [layer.repeated(times) for layer in self.layers]
        self.batch_size *= times

    def check_room(self, batch_size: int, num_tokens: int) -> None:
        """Check that a batch of new tokens fits.

        Raises:
            ValueError: if the batch has another size, or if there is no room for the tokens.
        """
        if batch_size != self.batch_size:
            raise ValueError(f"The cache holds {self.batch_size} sequences, got {batch_size}: make one of that size.")
        if self.length + num_tokens > self.max_len:
            raise ValueError(
                f"The cache is full: it holds {self.length} of max_len={self.max_len} tokens, and {num_tokens} more "
                "do not fit. Make a longer one, or start again with fewer tokens."
            )


class RMSNorm(nn.Module):
    """Scale each vector to root mean square 1, then by a learned weight.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., H) normalised over its last dimension; same shape and dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_tables(head_dim: int, max_len: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return the cosines and signed sines of rotary positions, each (max_len, D) float32.

    Channel i is paired with channel i + D/2, and the pair turns by position * theta^(-2i/D). The first half of the
    sines is negative, so that `rotate` needs no negation.

    Source: Su et al. 2021, arXiv:2104.09864, eq. 34, in the half-split layout of Hugging Face's Llama.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(max_len, dtype=torch.float32), frequencies)  # (max_len, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs of x (B, L, heads, D) by the tables' angles (L, D); same shape and dtype."""
    swapped = x.roll(x.size(-1) // 2, dims=-1)
    # Half-precision x meets float32 tables: turn in float32, then return to what the matrix products take.
    return (x * cos.unsqueeze(1) + swapped * sin.unsqueeze(1)).type_as(x)


class GQAAttention(nn.Module):
    """Causal self-attention in which groups of query heads share one key/value head.

    Source: Ainslie et al. 2023, arXiv:2305.13245.

    Args:
        hidden_size: width H.
        num_heads: query heads N; H must be a multiple.
        num_kv_heads: key/value heads K; N must be a multiple. K = N is multi-head, K = 1 multi-query attention.
        dropout: rate on the attention probabilities, in [0, 1).
    """

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.group_size = num_heads // num_kv_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=False)

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """Return (B, L, H) from x (B, L, H); the cache, if given, is extended by these L tokens."""
        batch_size, length, _ = x.shape
        per_head = (batch_size, length, -1, self.head_dim)
        queries = rotate(self.q_proj(x).view(per_head), positions.cos, positions.sin).transpose(1, 2)  # (B, N, L, D)
        keys = rotate(self.k_proj(x).view(per_head), positions.cos, positions.sin).transpose(1, 2)  # (B, K, L, D)
        values = self.v_proj(x).view(per_head).transpose(1, 2)  # (B, K, L, D)
        if cache is not None:
            keys, values = cache.append(keys, values)
        mixed = self._attend(queries, keys, values, positions.visible)  # (B, N, L, D)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch_size, length, -1))
        return out

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
        """Return softmax(queries keys^T / sqrt(D)) values, (B, N, L, D)."""
        grouped = self.group_size > 1
        if grouped and not queries.is_cpu:
            # CUDA's memory-efficient kernel, the one for float32 and for masks, takes no groups; without it scores
            # (L x L) are written out. The CPU kernel takes them, and is about 10 % faster than with copied heads.
            keys, values = (heads.repeat_interleave(self.group_size, dim=1) for heads in (keys, values))
            grouped = False
        return F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=visible,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=visible is None and queries.size(2) > 1,
            enable_gqa=grouped,
        )


class SwiGLUFFN(nn.Module):
    """Feed-forward network with a gate: down(silu(gate(x)) * up(x)).

    Source: Shazeer 2020, arXiv:2002.05202, eq. 6.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., H) from x (..., H)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class TransformerBlock(nn.Module):
    """Attention, then feed-forward; each reads a normalised stream and adds to it (dropout on what is added)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = GQAAttention(config.hidden_size, config.num_heads, config.num_kv_heads, config.dropout)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn = SwiGLUFFN(config.hidden_size, config.intermediate_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """Return (B, L, H) from x (B, L, H)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), positions, cache))
        out: Tensor = x + self.dropout(self.ffn(self.ffn_norm(x)))
        return out


class StudentModel(nn.Module):
    """Decoder-only language model; the head shares the embedding's weight.

    `gradient_checkpointing` (off) lets training compute each block's activations again instead of keeping them; it
    takes no cache.
    """

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        # On meta, since its own weight is replaced at once: no second vocabulary-sized matrix is ever allocated.
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device="meta")
        self.lm_head.weight = self.embedding.weight
        cos, sin = rotary_tables(config.head_dim, config.max_seq_len, config.rope_theta)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        initialise_weights(self)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Return logits (B, L, V); the arguments and errors of `hidden_states`."""
        logits: Tensor = self.lm_head(self.hidden_states(input_ids, attention_mask, cache))
        return logits

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Return what the head sees, (B, L, H), after the final norm.

        Positions count slots, padding included. Padding on the left shifts all tokens of a sequence alike, which
        rotary positions do not see; outputs at padding are finite and mean nothing.

        Args:
            input_ids: (B, L) token ids. With a cache they continue the `past` tokens that it holds.
            attention_mask: (B, past + L), non-zero at real tokens, 0 at padding; None: no padding.
            cache: read, and extended by these L tokens.

        Raises:
            ValueError: if past + L exceeds config.max_seq_len, if the cache has no room or another batch size, or if
                the mask has another shape.
        """
        past = 0 if cache is None else cache.length
        self._check_input(input_ids, attention_mask, cache)
        end = past + input_ids.size(1)
        visible = _visible_tokens(attention_mask, past, end, input_ids.device)
        positions = Positions(self.rope_cos[past:end], self.rope_sin[past:end], visible)
        x: Tensor = self.embedding(input_ids)  # (B, L, H)
        for index, layer in enumerate(self.layers):
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(layer, x, positions, use_reentrant=False)
            else:
                x = layer(x, positions, None if cache is None else cache.layers[index])
        hidden: Tensor = self.norm(x)
        return hidden

    def _check_input(self, input_ids: Tensor, attention_mask: Tensor | None, cache: KeyValueCache | None) -> None:
        """Refuse what does not fit the model, the cache or the mask."""
        batch_size, length = input_ids.shape
        past = 0 if cache is None else cache.length
        if past + length > self.config.max_seq_len:
            raise ValueError(
                f"A sequence of {past + length} tokens is longer than model.max_seq_len={self.config.max_seq_len}: "
                "shorten it, or build the model with a larger max_seq_len."
            )
        if cache is not None:
            cache.check_room(batch_size, length)
        if attention_mask is not None and attention_mask.shape != (batch_size, past + length):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, expected {(batch_size, past + length)}: "
                "one value for each token, those in the cache included."
            )


def _visible_tokens(attention_mask: Tensor | None, past: int, end: int, device: torch.device) -> Tensor | None:
    """Return which of `end` tokens each of the tokens past..end sees, as `Positions.visible`."""
    length = end - past
    if attention_mask is None and (past == 0 or length == 1):
        return None
    causal = torch.ones(length, end, dtype=torch.bool, device=device).tril(past)  # (L, past + L)
    if attention_mask is None:
        return causal
    # Padding sees itself: softmax over nothing is NaN, which not every attention kernel guards against.
    itself = causal.triu(past)
    return itself | (causal & attention_mask.bool()[:, None, None, :])  # (B, 1, L, past + L)


def initialise_weights(model: StudentModel) -> None:
    """Draw all weights of a new model from torch's global random numbers.

    | weights | distribution |
    |---|---|
    | norms | 1 |
    | attention.o_proj, ffn.down_proj (they add to the stream) | normal, 0.02 / sqrt(2 * num_layers) |
    | all other matrices, the tied embedding and head among them | normal, 0.02 |

    Dividing by the number of additions keeps the variance of the stream independent of the depth.
    Source: Radford et al. 2019 (GPT-2), section 2.3.
    """
    residual_std = INIT_STD / math.sqrt(2 * model.config.num_layers)
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            nn.init.ones_(weight)
            continue
        is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        nn.init.normal_(weight, std=residual_std if is_residual else INIT_STD)


def num_parameters(model: nn.Module) -> int:
    """Return the number of weights; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def forward_flops_per_token(config: ModelConfig, seq_len: float) -> float:
    """Return the FLOPs of the matrix products of one token's forward pass, averaged over a sequence.

    A product with an (n, m) matrix is 2nm (one multiplication, one addition each). Per layer, with key/value width
    G = K * D and SwiGLU width I: 2 * (2H^2 + 2HG + 3HI) for the projections, and, since a token sees (L + 1) / 2
    tokens on average, 2 * H * (L + 1) for the scores and the mixing of values. The head: 2HV. Training takes about
    three times as much (Kaplan et al. 2020, arXiv:2001.08361, section 2.1).

    Args:
        config: of the model.
        seq_len: sequence length L, in tokens. Of sequences of several lengths: the mean over tokens of the length of
            the sequence that a token is in, for attention grows linearly with that.
    """
    width, kv_width = config.hidden_size, config.num_kv_heads * config.head_dim
    projections = 2 * width * (2 * width + 2 * kv_width + 3 * config.intermediate_size)
    attention = 2 * width * (seq_len + 1)
    head = 2 * width * config.vocab_size
    return float(config.num_layers * (projections + attention) + head)
