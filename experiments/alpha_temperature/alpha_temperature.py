# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Which alpha and temperature?
#
# The student is trained on `alpha * T^2 * KL(teacher/T || student/T) + (1 - alpha) * cross-entropy`. This notebook
# reads the runs of `python -m kd.train experiment=alpha_temperature` (any other sweep over alpha and temperature will
# do) and asks three things of them:
#
# 1. Which setting gives the lowest validation loss, and which settings cannot be told from it?
# 2. Is that the same at every learning rate? Both alpha and T scale the gradient, so that a grid at a single rate may
#    only rank settings by how well that rate happens to suit them.
# 3. What does distilling gain over plain cross-entropy (alpha 0), and what did it cost?
#
# Runs are compared on the student's cross-entropy at temperature 1, which no setting changes the meaning of. The
# validation part chooses; the numbers that are quoted come from the test part.

# %%
# %matplotlib inline
from dataclasses import replace
from pathlib import Path

import pandas as pd
from IPython.display import display

from kd.analysis import Comparison, Runs, compare, load_runs, verdict
from kd.analysis.plots import by_temperature, clip_rate, heatmap, kl_against_cross_entropy, learning_curves
from kd.analysis.tables import cost_table, settings_table

EXPERIMENT = Path("outputs/alpha_temperature")
# The notebook's own folder is the working directory in Jupyter; outputs/ is further up.
folder = next(
    (above / EXPERIMENT for above in (Path.cwd(), *Path.cwd().parents) if (above / EXPERIMENT).is_dir()), None
)
assert folder is not None, f"{EXPERIMENT} is not there: run `python -m kd.train experiment=alpha_temperature` first."
runs = load_runs(folder)
runs.runs["state"].value_counts()

# %% [markdown]
# ## 1. The grid
#
# Means over seeds with their standard deviation. Alpha 0 is plain cross-entropy, where temperature means nothing: one
# cell for all temperatures.

# %%
comparison = compare(runs)
comparison.table()

# %%
heatmap(runs, comparison)

# %%
by_temperature(runs, comparison)

# %% [markdown]
# ### The answer over all settings
#
# Hsu's multiple comparison with the best gives a *set*: with 95 % confidence the truly best of these settings is in it.
# All settings in the set are equally good answers, as far as these runs can tell.

# %%
for sentence in [*verdict(comparison), *comparison.notes]:
    print("-", sentence)


# %%
def shown(table: object) -> pd.DataFrame:
    """Return a table of the report as a frame."""
    return pd.DataFrame(table.rows, columns=table.header)  # type: ignore[attr-defined]


shown(settings_table(comparison))

# %% [markdown]
# ## 2. Does the answer depend on the learning rate?
#
# The same question, asked at each rate alone.


# %%
def at_rate(runs: Runs, rate: float) -> tuple[Runs, Comparison]:
    """Return the runs at a learning rate, and their comparison."""
    some = replace(runs, runs=runs.runs[runs.runs["learning_rate"] == rate])
    return some, compare(some)


rates = sorted(runs.runs["learning_rate"].dropna().unique())
by_rate = {rate: at_rate(runs, rate) for rate in rates}
for rate, (_, at_this_rate) in by_rate.items():
    print(f"learning rate {rate:g}")
    for sentence in verdict(at_this_rate):
        print("  -", sentence)

# %% [markdown]
# The rank of each setting (1 is the lowest mean validation loss) at each rate, the rate that suits it best, and the
# rank correlation (Spearman's) between the rates. Near 1, a sweep at one rate would have told the same story.

# %%
losses = pd.DataFrame(
    {
        rate: at_this_rate.settings.set_index(["alpha", "temperature"])["val_loss"]
        for rate, (_, at_this_rate) in by_rate.items()
    }
)
ranks = losses.rank().astype("Int64").add_prefix("rank at ")
ranks["best rate"] = losses.idxmin(axis=1)
display(ranks.sort_values(ranks.columns[0]))
if len(rates) > 1:
    display(losses.corr(method="spearman").round(3))

# %% [markdown]
# Where the gradient is clipped most of the time, the clip sets the step size, and alpha and T no longer scale it: the
# share of log points above the clip says how far that happened.

# %%
clip_rate(comparison)

# %% [markdown]
# ## 3. What is gained, and what it costs
#
# The difference to the baseline at the same rate, in nats per token of the test part (negative: better than without a
# teacher), with its 95 % interval over paired seeds and documents; and the share of the gap between baseline and
# teacher that is closed.

# %%
columns = ["label", "seeds", "baseline_difference", "baseline_low", "baseline_high", "gap_closed", "in_set"]
comparison.settings.sort_values("val_loss")[columns].round(4)

# %%
shown(cost_table(comparison))

# %% [markdown]
# Does a lower loss come from being like the teacher, or from being like the text? A point a run:

# %%
kl_against_cross_entropy(runs)

# %%
learning_curves(runs, comparison)

# %% [markdown]
# ## What these numbers do not say
#
# - They are about this student, this teacher, this text and this many steps. A student that is nearer to its teacher in
#   size, or trained longer, may prefer another alpha.
# - The seeds vary initialisation and data order, not the teacher: all runs share one.
# - A set of equals grows smaller with more seeds; settings in it are *not shown to be different*, which is not the same
#   as shown to be equal.
# - The learning rate was tried at the values above only. Where a setting's best rate is the largest or smallest one
#   tried, its true best may lie beyond.
