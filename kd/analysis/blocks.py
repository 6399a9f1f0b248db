"""The per-block scores of finished runs: read, checked, and summed by document."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

FIELDS = ("document", "tokens", "nll")
UNKNOWN = -1


@dataclass(frozen=True)
class Blocks:
    """Scores of one part; three arrays of one length, a block each."""

    document: npt.NDArray[np.int64]
    """The document's number, -1 where unknown."""
    tokens: npt.NDArray[np.float64]
    nll: npt.NDArray[np.float64]
    """Summed over the block's tokens, in nats."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def documents_known(self) -> bool:
        """Whether every block says which document it is from."""
        return bool((self.document != UNKNOWN).all())

    def pairs_with(self, other: "Blocks") -> bool:
        """Return whether both hold the same blocks in the same order."""
        return np.array_equal(self.document, other.document) and np.array_equal(self.tokens, other.tokens)

    def by_document(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return summed NLL and tokens of each document, (D,) each."""
        _, index = np.unique(self.document, return_inverse=True)
        return np.bincount(index, self.nll).astype(np.float64), np.bincount(index, self.tokens).astype(np.float64)


def read_blocks(path: Path) -> tuple[Blocks | None, str]:
    """Return the scores in a file, or None and what is wrong with it."""
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        return None, f"it cannot be read ({error})"
    if (
        not isinstance(table, np.ndarray)
        or table.ndim != 1
        or any(name not in (table.dtype.names or ()) for name in FIELDS)
    ):
        return None, f"it is not a table of {', '.join(FIELDS)}"
    try:
        blocks = Blocks(
            *(table[name].astype(kind) for name, kind in zip(FIELDS, (np.int64, float, float), strict=True))
        )
    except (TypeError, ValueError) as error:
        return None, f"its columns are not numbers ({error})"
    if (
        not len(table)
        or not np.isfinite(blocks.nll).all()
        or not (blocks.tokens.min() >= 0 and blocks.tokens.sum() > 0)
    ):
        return None, "it holds no finite scores"
    return blocks, ""
