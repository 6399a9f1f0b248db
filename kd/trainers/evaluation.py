"""Scores of validation blocks, kept per block so that any subset and any statistic can be taken from them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from kd.errors import DataError
from kd.files import write_array
from kd.linear_distillation import TokenScores
from kd.losses import IGNORE_INDEX, token_agreement

Table = npt.NDArray[Any]
NORMAL_95 = 1.959964
"""The quantile of the normal distribution that two-sided 95 % intervals have."""


class Scores(Protocol):
    """What an evaluation gives for each of its blocks or examples."""

    @property
    def unit(self) -> str:
        """What they are of, in the plural."""
        ...

    def table(self, ids: npt.NDArray[np.int64] | None) -> Table:
        """Return them as a structured array with a row each, and what each is by `ids` (-1: unknown)."""
        ...

    def __len__(self) -> int:
        """Return how many blocks or examples there are."""
        ...

    def first(self, count: int) -> Self:
        """Return the scores of the first `count`."""
        ...

    def joined(self, parts: Sequence[Self]) -> Self:
        """Return the scores of parts, one after the other; the receiver is one of them."""
        ...

    def metrics(self) -> dict[str, float | None]:
        """Return val_loss and what else there is, by the names that the history has for them."""
        ...


@dataclass(frozen=True)
class ExampleScores:
    """Values of each example by name, `loss` among them. Each is a 1-D float64 tensor on the CPU."""

    columns: dict[str, Tensor]
    shares: tuple[str, ...] = ()
    """Columns of values in [0, 1] whose mean is a share of the examples."""
    unit: ClassVar[str] = "examples"

    def __len__(self) -> int:
        return len(self.columns["loss"])

    def table(self, ids: npt.NDArray[np.int64] | None) -> Table:
        """Return a structured array: example (int64, -1: unknown) and the columns (float64)."""
        table = np.zeros(len(self), dtype=[("example", "<i8"), *((name, "<f8") for name in self.columns)])
        table["example"] = -1 if ids is None else ids
        for name, column in self.columns.items():
            table[name] = column.numpy()
        return table

    def first(self, count: int) -> "ExampleScores":
        """Return the scores of the first `count` examples."""
        return replace(self, columns={name: column[:count] for name, column in self.columns.items()})

    def joined(self, parts: Sequence["ExampleScores"]) -> "ExampleScores":
        """Return the scores of parts, one after the other."""
        return replace(self, columns={name: torch.cat([part.columns[name] for part in parts]) for name in self.columns})

    def metrics(self) -> dict[str, float | None]:
        """Return each column's mean over the examples under `val_` and its name; of a share also `_low`, its bound."""
        metrics: dict[str, float | None] = {}
        for name, column in self.columns.items():
            metrics[f"val_{name}"] = mean = float(column.mean())
            if name in self.shares:
                metrics[f"val_{name}_low"] = lower_bound(mean, len(column))
        return metrics


def lower_bound(share: float, count: int) -> float:
    """Return the lower end of the 95 % interval of a share of `count` independent examples.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    z = NORMAL_95
    spread = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return (share + z * z / (2 * count) - spread) / (1 + z * z / count)


@dataclass(frozen=True)
class BlockScores:
    """Sums over the valid tokens of each block, at temperature 1. Each is a 1-D float64 tensor on the CPU.

    The teacher's columns are None where no teacher was at hand.
    """

    tokens: Tensor
    nll: Tensor
    kl: Tensor | None = None
    agreement: Tensor | None = None
    teacher_nll: Tensor | None = None
    unit: ClassVar[str] = "blocks"

    def __len__(self) -> int:
        return len(self.tokens)

    def joined(self, parts: Sequence["BlockScores"]) -> "BlockScores":
        """Return the scores of parts, one after the other."""
        return join(parts, torch.cat)

    def first(self, count: int) -> "BlockScores":
        """Return the scores of the first `count` blocks."""
        return join([self], lambda column: column[0][:count])

    def mean(self, column: Tensor | None) -> float | None:
        """Return a column's mean per token (nats for losses), None where it is unknown."""
        return None if column is None else float(column.sum() / self.tokens.sum().clamp_min(1))

    def metrics(self) -> dict[str, float | None]:
        """Return val_loss (nats per token), val_ppl, val_kl, val_agreement (share), teacher_val_ppl.

        Raises:
            DataError: if no block has a token to predict: a mean over nothing would be the best loss ever.
        """
        if not self.tokens.any():
            raise DataError(
                f"None of the {len(self)} blocks that are scored has a token to predict: all labels are {IGNORE_INDEX}."
                " Give validation (and test) data whose answers are not cut off or masked."
            )
        loss = self.mean(self.nll)
        assert loss is not None
        teacher_loss = self.mean(self.teacher_nll)
        return {
            "val_loss": loss,
            "val_ppl": perplexity(loss),
            "val_kl": self.mean(self.kl),
            "val_agreement": self.mean(self.agreement),
            "teacher_val_ppl": None if teacher_loss is None else perplexity(teacher_loss),
        }

    def table(self, ids: npt.NDArray[np.int64] | None) -> Table:
        """Return a structured array: document (int64, -1: unknown), tokens (int64), nll (float64, summed nats)."""
        table = np.zeros(len(self.tokens), dtype=[("document", "<i8"), ("tokens", "<i8"), ("nll", "<f8")])
        table["document"] = -1 if ids is None else ids
        table["tokens"] = self.tokens.numpy()
        table["nll"] = self.nll.numpy()
        return table


def save_scores(scores: Scores, directory: Path, part: str, ids: npt.NDArray[np.int64] | None) -> None:
    """Write scores as `{part}_blocks.npy` or `{part}_examples.npy`; see their `table`."""
    write_array(directory / f"{part}_{scores.unit}.npy", scores.table(ids))


def perplexity(loss: float) -> float:
    """Return exp(loss), infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def join(parts: Sequence[BlockScores], how: Callable[[list[Tensor]], Tensor]) -> BlockScores:
    """Join scores column by column: `torch.stack` for single blocks, `torch.cat` for batches of them."""

    def column(values: list[Tensor | None]) -> Tensor | None:
        known = [value for value in values if value is not None]
        return how(known) if known else None

    return BlockScores(
        how([part.tokens for part in parts]),
        how([part.nll for part in parts]),
        column([part.kl for part in parts]),
        column([part.agreement for part in parts]),
        column([part.teacher_nll for part in parts]),
    )


def sum_blocks(scores: TokenScores, labels: Tensor) -> BlockScores:
    """Return the sums over the tokens of each block of scores in the shape of the labels (B, L)."""

    def total(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.double().sum(dim=1).cpu()

    tokens, nll = total(labels != IGNORE_INDEX), total(scores.nll)
    assert tokens is not None
    assert nll is not None
    return BlockScores(tokens, nll, total(scores.kl), total(scores.agreement), total(scores.teacher_nll))


@torch.no_grad()
def score_logits(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> BlockScores:
    """Score a batch of blocks.

    Args:
        student_logits, teacher_logits: (B, L, V); the teacher's may be None.
        labels: (B, L) next-token targets, -100 ignored.
    """
    rows = []
    for row in range(labels.size(0)):  # a block at a time: float32 copies of a whole batch's logits are too large
        valid = labels[row] != IGNORE_INDEX
        teacher = None if teacher_logits is None else teacher_logits[row][valid]
        rows.append(_score_tokens(student_logits[row][valid], teacher, labels[row][valid]))
    return join(rows, lambda column: torch.stack(column).cpu())


def _score_tokens(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> BlockScores:
    """Sums over tokens; what `token_nll` and `token_kl` give, with each log-softmax taken once."""
    count = torch.tensor(labels.numel(), dtype=torch.float64, device=labels.device)
    student = F.log_softmax(student_logits.float(), dim=-1)
    nll = -student.gather(-1, labels.unsqueeze(-1)).double().sum()
    if teacher_logits is None:
        return BlockScores(count, nll)
    teacher = F.log_softmax(teacher_logits.float(), dim=-1)
    probabilities = teacher.exp()
    # 0 * (-inf - x) is NaN, where the limit of p log p is 0.
    log_ratio = (teacher - student).masked_fill_(probabilities == 0, 0.0)
    return BlockScores(
        count,
        nll,
        kl=torch.einsum("tv,tv->t", probabilities, log_ratio).double().sum(),
        agreement=token_agreement(student_logits, teacher_logits).double().sum(),
        teacher_nll=-teacher.gather(-1, labels.unsqueeze(-1)).double().sum(),
    )
