"""Settings that must be right but are not the question: which there are, and the best value of each for each arm."""

from collections.abc import Sequence

import pandas as pd

from kd.analysis.evidence import PARTS
from kd.analysis.loading import Runs
from kd.analysis.statistics import Arm
from kd.errors import DataError

USUAL_NUISANCE = ("learning_rate", "train.warmup_steps")
"""Settings of the recipe that hardly ever are the question themselves."""
NEVER = ("seed", "trainer")


def in_order(values: pd.Series) -> pd.Series:
    """Return values that sort as readers expect: numbers by size, also where they are text."""
    numbers = pd.to_numeric(values, errors="coerce")
    return values if (numbers.isna() & values.notna()).any() else numbers


def short_name(column: str) -> str:
    """Return a setting's name as a command line may have it: without the group in front."""
    return column.rpartition(".")[2]


def find_nuisance(runs: Runs, names: Sequence[str], notes: list[str]) -> list[str]:
    """Return the columns of `runs.runs` that names of settings stand for, in full or without the group in front.

    One in which the runs do not differ is left out, with a note.

    Raises:
        DataError: if a name is none of these runs' settings, or may not be one.
    """
    varied = [name for name in ("alpha", "temperature", "learning_rate", *runs.varied) if runs.runs[name].nunique() > 1]
    known = {key for run in runs.files.values() for key in run.settings}
    columns = []
    for name in names:
        if name in NEVER:
            raise DataError(f"{name} cannot be a nuisance setting: name settings of the recipe, like learning_rate.")
        found = _matching(name, varied)
        if len(found) > 1:
            raise DataError(f"{name} could be any of {', '.join(found)}: name one of them in full.")
        if not found and not _matching(name, sorted(known)):
            raise DataError(f"{name} is no setting of these runs. They differ in: {', '.join(varied) or 'nothing'}.")
        if not found:
            notes.append(f"All runs have the same {name}: there is no best value of it to choose.")
        columns += found
    return list(dict.fromkeys(columns))


def _matching(name: str, columns: Sequence[str]) -> list[str]:
    exact = [column for column in columns if column in (name, name.removeprefix("train."))]
    return exact or [column for column in columns if short_name(column) == name]


def arms_of(tried: pd.DataFrame, columns: Sequence[str]) -> list[Arm]:
    """Return the arms that settings fall into, each with the setting that is best on the validation part.

    Only settings with as many seeds as any of the arm's can be chosen: a mean over fewer wins by luck.

    Args:
        tried: A row a setting, numbered from 0.
        columns: What tells arms from each other.
    """
    arms = []
    for _, rows in tried.groupby(list(columns), dropna=False, sort=False):
        whole = rows[rows["seeds"] == rows["seeds"].max()]
        arms.append(Arm(int(whole[PARTS["validation"]].idxmin()), [int(number) for number in rows.index]))
    return arms
