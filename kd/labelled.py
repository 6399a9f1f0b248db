"""Losses from hidden states work on labelled tokens only: picking those out, and putting their results back."""

import torch
from torch import Tensor

from kd.losses import IGNORE_INDEX


def labelled_rows(labels: Tensor, weight: Tensor) -> Tensor:
    """Return where, in the flattened labels, those other than -100 are, (N,).

    Args:
        labels: any shape, next-token targets.
        weight: (V, H) of the head that will score them.

    Raises:
        ValueError: if a label is not in the vocabulary.
    """
    flat = labels.reshape(-1)
    rows = (flat != IGNORE_INDEX).nonzero().squeeze(1)
    targets = flat[rows]
    # An entry that no tile holds would leave the token's loss without its label, and unnoticed.
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < weight.size(0):
        raise ValueError(
            f"labels reach from {int(targets.min())} to {int(targets.max())}, but the head has {weight.size(0)} rows: "
            f"every label must be in the vocabulary, or {IGNORE_INDEX}. Give the model and the data one tokenizer."
        )
    return rows


def select_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rows: Tensor) -> Tensor:
    """Return the hidden states of the labelled tokens, (N, H), after a check that all shapes fit.

    Args:
        hidden: (..., H).
        weight: (V, H) of the head.
        bias: (V,) of the head, if it has one.
        labels: (...), the targets of the hidden states.
        rows: (N,), as `labelled_rows` returns them.

    Raises:
        ValueError: if shapes differ.
    """
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels {tuple(labels.shape)} do not match hidden states {tuple(hidden.shape)}: there must be one "
            "next-token target for each position, already shifted."
        )
    if weight.ndim != 2 or weight.size(1) != hidden.size(-1) or (bias is not None and bias.shape != weight.shape[:1]):
        shape = None if bias is None else tuple(bias.shape)
        raise ValueError(
            f"Hidden states {tuple(hidden.shape)}, head weight {tuple(weight.shape)} and bias {shape} do not fit: they "
            "must be (..., H), (V, H) and (V,)."
        )
    flat = hidden.reshape(-1, hidden.size(-1))
    return flat if len(rows) == len(flat) else flat.index_select(0, rows)


def spread_rows(values: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """Return the values (N,) of the labelled tokens at their places in the shape of the labels; 0 elsewhere."""
    return torch.zeros_like(labels, dtype=values.dtype).reshape(-1).index_copy(0, rows, values).view(labels.shape)
