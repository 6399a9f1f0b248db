"""Sizes of a pretrained teacher that fits into a test."""

from typing import Any

import torch

CPU = torch.device("cpu")
VOCAB = 258
"""The end-of-text token, the bytes, and one merged pair."""
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
BATCH = {"input_ids": torch.arange(24).view(2, 12)}
