"""The notebooks of experiments/: paired with their scripts, and run from top to bottom on small sweeps."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

from .commands import TINY, environment, run
from .synthetic_runs import Sweep, fail, make_grid

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
NOTEBOOKS = sorted(EXPERIMENTS.glob("*/*.ipynb"))
ALPHA_TEMPERATURE = EXPERIMENTS / "alpha_temperature" / "alpha_temperature.ipynb"


def execute(path: Path) -> str:
    """Run a notebook in the working directory, as Jupyter would; return all that it shows as text."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(Path.cwd())}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute(env=environment())
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    return "\n".join([*shown, f"{pictures} pictures"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_what_its_script_holds_and_no_output(path: Path) -> None:
    notebook, script = jupytext.read(path), jupytext.read(path.with_suffix(".py"))
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in script.cells
    ]
    assert not any(cell.get("outputs") for cell in notebook.cells)


def test_alpha_temperature_reads_a_grid_at_two_rates() -> None:
    sweep = Sweep(Path("outputs/alpha_temperature"))
    make_grid(sweep, learning_rate=0.001)
    make_grid(sweep, learning_rate=0.003)
    fail(sweep.root, "alpha0.7-temperature4-seed0-00000000", "planned")
    text = execute(ALPHA_TEMPERATURE)
    assert "alpha 1, T 1" in text
    assert text.count("learning rate 0.00") == 2
    assert "rank at 0.003" in text
    assert "5 pictures" in text


@pytest.mark.slow
def test_alpha_temperature_reads_a_real_sweep() -> None:
    grid = ("train.alpha=0,1", "train.temperature=1,2", "seed=0,1")
    outcome = run(*TINY, "experiment=alpha_temperature", "name=alpha_temperature", *grid, timeout=500)
    assert outcome.code == 0, outcome.errors
    assert "12 runs: 12 done" in outcome.output
    text = execute(ALPHA_TEMPERATURE)
    assert "Lowest validation loss of 6 settings" in text
    assert "5 pictures" in text
