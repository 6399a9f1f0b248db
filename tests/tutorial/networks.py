"""Small models and ragged batches for the tutorial."""

import torch
from torch import Tensor, nn

VOCAB = 11
LENGTH = 6
Batch = dict[str, Tensor]


class Bigram(nn.Module):
    """Predicts each token from the one before it alone."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 8)
        self.hidden = nn.Linear(8, 16)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(16, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(torch.tanh(self.hidden(self.embedding(input_ids)))))
        return logits


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> Bigram:
    """Return a model whose weights depend on the seed alone."""
    torch.manual_seed(seed)
    return Bigram(dropout).to(dtype)


def make_batch(seed: int, rows: int = 8) -> Batch:
    """Return a batch in which row r has its first r % LENGTH labels masked."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (rows, LENGTH + 1), generator=generator)
    masked = torch.arange(LENGTH) < (torch.arange(rows) % LENGTH)[:, None]
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:].masked_fill(masked, -100)}


def cut(batch: Batch, rows: int) -> list[Batch]:
    """Return a batch as batches of `rows` rows."""
    return [{name: x[i : i + rows] for name, x in batch.items()} for i in range(0, len(batch["labels"]), rows)]


def furthest(a: nn.Module, b: nn.Module) -> float:
    """Return the largest difference of any weight."""
    return max((x - y).abs().max().item() for x, y in zip(a.parameters(), b.parameters(), strict=True))
