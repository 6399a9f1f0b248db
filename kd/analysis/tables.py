"""Tables for readers: the same rows as text, Markdown and HTML."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from kd.analysis.arms import in_order, short_name
from kd.analysis.comparison import Comparison, sd_text
from kd.analysis.loading import Runs

MEASURES = {"ppl": "Perplexity", "loss": "Loss", "reward_accuracy": "Reward accuracy"}


@dataclass(frozen=True)
class Table:
    """A titled table of text."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Return the table in Markdown."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines)

    def text(self) -> str:
        """Return the table with aligned columns."""
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def _escaped(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def number_text(value: float, digits: int = 4) -> str:
    """Return a number for readers; a dash where it is unknown."""
    return "-" if math.isnan(value) else f"{value:.{digits}g}"


def spread_text(mean: float, sd: float) -> str:
    """Return `mean +- SD`; without the SD where it is unknown."""
    return number_text(mean) + ("" if math.isnan(sd) else f" +- {sd_text(sd)}")


def interval_text(estimate: float, low: float, high: float) -> str:
    """Return a difference with its interval, or with the words that there is none."""
    if math.isnan(estimate):
        return "-"
    return f"{estimate:+.4f} ({'no interval' if math.isnan(low) else f'{low:+.4f} to {high:+.4f}'})"


def grid_table(comparison: Comparison) -> Table:
    """Return perplexity by alpha and temperature."""
    frame = comparison.table()
    where = " at each arm's best " + ", ".join(map(short_name, comparison.nuisance)) if comparison.nuisance else ""
    title = f"{MEASURES[comparison.measure]} ({comparison.part} part){where}, mean +- SD over seeds"
    if frame.empty:
        return Table(title, ["alpha"], [])
    names = [*comparison.panels, "alpha"]
    frame = frame.reset_index()
    header = [*names, *("any T" if column == "-" else str(column) for column in frame.columns[len(names) :])]
    rows = [[_cell(value) for value in line] for line in frame.itertuples(index=False)]
    return Table(title, header, rows)


def _cell(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def sensitivity_table(comparison: Comparison) -> Table:
    """Return what each arm reaches at each value of the nuisance settings, a row an arm; none for `compare`."""
    title = "Sensitivity (validation part): mean +- SD over seeds; * is the best, which was taken"
    if not comparison.nuisance or comparison.settings.empty:
        return Table(title, ["arm"], [])
    column, tried = f"val_{comparison.measure}", comparison.tried
    values = tried.sort_values(comparison.nuisance, key=in_order)["best_at"].unique()
    rows = []
    for arm in _ranked(comparison).to_dict("records"):
        cells = {row["best_at"]: row for row in tried[tried["label"] == arm["label"]].to_dict("records")}
        texts = [spread_text(cells[at][column], cells[at][f"{column}_sd"]) if at in cells else "-" for at in values]
        marked = [text + (" *" if at == arm["best_at"] else "") for at, text in zip(values, texts, strict=True)]
        rows.append([str(arm["label"]), *marked])
    return Table(title, ["arm", *values], rows)


def settings_table(comparison: Comparison) -> Table:
    """Return the settings by rank, with their differences to the best and to the baseline."""
    measure, quoted, unit = comparison.measure, comparison.column, comparison.unit
    header = ["setting", *(["best at"] if comparison.nuisance else []), "verdict", "seeds", f"val {measure}"]
    header += [f"test {measure}"] if comparison.part == "test" else []
    header += [f"to the best ({unit})", f"to the baseline ({unit})", "gap closed"]
    columns = dict.fromkeys([f"val_{measure}", quoted])
    rows = []
    for values in _ranked(comparison).to_dict("records"):
        cells = [str(values["label"]), *([str(values["best_at"])] if comparison.nuisance else [])]
        cells += [_verdict(comparison, bool(values["is_best"]), bool(values["in_set"])), str(values["seeds"])]
        cells += [spread_text(values[column], values[f"{column}_sd"]) for column in columns]
        cells += [interval_text(values["difference"], values["low"], values["high"])]
        cells += [interval_text(*(values[f"baseline_{name}"] for name in ("difference", "low", "high")))]
        gap = values["gap_closed"]
        rows.append([*cells, "-" if math.isnan(gap) else f"{gap:.0%}"])
    return Table("Settings, best on the validation part first; intervals hold together", header, rows)


def _verdict(comparison: Comparison, is_best: bool, in_set: bool) -> str:
    if is_best:
        return "best" if comparison.has_set else "lowest"
    if not comparison.has_set:
        return "-"
    return "equal" if in_set else "worse"


def cost_table(comparison: Comparison) -> Table:
    """Return what the settings cost, means over seeds, in the same order."""
    header = [
        "setting",
        "tokens",
        "FLOPs",
        "wall-clock (s)",
        "parameters",
        "KL to teacher (nats)",
        "agreement",
        "clip rate",
    ]
    names = ("tokens", "flops", "wall_seconds", "parameters", "val_kl", "val_agreement", "clip_rate")
    rows = [
        [str(row["label"]), *(_amount(float(row[name])) for name in names)]
        for row in _ranked(comparison).to_dict("records")
    ]
    return Table("Cost, and likeness to the teacher (validation part)", header, rows)


def _amount(value: float) -> str:
    """A count in full, up to millions; anything else by three digits."""
    whole = math.isfinite(value) and value == int(value) and 1000 <= value < 1e8
    return f"{value:,.0f}" if whole else number_text(value, 3)


def _ranked(comparison: Comparison) -> pd.DataFrame:
    settings = comparison.settings
    return settings.sort_values("val_objective", kind="stable") if len(settings) else settings


def undone_table(runs: Runs) -> Table:
    """Return the runs that are not done, with what is known of them."""
    undone = runs.runs[runs.runs["state"] != "done"]
    rows = [[str(row["run"]), str(row["state"]), str(row["error"])[:300] or "-"] for row in undone.to_dict("records")]
    return Table("Runs that are not done", ["run", "state", "error"], rows)


def plain_tables(comparison: Comparison, runs: Runs) -> Sequence[Table]:
    """Return all tables that have rows, in the order of the report."""
    tables = [undone_table(runs)]
    if len(comparison.settings):
        answer = [grid_table(comparison), settings_table(comparison), sensitivity_table(comparison)]
        tables = [*answer, cost_table(comparison), *tables]
    return [table for table in tables if table.rows]
