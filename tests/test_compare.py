"""The door `python -m kd.compare`: what it prints, what it writes, how it ends."""

import base64
import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kd.analysis import best_of, load_runs
from kd.analysis.plots import by_temperature, heatmap, kl_against_cross_entropy, learning_curves
from kd.analysis.report import write_report
from kd.compare import compare
from kd.files import read_json

from .commands import environment, run
from .synthetic_runs import Sweep, fail, make_grid

PICTURES = ("heatmap", "temperature", "learning_curves", "kl_against_cross_entropy", "clip_rate")
PNG = b"\x89PNG\r\n\x1a\n"


def test_it_prints_the_answer_and_writes_the_report() -> None:
    make_grid(Sweep())
    text = compare(["outputs/made"])
    assert "15 runs: 15 done." in text
    assert "Lowest validation loss of 5 settings: alpha 1, T" in text
    reports = Path("outputs/made/reports")
    names = {"report.html", "report.md", "runs.csv", "metrics.csv", *(f"{name}.png" for name in PICTURES)}
    assert {path.name for path in reports.iterdir()} == names
    assert all((reports / f"{name}.png").read_bytes().startswith(PNG) for name in PICTURES)


def test_the_page_is_one_file_with_its_pictures_inside() -> None:
    make_grid(Sweep())
    compare(["outputs/made"])
    page = Path("outputs/made/reports/report.html").read_text()
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(embedded) == page.count("<img") == len(PICTURES)
    assert all(base64.b64decode(data).startswith(PNG) for data in embedded)
    assert "http" not in page
    assert "python -m kd.train -m train.alpha=0,0.5,1 &#39;name=a b&#39;" in page


def test_the_tables_equal_the_raw_histories() -> None:
    make_grid(Sweep())
    compare(["outputs"])
    with Path("outputs/made/reports/runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15
    for row in rows:
        history = read_json(Path(row["directory"]) / "history.json")
        assert float(row["val_ppl"]) == history["val_ppl"][-1]
        assert float(row["test_ppl"]) == history["test_ppl"]
    with Path("outputs/made/reports/metrics.csv").open() as file:
        assert sum(row["metric"] == "val_loss" for row in csv.DictReader(file)) == 15 * 3


def test_missing_and_failed_cells_are_visible() -> None:
    sweep = Sweep()
    make_grid(sweep, seeds=2)
    sweep.add(0.5, 4, 4.6)
    fail(sweep.root, "alpha0.7-temperature2-seed0-0123abcd", "<b>no</b> | memory")
    report = write_report(sweep.root)
    words = [text.get_text() for axis in heatmap(report.runs, report.comparison).axes for text in axis.texts]
    assert words.count("1 failed") == 1
    assert words.count("missing") == 3  # alpha 0.7 at 1 and 4, alpha 1 at 4
    assert sum("BEST" in word for word in words) == 1
    assert "baseline" in str(
        [label.get_text() for axis in heatmap(report.runs, report.comparison).axes for label in axis.get_yticklabels()]
    )
    page = (report.directory / "report.html").read_text()
    assert "&lt;b&gt;no&lt;/b&gt; | memory" in page
    assert "&lt;b>no&lt;/b> \\| memory" in (report.directory / "report.md").read_text()


@pytest.mark.parametrize("kind", ["one run", "unfinished only", "failed only", "no teacher", "one seed", "two rates"])
def test_any_outputs_make_a_report(kind: str) -> None:
    sweep = Sweep()
    if kind == "one run":
        sweep.add(0.5, 2, 4.5)
    elif kind == "unfinished only":
        (sweep.add(0.5, 2, 4.5) / "result.json").unlink()
    elif kind == "failed only":
        fail(sweep.root, "no such name", "x")
    elif kind == "no teacher":
        sweep.add(0.0, 1, 4.5, test=False)
    elif kind == "one seed":
        make_grid(sweep, seeds=1)
    else:
        make_grid(sweep, seeds=2)
        sweep.add(0.5, 2, 4.5, learning_rate=1e-3)
    assert "report.html" in compare(["outputs"])
    assert "<h1>Comparison of made</h1>" in Path("outputs/made/reports/report.html").read_text()


def test_a_second_report_replaces_the_first() -> None:
    sweep = Sweep()
    make_grid(sweep, seeds=1)
    first = write_report(sweep.root).sentences
    for path in sweep.root.glob("alpha*"):
        (path / "result.json").unlink()
    second = write_report(sweep.root)
    assert second.sentences != first
    assert not (second.directory / "heatmap.png").exists()


def test_several_experiments_share_a_report_above_them() -> None:
    Sweep(Path("outputs/one")).add(0.0, 1, 5.0)
    Sweep(Path("outputs/two")).add(1.0, 1, 4.0)
    report = write_report("outputs/one", "outputs/two")
    assert report.directory == Path("outputs/reports").absolute()
    assert len(write_report("outputs").runs.runs) == 2


def test_single_runs_leave_the_experiments_report_alone() -> None:
    sweep = Sweep(documents=20)
    first, second, _ = (sweep.add(alpha, 1, 5 - alpha) for alpha in (0.0, 0.5, 1.0))
    whole = write_report(sweep.root).directory / "report.md"
    before = whole.read_text()
    report = write_report(first, second)
    assert report.directory == whole.parent / "selection"
    assert len(report.runs.runs) == 2
    assert whole.read_text() == before
    assert load_runs("outputs").problems == []


def test_no_runs_is_a_sentence_and_a_code() -> None:
    outcome = run("outputs/none", module="kd.compare")
    assert outcome.code == 4
    assert outcome.errors == "kd-compare: outputs/none is not a folder: name outputs/<name> or outputs/<name>/<run>.\n"
    assert not Path("outputs").exists()


def test_a_report_that_cannot_be_written_is_a_sentence_and_a_code() -> None:
    sweep = Sweep()
    sweep.add(0.5, 2, 4.5)
    (sweep.root / "reports").write_text("in the way")
    outcome = run("outputs", module="kd.compare")
    assert outcome.code == 7
    assert "reports cannot be written" in outcome.errors
    assert "Traceback" not in outcome.errors


def test_analysis_needs_no_torch_and_help_no_pandas() -> None:
    program = "import sys, kd.analysis.report; print('torch' in sys.modules)"
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout == "False\n"
    program = "import sys, kd.compare; print('pandas' in sys.modules)"
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout == "False\n"


def test_best_of_goes_beside_the_report_of_all_settings() -> None:
    sweep = Sweep()
    make_grid(sweep, seeds=2, learning_rate=0.001)
    make_grid(sweep, seeds=2, learning_rate=0.003)
    whole = write_report(sweep.root).directory / "report.md"
    before = whole.read_text()
    text = compare(["outputs/made", "--best-of", "learning_rate,warmup_steps"])
    assert "of 5 settings, each at its own best learning_rate: alpha 1, T" in text
    assert "All runs have the same warmup_steps" in text
    assert "Before you rely on this:\n- The best learning_rate is the largest or smallest" in text
    assert "The best learning_rate is" in (whole.parent / "best_of" / "report.html").read_text()
    assert "Sensitivity" in (whole.parent / "best_of" / "report.md").read_text()
    assert whole.read_text() == before
    assert load_runs("outputs").problems == []


def test_a_long_title_is_within_its_picture() -> None:
    sweep = Sweep(Path("outputs/e"))
    for warmup in (10, 20):
        make_grid(sweep, learning_rate=0.001, warmup_steps=warmup)
        make_grid(sweep, learning_rate=0.003, warmup_steps=warmup)
    runs = load_runs("outputs/e")
    comparison = best_of(runs, ["learning_rate", "warmup_steps"])
    for figure in (heatmap(runs, comparison), by_temperature(runs, comparison), learning_curves(runs, comparison)):
        figure.draw_without_rendering()
        box = figure._suptitle.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1


def test_pictures_show_only_runs_that_were_compared() -> None:
    """Two runs on other text, one of them of a higher loss, must not move a curve or stand among the points."""
    sweep = Sweep()
    make_grid(sweep, seeds=2)

    def drawn() -> list[list[float]]:
        report = write_report(sweep.root)
        curves = learning_curves(report.runs, report.comparison)
        points = kl_against_cross_entropy(report.runs, report.comparison)
        assert curves is not None
        assert points is not None
        lines = [list(map(float, line.get_ydata())) for axis in curves.axes for line in axis.lines]  # type: ignore[arg-type]
        return [*lines, [float(len(dots.get_offsets())) for axis in points.axes for dots in axis.collections]]

    before = drawn()
    for number, change in enumerate(({"corpus": "d" * 64}, {"trainer": "pretrain", "seq_len": 64})):
        path = sweep.add(1.0, 1, 9.0, seed=7 + number) / "environment.json"
        record = read_json(path)
        path.write_text(json.dumps(record | {"identity": record["identity"] | change}))
    assert drawn() == before
