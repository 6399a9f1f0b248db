"""Stage after stage from the command line: each goes on from an earlier run's student."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from kd.attempt import make_trainer
from kd.composition import to_config
from kd.config import Config
from kd.plan import make_plan
from kd.prepare import build_parts
from kd.stop import StopSignal
from kd.student import load_student
from tests.commands import TINY, Outcome, only_run, run, strict_json
from tests.distributed import launch
from tests.test_composition import composed

MODEL = ("model.vocab_size=512", "model.max_seq_len=160", "threads=1")
STEPS = ("train.max_steps=4", "train.num_epochs=9", "train.warmup_steps=0", "train.log_interval=1")
STAGES = {
    "sft": ("train=sft", "data=instructions", "data.max_chars=200"),
    "dpo": ("train=dpo", "data=preferences", "data.max_chars=200"),
    "orpo": ("train=orpo", "data=preferences", "data.max_chars=200"),
    # Without a penalty nothing would be learned: at this size no response is right.
    "grpo": ("train=grpo", "data=arithmetic", "train.group_size=2", "train.max_new_tokens=4", "train.kl_coef=0.04"),
}
MEASURES = {
    "sft": ("loss", "ppl"),
    "dpo": ("loss", "reward_margin", "reward_accuracy"),
    "orpo": ("loss", "reward_margin", "reward_accuracy"),
    "grpo": ("loss", "reward"),
}


USUAL = ["sft", "grpo", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("dpo", "orpo"))]


def command(stage: str, init_from: Path | str, *overrides: str) -> tuple[str, ...]:
    """Return the command line of a stage, in the experiment of its name."""
    sizes = ("debug=fast_examples", f"name={stage}", *MODEL, *STEPS)
    return (*sizes, *STAGES[stage], f"init_from={init_from}", *overrides)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny pre-training run."""
    folder = tmp_path_factory.mktemp("pretrained")
    before = Path.cwd()
    os.chdir(folder)
    try:
        outcome = run(*TINY, *MODEL, "train=pretrain", *STEPS, KD_CACHE=str(folder / "cache"))
        assert outcome.code == 0, outcome.errors
        return only_run().absolute()
    finally:
        os.chdir(before)


def finish(*overrides: str) -> Outcome:
    """Do a run; it must succeed."""
    outcome = run(*overrides)
    assert outcome.code == 0, outcome.errors
    return outcome


def check_files(stage: str, directory: Path) -> None:
    """Check history, result and scores of a stage's run against each other."""
    history, result = strict_json(directory / "history.json"), strict_json(directory / "result.json")
    assert result["state"] == "done"
    assert history["train_step"] == [1, 2, 3, 4]
    assert len(set(history["train_loss"])) > 1
    tables = {}
    for part in ("val", "test"):
        (scores,) = directory.glob(f"{part}_*.npy")
        table = tables[part] = np.load(scores, allow_pickle=False)
        assert len(table) == 32
        for name in MEASURES[stage]:
            key = f"{part}_{name}"
            final = history[key][-1] if part == "val" else history[key]
            assert result[key] == final
            if name in table.dtype.names:
                assert table[name].mean() == pytest.approx(final)
    if stage != "grpo":  # whose rewards are 0 and 1: they may well be the same
        measured = "nll" if stage == "sft" else "loss"
        assert not np.isin(tables["test"][measured], tables["val"][measured]).all()  # other examples
    assert (directory / "samples.txt").read_text().count("===") == 6


@pytest.mark.parametrize("stage", USUAL)
def test_a_stage_goes_on_from_an_earlier_run(stage: str, pretrained: Path) -> None:
    outcome = finish(*command(stage, pretrained))
    directory = only_run(stage)
    check_files(stage, directory)
    assert "Validation" in outcome.output
    assert directory.name.startswith(stage)
    before, after = (load_student(path).model.state_dict() for path in (pretrained, directory))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert "Already done" in finish(*command(stage, pretrained)).output


@pytest.mark.slow
def test_the_path_from_text_to_rewards_and_distillation_after_it(pretrained: Path) -> None:
    finish(*command("sft", pretrained))
    finish(*command("dpo", "outputs/sft/sft-*"))
    finish(*command("grpo", "outputs/dpo/dpo-*"))
    finish(*TINY, *MODEL, "name=distilled", "init_from=outputs/grpo/grpo-*")
    chain = [
        json.loads((only_run(name) / "environment.json").read_text()) for name in ("sft", "dpo", "grpo", "distilled")
    ]
    starts = [record["identity"]["init_from"] for record in chain]
    assert len(set(starts)) == len(chain)
    assert len({record["identity"]["tokenizer"] for record in chain}) == 1


@pytest.mark.parametrize("stage", USUAL)
def test_another_setting_of_data_or_trainer_is_another_run(stage: str, pretrained: Path) -> None:
    def directory(*overrides: str) -> Path:
        return make_plan(configuration(*command(stage, pretrained, *overrides))).identity.directory

    usual = directory()
    other = {
        "sft": "data.arithmetic_share=0.25",
        "dpo": "train.beta=0.2",
        "orpo": "data.max_chars=180",
        "grpo": "train.kl_coef=0.1",
    }
    changes = (other[stage], "data.max_train_examples=31", "data.test_ratio=0.2", "seed=1")
    assert len({usual, *map(directory, changes)}) == 5
    assert directory("data.num_workers=1", "train.log_interval=2", "train.save_interval=7") == usual


@pytest.mark.slow
def test_a_sweep_of_another_trainers_knob_is_compared_by_what_it_does_not_scale(pretrained: Path) -> None:
    outcome = finish("-m", *command("dpo", pretrained, "train.beta=0.05,0.2", "seed=0,1"))
    assert outcome.output.count("done         validation reward accuracy 0.") == 4
    assert "Best validation reward accuracy of 2 settings: dpo, train.beta 0." in outcome.output
    assert "(test reward accuracy " in outcome.output
    assert "nan" not in outcome.output


# --- several processes --------------------------------------------------------------------------------------------


def finish_in_two(*overrides: str) -> Outcome:
    """Do a run in two processes of torchrun; it must succeed."""
    outcome = launch.run(*overrides, module="kd.train")
    assert outcome.code == 0, outcome.errors
    return outcome


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_in_two_processes_is_the_run_of_one_with_twice_the_accumulation(stage: str, pretrained: Path) -> None:
    outcome = finish_in_two(*command(stage, pretrained))
    check_files(stage, only_run(stage))
    assert "x 2 processes (ddp)" in outcome.output
    assert outcome.output.count("Train: 32 of 32 examples are used") == 1  # one of them speaks
    again = finish(*command(stage, pretrained, "train.gradient_accumulation_steps=2"))
    assert "Already done" in again.output


@pytest.mark.slow
def test_fine_tuning_in_two_processes_ends_like_one(pretrained: Path) -> None:
    finish(*command("sft", pretrained, "name=one", "train.gradient_accumulation_steps=2"))
    finish_in_two(*command("sft", pretrained, "name=whole"))
    finish_in_two(*command("sft", pretrained, "name=parts", "train.strategy=fsdp"))
    one, *others = (only_run(name) for name in ("one", "whole", "parts"))
    for directory in others:
        check_files("sft", directory)
        for part in ("val", "test"):
            expected, found = (np.load(path / f"{part}_blocks.npy", allow_pickle=False) for path in (one, directory))
            assert found["document"].tolist() == expected["document"].tolist()
            assert found["nll"] == pytest.approx(expected["nll"], rel=1e-5)


# --- the first step ----------------------------------------------------------------------------------------------


def configuration(*overrides: str) -> Config:
    """Return a command line's configuration."""
    return to_config(composed(*overrides))


def test_a_stage_begins_with_the_loss_that_the_last_one_ended_with(pretrained: Path) -> None:
    plan = make_plan(configuration(*TINY, *MODEL, "train=pretrain", *STEPS, f"init_from={pretrained}"))
    parts = build_parts(plan, StopSignal())
    trainer = make_trainer(plan, parts, Path("again"))
    ended = json.loads((pretrained / "result.json").read_text())["val_loss"]
    assert trainer.evaluate()["val_loss"] == pytest.approx(ended, rel=1e-6)


@pytest.mark.slow
def test_the_first_step_has_the_loss_of_the_earlier_student(pretrained: Path) -> None:
    finish(*command("sft", pretrained))
    plan = make_plan(configuration(*command("sft", pretrained)))
    parts = build_parts(plan, StopSignal())
    parts.train_loader.set_position(0)
    batch = next(iter(parts.train_loader))
    with torch.no_grad():
        logits = load_student(pretrained).model(batch["input_ids"])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    first = strict_json(only_run("sft") / "history.json")["train_loss"][0]
    assert first == pytest.approx(float(expected), rel=1e-5)


# --- bad input ---------------------------------------------------------------------------------------------------


def test_own_examples_are_read_and_bad_ones_named(pretrained: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {n} + 1?", "response": f" {n + 1}"} for n in range(40)]
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(map(json.dumps, rows)))
    sizes = ("debug=fast_examples", *MODEL, *STEPS)
    arguments = (*sizes, "train=sft", "data=examples", f"data.path={own}", f"init_from={pretrained}")
    outcome = finish(*arguments)
    assert "Train: 32 of 32 examples are used" in outcome.output
    own.write_text(own.read_text().replace('"response"', '"answer"', 1))
    outcome = run(*arguments)
    assert outcome.code == 4
    assert "line 1 has no `response`" in outcome.errors
    assert "Traceback" not in outcome.errors


@pytest.mark.slow
def test_prompts_that_are_all_too_long_are_refused(pretrained: Path, tmp_path: Path) -> None:
    long = " ".join(map(str, range(400)))
    rows = [{"prompt": f"{n}: {long}", "answer": "1"} for n in range(20)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = ("data=examples", f"data.path={tmp_path / 'own.jsonl'}")
    outcome = run("debug=fast_examples", *MODEL, "train=grpo", *files, f"init_from={pretrained}")
    assert outcome.code == 4
    assert "Nothing is left to learn from" in outcome.errors
    assert not Path("outputs").exists()
