"""From finished runs to what the statistics take: settings by seeds, and settings by documents."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from kd.analysis.blocks import Blocks
from kd.analysis.loading import Runs
from kd.analysis.statistics import MIN_DOCUMENTS, Scores

PARTS = {"validation": "val_objective", "test": "test_objective"}


@dataclass(frozen=True)
class Part:
    """The scores of all settings on one part of the text."""

    name: str
    scores: Scores
    num_documents: int
    """0 where they cannot be used."""
    reason: str
    """Why the documents cannot be used; empty if they can."""


def setting_columns(runs: Runs) -> list[str]:
    """Return the columns of `runs.runs` that make a setting."""
    return ["trainer", "alpha", "temperature", "learning_rate", *runs.varied]


def comparable_runs(runs: Runs, notes: list[str]) -> pd.DataFrame:
    """Return the runs that can be compared with each other: done, scored on the same tokens, one a setting and seed."""
    done = runs.runs[(runs.runs["state"] == "done") & runs.runs["val_objective"].notna() & runs.runs["seed"].notna()]
    if done.empty:
        return done
    evaluations = done["evaluation"].value_counts()
    kept = done[done["evaluation"] == evaluations.index[0]]
    if len(kept) < len(done):
        others = ", ".join(sorted(done[done["evaluation"] != evaluations.index[0]]["directory"])[:3])
        notes.append(
            "Scored on other data or by another measure, where numbers mean something else, and left out: "
            f"{len(done) - len(kept)} of {len(done)} finished runs "
            f"({others}{', ...' if len(done) - len(kept) > 3 else ''})."
        )
    single: pd.DataFrame = kept.drop_duplicates([*setting_columns(runs), "seed"])
    if len(single) < len(kept):
        notes.append(f"Left out as repeats of another run's setting and seed: {len(kept) - len(single)} runs.")
    return single


def has_part(frame: pd.DataFrame, name: str) -> bool:
    """Return whether all runs have a loss on this part."""
    return bool(frame[PARTS[name]].notna().all())


def collect(runs: Runs, groups: Sequence[pd.DataFrame], name: str) -> Part:
    """Return the scores of settings on a part.

    Args:
        runs: Where the files are.
        groups: The comparable runs of each setting.
        name: validation or test.
    """
    seeds = sorted({seed for group in groups for seed in group["seed"]})
    losses = np.full((len(groups), len(seeds)), math.nan)
    for row, group in enumerate(groups):
        losses[row, [seeds.index(seed) for seed in group["seed"]]] = group[PARTS[name]]
    tables = [[runs.files[directory].blocks.get(name) for directory in group["directory"]] for group in groups]
    known = [table for row in tables for table in row if table is not None]
    reason = _unusable(known, sum(map(len, tables)), name)
    if reason:
        return Part(name, Scores(losses), 0, reason)
    sums: list[Any] = [
        np.mean([table.by_document()[0] for table in row if table is not None], axis=0) for row in tables
    ]
    tokens = known[0].by_document()[1]
    return Part(name, Scores(losses, np.stack(sums), tokens), len(tokens), "")


def _unusable(known: Sequence[Blocks], expected: int, name: str) -> str:
    """Why the documents of a part cannot be used, or nothing."""
    if len(known) < expected:
        return f"{expected - len(known)} runs have no usable block scores of the {name} part"
    if not all(table.documents_known for table in known):
        return f"the {name} part does not say which blocks are of one document"
    if not all(table.pairs_with(known[0]) for table in known):
        return f"the runs' blocks of the {name} part are not the same"
    count = len(np.unique(known[0].document))
    if count < MIN_DOCUMENTS:
        return f"the {name} part has {count} documents, fewer than {MIN_DOCUMENTS}"
    return ""
