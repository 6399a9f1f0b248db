"""Writes the figures that README.md and this experiment's page quote, from the results beside them.

    python experiments/alpha_temperature/figures.py --collect   # after both sweeps: outputs/ to results/, then pages
    python experiments/alpha_temperature/figures.py             # results/ to pages

A page marks what is written into it: `<!-- figures: NAME -->`, the figures, `<!-- end of figures -->`. A test compares
the pages with what this makes of the results.
"""

import argparse
import re
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf

from kd.analysis import Runs, best_of, load_runs, verdict
from kd.analysis.plots import by_temperature, heatmap, png
from kd.analysis.tables import interval_text, spread_text

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
RESULTS = HERE / "results"
OUTPUTS = Path("outputs/alpha_temperature")
COMMAND = "python -m kd.train experiment=alpha_temperature"
WARM_UP_COMMAND = "python -m kd.train experiment=warm_up"
DEFAULT_RECIPE = REPOSITORY / "conf" / "train" / "quick.yaml"
NUISANCE = ("learning_rate", "warmup_steps")
SETTINGS = ("alpha", "temperature", *NUISANCE, "seed")
MEASURED = (
    *("val_loss", "val_ppl", "test_loss", "test_ppl", "val_kl", "val_agreement", "teacher_val_ppl"),
    *("tokens", "flops", "wall_seconds", "clip_rate"),
)
DIFFERENCES = ("difference", "low", "high", "baseline_difference", "baseline_low", "baseline_high", "gap_closed")
OF_ARMS = (
    *("label", "alpha", "temperature", "best_at", "is_best", "in_set", "seeds"),
    *("val_ppl", "val_ppl_sd", "test_ppl", "test_ppl_sd", *DIFFERENCES),
)
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def collect(folder: Path = OUTPUTS, results: Path = RESULTS) -> None:
    """Write the runs of the experiment, its answer, arms and pictures into the results.

    Args:
        folder: The experiment's outputs.
        results: Gets embedded.csv (a row a run), embedded-arms.csv (a row an arm), embedded-answer.txt and two PNGs.
    """
    runs = load_runs(folder)
    comparison = best_of(runs, NUISANCE)
    _write_runs(runs, results / "embedded.csv")
    comparison.settings[list(OF_ARMS)].round(6).to_csv(results / "embedded-arms.csv", index=False)
    sentences = [*verdict(comparison), *comparison.warnings, *comparison.notes]
    (results / "embedded-answer.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    for name, figure in (("heatmap", heatmap(runs, comparison)), ("temperature", by_temperature(runs, comparison))):
        (results / f"embedded-{name}.png").write_bytes(png(figure))


def collect_warm_up(folder: Path, results: Path = RESULTS) -> None:
    """Write the runs of the default's two warm-ups into the results, as warm_up.csv."""
    _write_runs(load_runs(folder), results / "warm_up.csv")


def _write_runs(runs: Runs, path: Path) -> None:
    frame = runs.runs[runs.runs["state"] == "done"].rename(columns={"train.warmup_steps": "warmup_steps"})
    if "warmup_steps" not in frame:  # all runs have the same
        frame["warmup_steps"] = [runs.files[name].settings["train.warmup_steps"] for name in frame["directory"]]
    frame["finished"] = [_day(Path(name) / "result.json") for name in frame["directory"]]
    frame[["run", *SETTINGS, *MEASURED, "finished"]].round(6).to_csv(path, index=False)


def _day(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).date().isoformat()


# --- figures -----------------------------------------------------------------------------------------------------


def default(results: Path = RESULTS) -> str:
    """Return what the embedded default reaches at temperature 1, as a sentence."""
    runs = pd.read_csv(results / "warm_up.csv")
    recipe = OmegaConf.load(DEFAULT_RECIPE)
    usual = runs[(runs["learning_rate"] == recipe.learning_rate) & (runs["warmup_steps"] == recipe.warmup_steps)]
    if usual.empty:
        raise SystemExit(
            f"{results / 'warm_up.csv'} has no runs of the default's recipe (learning_rate {recipe.learning_rate}, "
            f"warmup_steps {recipe.warmup_steps}): change conf/experiment/warm_up.yaml, and run it again."
        )
    with_teacher, without = (usual[usual["alpha"] == alpha]["val_ppl"] for alpha in (1, 0))
    teacher = usual["teacher_val_ppl"].dropna().iloc[0]
    return (
        "On the embedded default, at temperature 1, the student ends at validation perplexity "
        f"{_mean(with_teacher)} with the teacher\nalone (`alpha=1`) and {_mean(without)} without it (`alpha=0`): mean "
        f"and standard deviation over {len(without)} seeds. The teacher\nitself has {teacher:.1f}. "
        f"(`{WARM_UP_COMMAND}`, {runs['finished'].max()}; `experiments/alpha_temperature/`.)"
    )


def warm_up(results: Path = RESULTS) -> str:
    """Return validation perplexity, and the seeds' spread of the loss in nats, by alpha and warm-up."""
    runs = pd.read_csv(results / "warm_up.csv")
    header = ["alpha", "warm-up", "validation perplexity", "lowest to highest", "spread of val_loss (nats)", "seeds"]
    rows = []
    for (alpha, steps), seeds in runs.groupby(["alpha", "warmup_steps"]):
        ends = f"{seeds['val_ppl'].min():.1f} to {seeds['val_ppl'].max():.1f}"
        rows.append([f"{alpha:g}", f"{steps:g} steps", _mean(seeds["val_ppl"]), ends, f"{seeds['val_loss'].std():.3f}"])
        rows[-1].append(f"{len(seeds)}")
    return f"{_markdown(header, rows)}\n\n`{WARM_UP_COMMAND}`, {runs['finished'].max()}."


def _mean(values: "pd.Series[float]") -> str:
    return spread_text(values.mean(), values.std(ddof=1))


def source(results: Path = RESULTS) -> str:
    """Return what the experiment's figures were made by."""
    runs = pd.read_csv(results / "embedded.csv")
    seeds = runs["seed"].nunique()
    return f"`{COMMAND}`: {len(runs)} runs, {seeds} seeds, the last finished on {runs['finished'].max()}."


def answer(results: Path = RESULTS) -> str:
    """Return the verdict, what it stands on, and what was left out, as a list."""
    lines = (results / "embedded-answer.txt").read_text(encoding="utf-8").splitlines()
    return "\n".join(f"- {line}" for line in lines)


def grid(results: Path = RESULTS) -> str:
    """Return test perplexity by alpha and temperature, each at its own best recipe; the best in bold."""
    arms = pd.read_csv(results / "embedded-arms.csv")
    shown = [spread_text(row["test_ppl"], row["test_ppl_sd"]) for row in arms.to_dict("records")]
    arms["shown"] = [f"**{text}**" if best else text for text, best in zip(shown, arms["is_best"], strict=True)]
    return _by_temperature(arms)


def smollm2(results: Path = RESULTS) -> str:
    """Return test perplexity by alpha and temperature with SmolLM2-135M as the teacher; the lowest in bold."""
    runs = pd.read_csv(results / "smollm2.csv")
    groups = runs.groupby(["alpha", "temperature"], dropna=False)["test_ppl"]
    means = groups.agg(["mean", "std"]).reset_index()
    means["shown"] = [spread_text(row["mean"], row["std"]) for row in means.to_dict("records")]
    lowest = means["mean"].idxmin()
    means.loc[lowest, "shown"] = f"**{means['shown'][lowest]}**"
    return _by_temperature(means)


def _by_temperature(frame: pd.DataFrame) -> str:
    frame["column"] = ["no temperature" if pd.isna(value) else f"T = {value:g}" for value in frame["temperature"]]
    columns = ["no temperature", *(f"T = {value:g}" for value in sorted(frame["temperature"].dropna().unique()))]
    table = frame.pivot_table(index="alpha", columns="column", values="shown", aggfunc="first").fillna("")
    columns = [name for name in columns if name in table]
    return _markdown(["alpha", *columns], [[f"{alpha:g}", *row] for alpha, row in table[columns].T.items()])


def arms(results: Path = RESULTS) -> str:
    """Return the arms, best first, each at its own best recipe, with simultaneous intervals."""
    frame = pd.read_csv(results / "embedded-arms.csv").sort_values("val_ppl")
    header = ["setting", "at", "verdict", "test perplexity", "to the best (nats)", "to alpha 0 (nats)", "gap closed"]
    rows = []
    for row in frame.to_dict("records"):
        word = "best" if row["is_best"] else "equal" if row["in_set"] else "worse"
        best, baseline = (
            interval_text(*(row[prefix + name] for name in ("difference", "low", "high")))
            for prefix in ("", "baseline_")
        )
        gap = "-" if pd.isna(row["gap_closed"]) else f"{row['gap_closed']:.0%}"
        perplexity = spread_text(row["test_ppl"], row["test_ppl_sd"])
        rows.append([row["label"], row["best_at"], word, perplexity, best, baseline, gap])
    return _markdown(header, rows)


def sensitivity(results: Path = RESULTS) -> str:
    """Return validation perplexity of each arm at each recipe; each arm's best in bold."""
    runs = pd.read_csv(results / "embedded.csv")
    keys = ["alpha", "temperature"]
    recipes = runs[list(NUISANCE)].drop_duplicates().sort_values(list(NUISANCE))
    header = ["alpha", "T", *(f"{rate:g}, {warmup:g}" for rate, warmup in recipes.itertuples(index=False))]
    rows = []
    for (alpha, temperature), arm in runs.groupby(keys, dropna=False):
        groups = dict(iter(arm.groupby(list(NUISANCE))["val_ppl"]))
        best = min(groups, key=lambda recipe: groups[recipe].mean())
        cells = [
            "" if recipe not in groups else f"**{_mean(groups[recipe])}**" if recipe == best else _mean(groups[recipe])
            for recipe in recipes.itertuples(index=False, name=None)
        ]
        rows.append([f"{alpha:g}", "" if pd.isna(temperature) else f"{temperature:g}", *cells])
    return _markdown(header, rows)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- pages -------------------------------------------------------------------------------------------------------

FIGURES = {figure.__name__: figure for figure in (default, warm_up, source, answer, grid, arms, sensitivity, smollm2)}
PAGES = (REPOSITORY / "README.md", HERE / "README.md")


def written(page: str) -> str:
    """Return a page with its marked parts as the results have them."""
    return BLOCK.sub(lambda found: f"{found[1]}{FIGURES[found[2]]()}\n{found[3]}", page)


def main() -> None:
    """Collect, if asked to, and rewrite the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", nargs="?", const=OUTPUTS, type=Path, metavar="FOLDER", help=f"usually {OUTPUTS}")
    folder = parser.parse_args().collect
    if folder is not None:
        collect(folder)
        collect_warm_up(folder.parent / "warm_up")
    for path in PAGES:
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
