"""The tutorial's files and the examples run as scripts, as their readers run them, and show what they promise."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .commands import REPOSITORY, environment

TUTORIAL = REPOSITORY / "kd" / "tutorial"
EXAMPLES = REPOSITORY / "experiments" / "examples"
SECONDS = 90
ONE_CORE = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::RuntimeWarning"}
"""A file that its own package has imported already is run with a RuntimeWarning."""


def output_of(*arguments: str, is_installed: bool = True) -> str:
    """Run Python to its end, with or without the package on its path, and return what it printed."""
    variables = environment(**ONE_CORE)
    if not is_installed:
        variables.pop("PYTHONPATH")
    answer = subprocess.run(
        [sys.executable, *arguments], env=variables, capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert answer.returncode == 0, answer.stderr
    assert "Warning" not in answer.stderr
    return answer.stdout


def numbers_after(text: str, output: str) -> list[float]:
    """Return the numbers in the rest of each line after a text."""
    lines = re.findall(rf"{re.escape(text)}(.*)", output)
    return [float(number) for line in lines for number in re.findall(r"[-+]?\d+\.?\d*(?:e[-+]\d+)?", line)]


@pytest.mark.slow
def test_the_optimizers_show_their_distance_from_torchs() -> None:
    output = output_of("-m", "kd.tutorial.optimizer_from_scratch")
    assert all(distance < 1e-6 for distance in numbers_after("torch.float32", output))
    assert all(distance < 1e-12 for distance in numbers_after("torch.float64", output))
    assert len(numbers_after("torch.float64", output)) == 2


def test_the_parts_show_numbers_that_hand_work_gives() -> None:
    output = output_of("-m", "kd.tutorial.parts_from_scratch")
    shown, by_hand = numbers_after("perplexity", output)[0], numbers_after("sqrt(5/8 * 1/8) =", output)[0]
    assert shown == by_hand == 3.5777
    assert numbers_after("norm 5, factor", output)[0] == 0.2


@pytest.mark.slow
def test_the_trainer_learns_and_resumes_as_a_plain_file_of_a_fresh_clone() -> None:
    output = output_of(str(TUTORIAL / "trainer_from_scratch.py"), is_installed=False)
    before = numbers_after("perplexity before", output)[0]
    after = [float(number) for number in re.findall(r"^   ([\d., ]+)$", output, re.MULTILINE)[0].split(",")]
    assert len(after) == 5
    assert after[-1] < after[0] < before / 3
    assert numbers_after("largest difference of any weight:", output) == [0]
    losses = {line.split(": loss ")[1].split(";")[0] for line in output.splitlines() if ": loss " in line}
    assert len(losses) == 1  # the same loss and gradient for every cut
    assert "not taken" in output


@pytest.mark.slow
def test_the_basic_example_learns_to_add() -> None:
    output = output_of(str(EXAMPLES / "basic_trainer.py"))
    before, after = numbers_after("loss on sums never seen:", output)
    assert after < before / 10
    assert output.count("right") > output.count("wrong")
    assert (Path("outputs/examples/basic_trainer") / "history.json").is_file()


@pytest.mark.slow
def test_the_custom_trainer_trains_towards_its_own_loss() -> None:
    output = output_of(str(EXAMPLES / "custom_trainer.py"))
    plain, smoothed = (numbers_after(f"{name}:", output) for name in ("PretrainTrainer", "LabelSmoothingTrainer"))
    assert plain[0] == plain[1]  # its loss is the cross-entropy
    assert smoothed[0] > smoothed[1] + 0.1
    for row in (plain, smoothed):
        assert row[3] < row[2] / 2


def test_the_new_trainer_is_short() -> None:
    """The scripts are promised to be about 40 lines."""
    for path in EXAMPLES.glob("*.py"):
        code = path.read_text(encoding="utf-8").split('"""', 2)[2]
        lines = [line for line in code.splitlines() if line.strip() and not line.strip().startswith(("#", '"""'))]
        assert len(lines) <= 40, path.name


@pytest.mark.parametrize("path", [*EXAMPLES.glob("*.py")], ids=lambda path: path.name)
def test_the_readme_says_how_to_run_each_example(path: Path) -> None:
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert f"`{path.name}`" in readme
    assert re.search(rf"(python|torchrun .*) experiments/examples/{path.name}", readme)
