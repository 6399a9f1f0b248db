"""The teaching pages: the notebook runs on one core and shows what it promises; all texts are in both languages."""

import os
import re
import shutil
from pathlib import Path

import jupytext
import pytest

from kd.trainers import get_trainer_class

from .commands import REPOSITORY, TINY, only_run, run
from .test_experiments import execute

NOTEBOOK = REPOSITORY / "experiments" / "from_scratch_to_distilled" / "from_scratch_to_distilled.ipynb"
README = REPOSITORY / "kd" / "trainers" / "README.md"
TRAINERS = ("pretrain", "sft", "dpo", "orpo", "grpo", "distillation")
SECONDS = 90
"""Of processor time."""
CHINESE = re.compile(r"[\u4e00-\u9fff]")
CODE = re.compile(r"`([^`\n]+)`")


@pytest.mark.slow
def test_the_notebook_runs_from_an_empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = os.times()
    text = execute(NOTEBOOK)
    after = os.times()
    # Of the kernel and all that it started: a machine that does other work too does not count.
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert 5 < used < SECONDS
    assert "5 pictures" in text
    uniform, expected, by_hand, library = map(float, re.findall(r"^(?:ln V|the new|the same).*?([\d.]+)$", text, re.M))
    assert abs(by_hand - library) < 1e-3
    assert abs(library - uniform) < 0.05
    assert uniform < expected < uniform + 0.05
    assert "Lowest validation loss of 3 settings: alpha 1, T 1" in text
    # 1/T^2, but for what is left of the higher orders
    assert float(re.findall(r"the plain gradient shrinks by 2\^(\S+)", text)[0]) == pytest.approx(2, abs=0.15)
    assert (Path("outputs/from_scratch_to_distilled/reports") / "report.html").is_file()


def test_every_text_of_the_notebook_stands_in_both_languages() -> None:
    texts = [cell.source for cell in jupytext.read(NOTEBOOK).cells if cell.cell_type == "markdown"]
    assert len(texts) > 15
    for text in texts:
        assert len(CHINESE.findall(text)) > 20, text
        assert len(re.findall(r"[A-Za-z]{2,}", text)) > 20, text


def test_the_page_on_trainers_has_all_of_them_in_both_languages() -> None:
    for half in halves():
        rows = [line for line in half.splitlines() if line.startswith("|")]
        for name in TRAINERS:
            # What they compute, and what they cost.
            assert sum(row.startswith(f"| `{get_trainer_class(name).__name__}` |") for row in rows) == 2, name


def test_both_languages_say_the_same_of_the_code() -> None:
    english, chinese = halves()
    assert set(CODE.findall(without_blocks(english))) == set(CODE.findall(without_blocks(chinese)))
    for mark in ("## ", "| ", "- ", "1. ", "4. "):
        counts = [sum(line.startswith(mark) for line in half.splitlines()) for half in (english, chinese)]
        assert counts[0] == counts[1], mark


def test_the_page_names_files_that_are_there() -> None:
    named = {code for code in CODE.findall(README.read_text(encoding="utf-8")) if re.fullmatch(r"[\w/]+(/|\.py)", code)}
    assert len(named) > 8
    for name in named:
        assert (REPOSITORY / name).exists() or (README.parent / name).exists(), name


def halves() -> tuple[str, str]:
    """Return the page's English and Chinese half."""
    english, _, chinese = README.read_text(encoding="utf-8").partition("\n---\n")
    return english, chinese


def without_blocks(text: str) -> str:
    """Return Markdown without its blocks of commands."""
    return re.sub(r"```.*?```", "", text, flags=re.S)


CONFIG_CLASS = """

@dataclass
class OwnConfig(PretrainConfig):
    trainer: ClassVar[str] = "own"
"""
TRAINER = """
from kd.config import OwnConfig
from kd.trainers.language_model import LanguageModelTrainer

class OwnTrainer(LanguageModelTrainer[OwnConfig]):
    config_class = OwnConfig
"""


def edit(path: Path, before: str, after: str) -> None:
    """Replace a text that a file has once or more, at its first place."""
    text = path.read_text(encoding="utf-8")
    assert before in text, path
    path.write_text(text.replace(before, after, 1), encoding="utf-8")


@pytest.mark.slow
def test_the_steps_to_a_trainer_on_the_command_line_lead_there(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in ("kd", "conf"):
        shutil.copytree(REPOSITORY / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    package = checkout / "kd"
    config = package / "config" / "train.py"
    config.write_text(config.read_text(encoding="utf-8") + CONFIG_CLASS, encoding="utf-8")
    edit(package / "config" / "__init__.py", "    ORPOConfig,\n", "    ORPOConfig,\n    OwnConfig,\n")
    (package / "trainers" / "own.py").write_text(TRAINER, encoding="utf-8")
    factory, composition = package / "trainers" / "factory.py", package / "composition.py"
    edit(factory, "\n\n_CLASSES", "\nfrom kd.trainers.own import OwnTrainer\n\n_CLASSES")
    edit(factory, '    "pretrain": PretrainTrainer,', '    "pretrain": PretrainTrainer,\n    "own": OwnTrainer,')
    edit(composition, "    ORPOConfig,\n", "    ORPOConfig,\n    OwnConfig,\n")
    edit(composition, '    "train_sft": SFTConfig,', '    "train_sft": SFTConfig,\n    "train_own": OwnConfig,')
    (checkout / "conf" / "train" / "own.yaml").write_text("defaults: [/schema/train_own@_here_, _self_]\n")
    outcome = run(*TINY, "train=own", PYTHONPATH=str(checkout))
    assert outcome.code == 0, outcome.errors
    assert only_run().name.startswith("own-seed0-")
