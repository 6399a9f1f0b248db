"""The report of one or several experiments: HTML in one file, Markdown, CSV and pictures."""

import base64
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment

from kd.analysis.comparison import Comparison, best_of, compare
from kd.analysis.loading import Runs, load_runs
from kd.analysis.plots import all_plots
from kd.analysis.reading import is_run
from kd.analysis.tables import Table, plain_tables
from kd.analysis.verdict import method, states, verdict
from kd.errors import ResourceError
from kd.files import write_text

CAPTIONS = {
    "heatmap": "Solid frame: the best setting on the validation part. Dashed frames: settings that cannot be told "
    "from it. Hatched: no finished run.",
    "temperature": "Bars are standard deviations over seeds, not intervals of the comparison, which is paired.",
    "learning_curves": "On the way, evaluations may use a part of the validation blocks (train.eval_blocks).",
    "kl_against_cross_entropy": "Left is closer to the text, down is closer to the teacher.",
    "clip_rate": "Near 100 %, the clip sets the step size, and settings differ in their effective learning rate.",
}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.answer { border-left: 5px solid #0072B2; background: #eef5fa; padding: .6rem 1rem; }
.answer p { margin: .3rem 0; } .answer p:first-child { font-weight: 600; }
.unsafe { border-left: 5px solid #D55E00; background: #fdf3ec; padding: .6rem 1rem; margin-top: 1rem; }
.unsafe p { margin: .3rem 0; font-weight: 600; } .unsafe ul { margin: .3rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .7rem; text-align: left; white-space: nowrap; }
td.wrap { white-space: normal; } th { background: #f4f4f4; }
tr.best td { font-weight: 600; background: #fdeee3; } tr.equal td { background: #fdf7f1; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0 2rem; } figcaption { color: #555; font-size: .87rem; }
pre { background: #f4f4f4; padding: .7rem; overflow-x: auto; font-size: .82rem; white-space: pre-wrap; }
</style></head><body>
<h1>{{ title }}</h1><p>{{ states }}</p>
<div class="answer">{% for line in verdict %}<p>{{ line }}</p>{% endfor %}</div>
{% if warnings %}<div class="unsafe"><p>Before you rely on this</p><ul>{% for line in warnings %}<li>{{ line }}</li>
{% endfor %}</ul></div>{% endif %}
{% if notes %}<h2>To know</h2><ul>{% for line in notes %}<li>{{ line }}</li>{% endfor %}</ul>{% endif %}
{% for table in tables %}<h2>{{ table.title|replace('+-', '\u00b1') }}</h2><div class="scroll"><table>
<tr>{% for cell in table.header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr{% for word in ("best", "equal") if word in row[1:3] %} class="{{ word }}"{% endfor %}>
{% for cell in row %}<td{% if cell|length > 60 %} class="wrap"{% endif %}>
{{- cell|replace(' +- ', ' \u00b1 ') }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endfor %}
<h2>Pictures</h2>
{% for name, data, caption in pictures %}<figure><img alt="{{ name }}" src="data:image/png;base64,{{ data }}">
<figcaption>{{ caption }}</figcaption></figure>{% endfor %}
<h2>How to read this</h2><ul>{% for line in method %}<li>{{ line }}</li>{% endfor %}</ul>
<h2>Made by</h2><pre>{% for line in commands %}{{ line }}
{% endfor %}</pre>
{% if problems %}<h2>Left out</h2><ul>{% for line in problems %}<li>{{ line }}</li>{% endfor %}</ul>{% endif %}
</body></html>
"""
REPORTS = "reports"
SELECTION = "selection"
BEST_OF = "best_of"


@dataclass(frozen=True)
class Report:
    """A written report."""

    directory: Path
    runs: Runs
    comparison: Comparison
    sentences: list[str]
    """The verdict."""

    def text(self) -> str:
        """Return what a terminal shows: tables, the verdict, what was left out, and where the report is."""
        tables = plain_tables(self.comparison, self.runs)
        parts = [f"{table.title}\n{table.text()}" for table in tables]
        parts += ["\n".join([states(self.runs), *self.sentences, *self.comparison.notes])]
        warnings = [f"- {line}" for line in self.comparison.warnings]
        parts += ["\n".join(["Before you rely on this:", *warnings])] if warnings else []
        parts += ["Left out:\n" + "\n".join(f"- {line}" for line in self.runs.problems)] if self.runs.problems else []
        return "\n\n".join([*parts, f"Report: {self.directory / 'report.html'}"])


def write_report(*paths: str | Path, nuisance: Sequence[str] = ()) -> Report:
    """Compare all runs below the given folders and write the report.

    It goes to `reports/` in the experiment's folder; for runs of several experiments to `reports/` in the folder that
    holds these; if single runs are named, to `reports/selection/`; with nuisance settings to `best_of/` therein. An
    earlier report there is replaced.

    Args:
        *paths: As for `load_runs`; at a sweep's end the experiment's folder, outputs/<name>.
        nuisance: Settings at whose best each arm is compared; see `kd.analysis.best_of`.

    Raises:
        DataError: if there is no run, or a nuisance setting is none of theirs.
        ResourceError: if a folder cannot be read or written.
    """
    runs = load_runs(*paths)
    comparison = best_of(runs, nuisance) if nuisance else compare(runs)
    directory = report_directory(runs)
    if any(is_run(Path(path)) for path in paths):
        directory /= SELECTION
    if nuisance:
        directory /= BEST_OF
    report = Report(directory, runs, comparison, verdict(comparison))
    pictures = all_plots(runs, comparison)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write(report, pictures)
    except OSError as error:
        raise ResourceError(f"{directory} cannot be written: {error}.") from error
    return report


def report_directory(runs: Runs) -> Path:
    """Return where the report of these runs goes."""
    return Path(os.path.commonpath([Path(name).absolute().parent for name in runs.runs["directory"]])) / REPORTS


def _write(report: Report, pictures: dict[str, bytes]) -> None:
    for name in CAPTIONS:
        (report.directory / f"{name}.png").unlink(missing_ok=True)
    for name, data in pictures.items():
        (report.directory / f"{name}.png").write_bytes(data)
    write_text(report.directory / "runs.csv", report.runs.runs.to_csv(index=False))
    write_text(report.directory / "metrics.csv", report.runs.metrics.to_csv(index=False))
    write_text(report.directory / "report.md", _markdown(report, list(pictures)))
    write_text(report.directory / "report.html", _html(report, pictures))


def _title(report: Report) -> str:
    return "Comparison of " + ", ".join(sorted(report.runs.runs["experiment"].unique()))


def commands(runs: Runs) -> list[str]:
    """Return the distinct commands that made the runs, in order of the runs."""
    return [command for command in dict.fromkeys(runs.runs["command"]) if command] or ["(not recorded)"]


def _html(report: Report, pictures: dict[str, bytes]) -> str:
    encoded = [
        (name, base64.b64encode(pictures[name]).decode(), CAPTIONS[name]) for name in CAPTIONS if name in pictures
    ]
    return (
        Environment(autoescape=True)
        .from_string(PAGE)
        .render(
            title=_title(report),
            states=states(report.runs),
            verdict=report.sentences,
            notes=report.comparison.notes,
            warnings=report.comparison.warnings,
            tables=plain_tables(report.comparison, report.runs),
            pictures=encoded,
            method=method(),
            commands=commands(report.runs),
            problems=report.runs.problems,
        )
    )


def _markdown(report: Report, pictures: list[str]) -> str:
    section: Callable[[Table], str] = lambda table: f"## {table.title}\n\n{table.markdown()}"  # noqa: E731
    parts = [f"# {_title(report)}", states(report.runs), "\n".join(f"- {line}" for line in report.sentences)]
    if report.comparison.warnings:
        parts += ["## Before you rely on this", _bullets(report.comparison.warnings)]
    if report.comparison.notes:
        parts += ["## To know", _bullets(report.comparison.notes)]
    parts += [section(table) for table in plain_tables(report.comparison, report.runs)]
    parts += [f"![{name}]({name}.png)\n\n{CAPTIONS[name]}" for name in CAPTIONS if name in pictures]
    parts += ["## How to read this", _bullets(method()), "## Made by"]
    parts += ["```\n" + "\n".join(commands(report.runs)) + "\n```"]
    if report.runs.problems:
        parts += ["## Left out", _bullets(report.runs.problems)]
    return "\n\n".join(parts) + "\n"


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
