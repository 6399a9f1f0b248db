"""The pictures of a report, as PNG bytes. Colours are told apart by colour-blind readers too, and never stand alone."""

import io
import math
import textwrap
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from kd.analysis.arms import short_name
from kd.analysis.comparison import Comparison, sd_text
from kd.analysis.loading import Runs

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
"""Okabe and Ito's, the yellow last: it is faint on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.")
BASELINE = "#595959"
DPI = 130
Panel = tuple[str, pd.DataFrame, pd.DataFrame]
"""Title, settings, all runs."""


def png(figure: Figure) -> bytes:
    """Return a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _title(figure: Figure, text: str) -> None:
    """Put a title over a figure, in as many lines as its width needs."""
    letters_an_inch = 11
    figure.suptitle(textwrap.fill(text, int(figure.get_figwidth() * letters_an_inch)), fontsize=11)


def all_plots(runs: Runs, comparison: Comparison) -> dict[str, bytes]:
    """Return the pictures that the data allow, by file name without ending."""
    settings = comparison.settings
    figures: dict[str, Figure | None] = {"learning_curves": learning_curves(runs, comparison)}
    if len(settings):
        figures |= {
            "heatmap": heatmap(runs, comparison) if settings["alpha"].notna().any() else None,
            "temperature": by_temperature(runs, comparison) if settings["temperature"].notna().any() else None,
            "kl_against_cross_entropy": kl_against_cross_entropy(runs, comparison),
            "clip_rate": clip_rate(comparison),
        }
    return {name: png(figure) for name, figure in figures.items() if figure is not None}


def _panels(runs: Runs, comparison: Comparison) -> list[Panel]:
    """Split settings and runs by all that varies beside alpha and temperature; a baseline belongs to each teacher."""
    keys = comparison.panels
    settings, every = comparison.settings, _scored_alike(runs, comparison)
    if not keys:
        return [("", settings, every)]
    # A baseline has no teacher, so it makes no panel of its own where teachers differ.
    distilled = settings[settings["alpha"] > 0] if "teacher" in keys else settings
    panels: list[Panel] = []
    for values in distilled[keys].drop_duplicates().itertuples(index=False):
        wanted = dict(zip(keys, values, strict=True))
        title = ", ".join(f"{name} {value}" for name, value in wanted.items())
        panels.append((title, _matching(settings, wanted), _matching(every, wanted)))
    return panels


def _scored_alike(runs: Runs, comparison: Comparison) -> pd.DataFrame:
    """Return the runs that are, or may come to be, part of the comparison."""
    every = runs.runs
    alike: pd.DataFrame = every[(every["evaluation"] == comparison.evaluation) | (every["evaluation"] == "")]
    return alike if len(comparison.settings) else every


def _compared(runs: Runs, comparison: Comparison) -> pd.DataFrame:
    """Return the runs behind the comparison's numbers."""
    chosen: pd.DataFrame = runs.runs[runs.runs["directory"].isin(comparison.directories)]
    return chosen


def _matching(frame: pd.DataFrame, wanted: dict[str, object]) -> pd.DataFrame:
    keep = pd.Series(True, index=frame.index)
    for name, value in wanted.items():
        same = frame[name] == value
        if "evaluation" in frame:  # a run that failed before it said its settings may belong to any panel
            same |= frame["evaluation"] == ""
        keep &= same | (frame["alpha"] == 0) if name == "teacher" else same
    return frame[keep]


def _quoted(comparison: Comparison) -> tuple[str, str]:
    return ("test_ppl", "test") if comparison.part == "test" else ("val_ppl", "validation")


def _at_best(comparison: Comparison) -> str:
    return " at each one's best " + " and ".join(map(short_name, comparison.nuisance)) if comparison.nuisance else ""


def _grid(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(count, 2)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


# --- heatmap -----------------------------------------------------------------------------------------------------


def heatmap(runs: Runs, comparison: Comparison) -> Figure:
    """Draw perplexity by alpha and temperature: the best and its equals framed, missing and failed cells hatched."""
    column, part = _quoted(comparison)
    panels = [panel for panel in _panels(runs, comparison) if panel[1]["alpha"].notna().any()]
    every = _scored_alike(runs, comparison)
    temperatures = sorted(every.loc[every["alpha"] > 0, "temperature"].dropna().unique())
    alphas = sorted(every["alpha"].dropna().unique())
    width, height = max(5.5, 1.7 + 1.45 * max(len(temperatures), 1)), 1.9 + 0.75 * len(alphas)
    figure, axes = _grid(len(panels), width, height)
    shown = comparison.settings[column]
    low, high = float(shown.min()), float(shown.max())
    for axis, (title, settings, all_runs) in zip(axes, panels, strict=True):
        _fill(axis, settings, all_runs, alphas, temperatures, (column, low, high), comparison.has_set)
        axis.set_title(title)
    title = f"{part.capitalize()} perplexity{_at_best(comparison)}, mean \u00b1 SD over seeds (darker is lower, better)"
    _title(figure, title)
    return figure


def _fill(
    axis: Axes,
    settings: pd.DataFrame,
    all_runs: pd.DataFrame,
    alphas: Sequence[float],
    temperatures: Sequence[float],
    scale: tuple[str, float, float],
    has_set: bool,
) -> None:
    wide = max(len(temperatures), 1)
    for y, alpha in enumerate(alphas):
        places = [(0.0, float(wide), math.nan)] if alpha == 0 else [(x, 1.0, t) for x, t in enumerate(temperatures)]
        for x, span, temperature in places:
            _cell(
                axis, (x, y, span), _at(settings, alpha, temperature), _at(all_runs, alpha, temperature), scale, has_set
            )
    axis.set(xlim=(0, wide), ylim=(0, len(alphas)), xlabel="temperature", ylabel="alpha (weight of the teacher)")
    axis.set_xticks(np.arange(len(temperatures)) + 0.5, [f"{value:g}" for value in temperatures])
    labels = [f"{value:g}" + ("\nbaseline" if value == 0 else "") for value in alphas]
    axis.set_yticks(np.arange(len(alphas)) + 0.5, labels)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _at(frame: pd.DataFrame, alpha: float, temperature: float) -> pd.DataFrame:
    same = frame["temperature"].isna() if math.isnan(temperature) else frame["temperature"] == temperature
    return frame[(frame["alpha"] == alpha) & same]


def _cell(
    axis: Axes,
    place: tuple[float, float, float],
    setting: pd.DataFrame,
    all_runs: pd.DataFrame,
    scale: tuple[str, float, float],
    has_set: bool,
) -> None:
    x, y, span = place
    column, low, high = scale
    middle = (x + span / 2, y + 0.5)
    undone = _undone(all_runs)
    if setting.empty:
        box = Rectangle((x + 0.03, y + 0.04), span - 0.06, 0.92, facecolor="white", edgecolor="0.6", hatch="///")
        axis.add_patch(box)
        text = undone or "missing"
        axis.text(*middle, text, ha="center", va="center", bbox={"facecolor": "white", "edgecolor": "none"}, fontsize=9)
        return
    row = setting.iloc[0]
    share = 0.0 if high <= low else (float(row[column]) - low) / (high - low)
    axis.add_patch(Rectangle((x + 0.03, y + 0.04), span - 0.06, 0.92, facecolor=_shade(share), edgecolor="none"))
    spread = "" if math.isnan(row[f"{column}_sd"]) else f"\n\u00b1 {sd_text(row[f'{column}_sd'])} (n={row['seeds']})"
    mark = "\nBEST" if row["is_best"] else ("\nequal" if row["in_set"] and has_set else "")
    words = f"{row[column]:.4g}{spread}{mark}" + (f"\n{undone}" if undone else "")
    axis.text(*middle, words, ha="center", va="center", color="white" if share < 0.5 else "black", fontsize=9)
    if mark:
        style = "-" if row["is_best"] else "--"
        frame = (x + 0.05, y + 0.06), span - 0.1, 0.88
        axis.add_patch(Rectangle(*frame, fill=False, edgecolor="#D55E00", linewidth=3, linestyle=style))


def _shade(share: float) -> tuple[float, float, float]:
    """From dark blue (0) to nearly white (1): one hue, so that only lightness is read."""
    dark, light = np.array([0.03, 0.19, 0.42]), np.array([0.93, 0.96, 0.99])
    red, green, blue = dark + (light - dark) * share
    return float(red), float(green), float(blue)


def _undone(all_runs: pd.DataFrame) -> str:
    counts = all_runs["state"].value_counts()
    return ", ".join(f"{counts[state]} {state}" for state in ("failed", "running", "interrupted") if state in counts)


# --- lines and points ----------------------------------------------------------------------------------------------


def by_temperature(runs: Runs, comparison: Comparison) -> Figure:
    """Draw perplexity against temperature, a line an alpha with error bars (SD), the baseline as a level."""
    column, part = _quoted(comparison)
    panels = [panel for panel in _panels(runs, comparison) if panel[1]["temperature"].notna().any()]
    figure, axes = _grid(len(panels), 6.5, 4.3)
    colours = _colours(_compared(runs, comparison))
    for axis, (title, settings, _) in zip(axes, panels, strict=True):
        for index, (alpha, group) in enumerate(settings[settings["alpha"] > 0].groupby("alpha")):
            # A little apart, or error bars hide each other.
            x, error = group["temperature"] * 1.012**index, group[f"{column}_sd"].fillna(0)
            label = f"alpha {float(str(alpha)):g}"
            colour, marker, line = colours[float(str(alpha))], MARKERS[index % 8], LINES[index % 4]
            axis.errorbar(x, group[column], error, capsize=4, label=label, color=colour, marker=marker, linestyle=line)
        _level(axis, settings[settings["alpha"] == 0], column)
        temperatures = sorted(settings["temperature"].dropna().unique())
        axis.set_xscale("log")
        axis.set_xticks(temperatures, [f"{value:g}" for value in temperatures])
        axis.minorticks_off()
        axis.set(xlabel="temperature (log scale)", ylabel=f"{part} perplexity", title=title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    seeds = int(comparison.settings["seeds"].max())
    note = f"bars: SD over up to {seeds} seeds" if seeds > 1 else "one seed: no spread is known"
    _title(figure, f"{part.capitalize()} perplexity by temperature{_at_best(comparison)} ({note})")
    return figure


def _level(axis: Axes, baseline: pd.DataFrame, column: str) -> None:
    if baseline.empty:
        return
    mean, sd = float(baseline.iloc[0][column]), float(baseline.iloc[0][f"{column}_sd"])
    axis.axhline(mean, color=BASELINE, linestyle=(0, (6, 3)), label="baseline (alpha 0)")
    if math.isfinite(sd):
        axis.axhspan(mean - sd, mean + sd, color="0.5", alpha=0.2, linewidth=0)


def _colours(frame: pd.DataFrame) -> dict[float, str]:
    """Colour by alpha, the same in all pictures; grey without a teacher."""
    distilled = sorted(frame.loc[frame["alpha"] > 0, "alpha"].unique())
    return {-1.0: BASELINE, 0.0: BASELINE} | {alpha: COLOURS[i % len(COLOURS)] for i, alpha in enumerate(distilled)}


def _looks(frame: pd.DataFrame) -> tuple[dict[float, str], dict[float, int]]:
    """Colour by alpha, and a number by temperature for markers and lines; -1 stands for none."""
    temperatures = sorted(frame["temperature"].fillna(-1).unique())
    return (
        _colours(frame),
        {temperature: index for index, temperature in enumerate(temperatures)},
    )


def _settings(frame: pd.DataFrame) -> Iterator[tuple[float, float, pd.DataFrame]]:
    """Yield the rows of each alpha and temperature; -1 stands for none."""
    filled = frame.fillna({"alpha": -1, "temperature": -1})
    for alpha, some in filled.groupby("alpha"):
        for temperature, group in some.groupby("temperature"):
            yield float(str(alpha)), float(str(temperature)), group


def _name(alpha: float, temperature: float) -> str:
    if alpha < 0:
        return "no alpha"
    return f"alpha {alpha:g}" + ("" if temperature < 0 else f", T {temperature:g}")


def learning_curves(runs: Runs, comparison: Comparison) -> Figure | None:
    """Draw validation perplexity over optimizer steps, a line a setting: the mean over its finished, compared runs."""
    compared = _compared(runs, comparison)
    series = runs.metrics[(runs.metrics["metric"] == "val_ppl") & runs.metrics["value"].notna()]
    series = series[series["directory"].isin(compared["directory"])]
    if series.empty:
        return None
    panels = _panels(runs, comparison)
    figure, axes = _grid(len(panels), 7.5, 5)
    for axis, (title, _, some) in zip(axes, panels, strict=True):
        _curves(axis, series[series["directory"].isin(some["directory"])], compared)
        axis.set(xlabel="optimizer step", ylabel="validation perplexity (log scale)", title=title)
        axis.set_yscale("log")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
        axis.tick_params(axis="y", which="both", labelsize=8)
        axis.grid(alpha=0.3, which="both")
    _title(figure, f"Learning curves{_at_best(comparison)}, mean over seeds")
    return figure


def _curves(axis: Axes, series: pd.DataFrame, compared: pd.DataFrame) -> None:
    colours, numbers = _looks(compared)
    for alpha, temperature, group in _settings(series):
        curve = group.groupby("step")["value"].mean()
        number, label = numbers[temperature], _name(alpha, temperature)
        line, marker = LINES[number % len(LINES)], MARKERS[number % len(MARKERS)]
        (drawn,) = axis.plot(curve.index, curve.to_numpy(), linestyle=line, marker=marker, label=label)
        drawn.set(color=colours[alpha], markersize=4, linewidth=1.4)
    axis.legend(fontsize=7)


def kl_against_cross_entropy(runs: Runs, comparison: Comparison) -> Figure | None:
    """Draw each compared run's divergence from the teacher against its loss, both at temperature 1."""
    compared = _compared(runs, comparison)
    done = compared[compared["val_kl"].notna() & compared["val_loss"].notna()]
    if done.empty:
        return None
    colours, numbers = _looks(compared)
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axis = figure.subplots()
    for alpha, temperature, group in _settings(done):
        marker, label = MARKERS[numbers[temperature] % len(MARKERS)], _name(alpha, temperature)
        axis.scatter(group["val_loss"], group["val_kl"], s=45, alpha=0.85, c=colours[alpha], marker=marker, label=label)
    axis.set(xlabel="cross-entropy with the text (nats per token, validation)")
    axis.set(
        ylabel="KL(teacher || student) (nats per token)", title="Like the teacher, or like the text? A point a run"
    )
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def clip_rate(comparison: Comparison) -> Figure | None:
    """Draw for each setting the share of log points whose mean gradient norm lies above the clip."""
    settings = comparison.settings[comparison.settings["clip_rate"].notna()].iloc[::-1]
    if settings.empty:
        return None
    figure = Figure(figsize=(7.5, 1.4 + 0.26 * len(settings)), layout="constrained")
    axis = figure.subplots()
    axis.barh(settings["label"], 100 * settings["clip_rate"], color=COLOURS[0])
    for row, share in enumerate(settings["clip_rate"]):
        axis.text(100 * share + 1, row, f"{share:.0%}", va="center", fontsize=8)
    axis.set(xlim=(0, 112), ylim=(-0.7, len(settings) - 0.3), xlabel="log points above train.gradient_clip (%)")
    axis.set_xticks([0, 25, 50, 75, 100])
    axis.set_title("Clip rate, mean over seeds")
    axis.tick_params(axis="y", labelsize=8)
    return figure
