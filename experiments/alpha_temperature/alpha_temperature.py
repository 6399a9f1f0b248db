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
# 1. Which setting gives the lowest validation loss, and which settings cannot be told from it? Both alpha and T scale
#    the gradient, so that at a single learning rate settings may only rank by how well that rate suits them. So each
#    setting stands at its *own best* learning rate and warm-up, and that these were chosen is counted in the intervals.
# 2. How much does the recipe matter, and would a grid at a single rate have told the same story?
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

from kd.analysis import best_of, load_runs, verdict
from kd.analysis.plots import by_temperature, clip_rate, heatmap, kl_against_cross_entropy, learning_curves
from kd.analysis.tables import Table, cost_table, sensitivity_table, settings_table

EXPERIMENT = Path("outputs/alpha_temperature")
# The notebook's own folder is the working directory in Jupyter; outputs/ is further up.
folder = next(
    (above / EXPERIMENT for above in (Path.cwd(), *Path.cwd().parents) if (above / EXPERIMENT).is_dir()), None
)
assert folder is not None, f"{EXPERIMENT} is not there: run `python -m kd.train experiment=alpha_temperature` first."
runs = load_runs(folder)
runs.runs["state"].value_counts()

# %% [markdown]
# ## 1. The grid, each setting at its own best recipe
#
# Means over seeds with their standard deviation. Alpha 0 is plain cross-entropy, where temperature means nothing: one
# cell for all temperatures.

# %%
NUISANCE = ["learning_rate", "warmup_steps"]
comparison = best_of(runs, NUISANCE)
comparison.table()

# %%
heatmap(runs, comparison)

# %%
by_temperature(runs, comparison)

# %% [markdown]
# ### The answer
#
# All intervals hold together with 95 % probability (Tukey and Kramer's, on paired differences), and they are wide
# enough for whichever recipe is truly best for a setting: none wins by the luckiest of its rates. *Equal* are the
# settings whose interval to the best reaches 0: as far as these runs can tell, they are as good.

# %%
for sentence in [*verdict(comparison), *comparison.notes]:
    print("-", sentence)

# %% [markdown]
# What the answer stands on; nothing here is nothing found.

# %%
for sentence in comparison.warnings:
    print("-", sentence)


# %%
def shown(table: Table) -> pd.DataFrame:
    """Return a table of the report as a frame."""
    return pd.DataFrame(table.rows, columns=table.header)


shown(settings_table(comparison))

# %% [markdown]
# ## 2. How much does the recipe matter?
#
# Validation perplexity of each setting at each recipe; the best, which was taken above, has a star.

# %%
shown(sensitivity_table(comparison))

# %% [markdown]
# The rank of each setting (1 is the lowest mean validation loss) at each recipe, its mean loss there above its best
# (nats), and the rank correlation (Spearman's) between recipes. Near 1, a sweep at one recipe would have told the same
# story.

# %%
losses = comparison.tried.pivot_table(
    index=["label"], columns=comparison.nuisance or ["trainer"], values="val_loss", aggfunc="first"
)
display(losses.rank().astype("Int64").sort_values(losses.columns[0]))
display(losses.sub(losses.min(axis=1), axis=0).round(3))
if losses.shape[1] > 1:
    display(losses.corr(method="spearman").round(3))

# %% [markdown]
# The same question asked at each learning rate alone, the warm-up still chosen. Where the answers differ, a grid at a
# single rate would have misled.

# %%
for rate in sorted(runs.runs["learning_rate"].dropna().unique()):
    at_rate = replace(runs, runs=runs.runs[runs.runs["learning_rate"] == rate])
    print(f"learning rate {rate:g}")
    for sentence in verdict(best_of(at_rate, ["warmup_steps"])):
        print("  -", sentence)

# %% [markdown]
# Where the gradient is clipped most of the time, the clip sets the step size, and alpha and T no longer scale it: the
# share of log points above the clip says how far that happened.

# %%
clip_rate(comparison)

# %% [markdown]
# ## 3. What is gained, and what it costs
#
# The difference to the baseline, which stands at its own best recipe too, in nats per token of the test part
# (negative: better than without a teacher), with its simultaneous 95 % interval over paired seeds and documents; and
# the share of the gap between baseline and teacher that is closed.

# %%
columns = ["label", "seeds", "baseline_difference", "baseline_low", "baseline_high", "gap_closed", "in_set"]
comparison.settings.sort_values("val_loss")[columns].round(4)

# %%
shown(cost_table(comparison))

# %% [markdown]
# Does a lower loss come from being like the teacher, or from being like the text? A point a run:

# %%
kl_against_cross_entropy(runs, comparison)

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
# - Learning rate and warm-up were tried at the values above only. Where a setting's best is the largest or smallest one
#   tried, its true best may lie beyond.
