"""A language model of the size of seconds, and its data: what the tutorial's trainer is tried on.

中文摘要: 一个几秒钟就能训练的小型字符语言模型及其数据, 供 trainer_from_scratch.py 演示使用.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NextCharacter(nn.Module):
    """A small language model: the last 8 characters, embedded side by side, through two layers.

    Source: Bengio, Ducharme, Vincent and Janvin 2003 (JMLR 3), section 2.
    """

    def __init__(self, vocab_size: int, context: int = 8, width: int = 24, hidden: int = 128) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(vocab_size, width)
        self.body = nn.Sequential(nn.Linear(context * width, hidden), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(hidden, vocab_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits (B, L, V) for tokens (B, L); those at position i see tokens up to i alone."""
        padded = F.pad(input_ids, (self.context - 1, 0))  # character 0 in front
        windows = padded.unfold(1, self.context, 1)  # (B, L, context)
        logits: Tensor = self.head(self.body(self.embedding(windows).flatten(2)))
        return logits


def character_batches(text: str, length: int = 32, rows: int = 16) -> tuple[list[dict[str, Tensor]], int]:
    """Return a text as batches of characters, and the number of different ones."""
    vocabulary = {character: index for index, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([vocabulary[character] for character in text])
    starts = range(0, len(tokens) - length, length)
    inputs = torch.stack([tokens[i : i + length] for i in starts])
    labels = torch.stack([tokens[i + 1 : i + 1 + length] for i in starts])  # the one place where labels are shifted
    pairs = zip(torch.split(inputs, rows), torch.split(labels, rows), strict=True)
    return [{"input_ids": x, "labels": y} for x, y in pairs], len(vocabulary)
