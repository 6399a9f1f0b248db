"""The notebooks of experiments/: paired with their scripts, and run from top to bottom on small sweeps."""

import importlib.util
from pathlib import Path
from types import ModuleType

import jupytext
import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient
from omegaconf import OmegaConf

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
    assert "each at its own best learning_rate" in text
    assert text.count("learning rate 0.00") == 2
    assert "The best learning_rate is the largest or smallest" in text
    assert "5 pictures" in text


def figures() -> ModuleType:
    """Import the script that writes figures into pages."""
    path = ALPHA_TEMPERATURE.with_name("figures.py")
    spec = importlib.util.spec_from_file_location("figures", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_hold_what_the_results_say() -> None:
    script = figures()
    names = [name for page in script.PAGES for _, name, _ in script.BLOCK.findall(page.read_text())]
    assert sorted(names) == sorted(script.FIGURES)
    for page in script.PAGES:
        assert page.read_text() == script.written(page.read_text()), f"run figures.py: {page} is out of date"


def test_the_results_are_those_of_the_runs(tmp_path: Path) -> None:
    script = figures()
    recipe = OmegaConf.load(script.DEFAULT_RECIPE)
    sweep = Sweep(Path("outputs/alpha_temperature"))
    for rate in (recipe.learning_rate, 0.01):
        make_grid(sweep, learning_rate=rate, warmup_steps=recipe.warmup_steps)
    script.collect(sweep.root, tmp_path)
    runs = pd.read_csv(tmp_path / "embedded.csv")
    assert len(runs) == 30
    script.collect_warm_up(sweep.root, tmp_path)
    usual = runs[(runs["learning_rate"] == recipe.learning_rate) & (runs["alpha"] == 0)]
    assert f"and {usual['val_ppl'].mean():.4g} +- {usual['val_ppl'].std():.2g} without it" in script.default(tmp_path)
    assert script.default(tmp_path).count("3 seeds") == 1
    assert script.warm_up(tmp_path).count(f"| {recipe.warmup_steps} steps |") == 3  # alpha 0, 0.5, 1
    arms = script.arms(tmp_path).splitlines()
    assert len(arms) == 2 + 5
    assert "| best |" in arms[2]
    assert script.grid(tmp_path).count("**") == 2
    assert script.sensitivity(tmp_path).count("**") == 2 * 5
    assert "- Lowest validation loss of 5 settings" in script.answer(tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"embedded-heatmap.png", "embedded-temperature.png"}


@pytest.mark.slow
def test_alpha_temperature_reads_a_real_sweep() -> None:
    grid = ("train.alpha=0,1", "train.temperature=1,2", "seed=0,1", "train.warmup_steps=1")
    grid = (*grid, "train.learning_rate=0.003,0.006")
    outcome = run(*TINY, "experiment=alpha_temperature", "name=alpha_temperature", *grid, timeout=500)
    assert outcome.code == 0, outcome.errors
    assert "12 runs: 12 done" in outcome.output
    text = execute(ALPHA_TEMPERATURE)
    assert "Lowest validation loss of 3 settings, each at its own best learning_rate" in text
    assert "5 pictures" in text
