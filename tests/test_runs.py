"""A run on disk: what makes it the same run, who may work on it, and a history that is strict JSON."""

import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.config import (
    Config,
    HubTeacherConfig,
    LocalTeacherConfig,
    ModelConfig,
    PretrainConfig,
    TextDataConfig,
    TrainingConfig,
)
from kd.errors import IntegrityError, ResourceError, RunHeldError
from kd.files import read_json
from kd.runs import (
    COLUMNS,
    Fingerprints,
    History,
    Run,
    check_outputs,
    describe_environment,
    run_identity,
)

ROOT = Path(__file__).parents[1]
INPUTS = Fingerprints(corpus="c", tokenizer="t", teacher="w", init_from=None)
CONFIG = Config(train=TrainingConfig(alpha=0.7, temperature=4.0))
BASELINE = Config(train=TrainingConfig(alpha=0.0))
SPECIFIED_KEYS = {
    "schema_version", "train_loss", "train_step", "val_loss", "val_ppl", "val_step", "kl_loss", "ce_loss",
    "learning_rate", "grad_norm", "val_kl", "val_agreement", "val_bits_per_byte", "teacher_val_ppl", "tokens", "flops",
    "parameters", "timing", "notes",
}  # fmt: skip


def train_with(config: Config, **changes: Any) -> Config:
    return replace(config, train=replace(config.train, **changes))


def data_with(config: Config, **changes: Any) -> Config:
    return replace(config, data=replace(config.data, **changes))


def digest(config: Config = CONFIG, inputs: Fingerprints = INPUTS) -> str:
    return run_identity(config, inputs).digest


# --- identity ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (CONFIG, "alpha0.7-temperature4-seed0"),
        (train_with(CONFIG, alpha=1.0, temperature=0.5), "alpha1-temperature0.5-seed0"),
        (replace(BASELINE, seed=12), "alpha0-seed12"),
        (replace(CONFIG, train=PretrainConfig()), "pretrain-seed0"),
    ],
)
def test_the_name_says_the_settings_and_a_short_hash(config: Config, settings: str) -> None:
    directory = run_identity(config, INPUTS).directory
    assert directory.parent == Path("outputs/default")
    assert re.fullmatch(rf"{re.escape(settings)}-[0-9a-f]{{8}}", directory.name)


@given(
    st.floats(0, 1),
    st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    st.integers(0, 2**32 - 1),
)
def test_a_name_needs_no_quotes_anywhere(alpha: float, temperature: float, seed: int) -> None:
    config = replace(train_with(CONFIG, alpha=alpha, temperature=temperature), seed=seed)
    assert re.fullmatch(r"[A-Za-z0-9._-]+", run_identity(config, INPUTS).directory.name)


SAME_RUN = {
    "log interval": train_with(CONFIG, log_interval=7),
    "save interval": train_with(CONFIG, save_interval=7),
    "checkpoint folder": train_with(CONFIG, checkpoint_dir="elsewhere/"),
    "device": replace(CONFIG, device="cuda:1"),
    "threads": replace(CONFIG, threads=3),
    "overwrite": replace(CONFIG, overwrite=True),
    "experiment": replace(CONFIG, name="other"),
    "workers": data_with(CONFIG, num_workers=2),
    "where the text lies": replace(CONFIG, data=TextDataConfig(path="elsewhere")),
    "where the teacher lies": replace(CONFIG, teacher=LocalTeacherConfig(path="elsewhere")),
    "what the tokenizer is called": data_with(CONFIG, tokenizer="elsewhere"),
    "where the first weights lie": replace(CONFIG, init_from="elsewhere"),
}


@pytest.mark.parametrize("config", SAME_RUN.values(), ids=SAME_RUN.keys())
def test_what_does_not_change_the_result_does_not_change_the_run(config: Config) -> None:
    assert digest(config) == digest()


OTHER_RUN = {
    "learning rate": train_with(CONFIG, learning_rate=1e-3),
    "weight decay": train_with(CONFIG, weight_decay=0.1),
    "warm-up": train_with(CONFIG, warmup_steps=1),
    "epochs": train_with(CONFIG, num_epochs=1),
    "clipping": train_with(CONFIG, gradient_clip=0.5),
    "batch size": train_with(CONFIG, batch_size=4),
    "accumulation": train_with(CONFIG, gradient_accumulation_steps=2),
    "steps": train_with(CONFIG, max_steps=10),
    "evaluation interval": train_with(CONFIG, eval_interval=10),
    "evaluation blocks": train_with(CONFIG, eval_blocks=10),
    "alpha": train_with(CONFIG, alpha=0.6),
    "temperature": train_with(CONFIG, temperature=3.0),
    "trainer": replace(CONFIG, train=PretrainConfig()),
    "width": replace(CONFIG, model=ModelConfig(hidden_size=256)),
    "dropout": replace(CONFIG, model=ModelConfig(dropout=0.1)),
    "seed": replace(CONFIG, seed=1),
    "block length": data_with(CONFIG, seq_len=256),
    "training blocks": data_with(CONFIG, max_train_blocks=10),
    "validation blocks": data_with(CONFIG, max_eval_blocks=10),
}


@pytest.mark.parametrize("config", OTHER_RUN.values(), ids=OTHER_RUN.keys())
def test_what_changes_the_result_changes_the_run(config: Config) -> None:
    assert digest(config) != digest()


@pytest.mark.parametrize("field", ["corpus", "tokenizer", "teacher", "init_from"])
def test_another_input_is_another_run(field: str) -> None:
    assert digest(inputs=replace(INPUTS, **{field: "other"})) != digest()


def test_runs_in_half_precision_are_others_than_when_more_was_rounded() -> None:
    half = run_identity(train_with(CONFIG, precision="bfloat16"), INPUTS)
    assert half.content["half_precision"] == 2
    assert "half_precision" not in run_identity(CONFIG, INPUTS).content


def test_all_of_these_are_different_runs() -> None:
    digests = [digest(config) for config in OTHER_RUN.values()]
    assert len(set(digests)) == len(digests)


def test_without_the_teacher_there_is_one_baseline() -> None:
    baseline = run_identity(BASELINE, INPUTS)
    for temperature in (1.0, 8.0):
        for teacher in ("other", None):
            config = replace(train_with(BASELINE, temperature=temperature), teacher=HubTeacherConfig(model_id="other"))
            other = run_identity(config, replace(INPUTS, teacher=teacher))
            assert other.directory == baseline.directory
    assert run_identity(BASELINE, replace(INPUTS, corpus="other")).digest != baseline.digest


def test_the_identity_is_the_same_in_every_process() -> None:
    program = (
        "from kd.config import Config, TrainingConfig\n"
        "from kd.runs import Fingerprints, run_identity\n"
        "config = Config(train=TrainingConfig(alpha=0.7, temperature=4.0))\n"
        "print(run_identity(config, Fingerprints('c', 't', 'w')).digest)\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == digest()


# --- history ----------------------------------------------------------------------------------------------------


def strict(value: Any) -> Any:
    """Return a value as strict JSON gives it back."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(json.dumps(value, allow_nan=False), parse_constant=refuse)


def test_an_empty_history_has_all_keys_and_says_why_they_are_null() -> None:
    content = strict(History().to_json())
    assert set(content) == SPECIFIED_KEYS
    assert set(COLUMNS) <= SPECIFIED_KEYS
    assert content["schema_version"] == 1
    for key in SPECIFIED_KEYS - {"schema_version", "timing", "notes"}:
        assert content[key] is None
        assert content["notes"][key]


ROWS = st.lists(st.tuples(*[st.none() | st.floats() | st.integers() for _ in range(3)]), max_size=6)


@given(ROWS, st.floats())
def test_a_history_of_any_values_is_strict_json_with_a_note_for_every_gap(
    rows: list[tuple[float | int | None, ...]], total: float
) -> None:
    history = History()
    for step, (train_loss, kl_loss, val_loss) in enumerate(rows):
        history.append(history.train, {"train_step": step, "train_loss": train_loss, "kl_loss": kl_loss})
        history.append(history.validation, {"val_step": step, "val_loss": val_loss})
    history.totals["flops"] = history.finite("flops", total)
    content = strict(history.to_json())
    assert set(content) == SPECIFIED_KEYS
    for name, position in (("train_loss", 0), ("kl_loss", 1), ("val_loss", 2)):
        given = [row[position] for row in rows]
        finite = [value if value is not None and math.isfinite(value) else None for value in given]
        assert content[name] == (finite if any(value is not None for value in finite) else content[name])
        if any(value is None for value in finite) and all(value is not None for value in given):
            assert content["notes"][name]
        if content[name] is None:
            assert content["notes"][name]
    assert content["flops"] == (total if math.isfinite(total) else None)
    assert ("flops" in content["notes"]) == (not math.isfinite(total))


def test_a_column_without_any_value_is_null_as_a_whole() -> None:
    history = History()
    for step in (1, 2):
        history.append(history.validation, {"val_step": step, "val_loss": 2.0, "val_kl": None})
    history.notes["val_kl"] = "no teacher at hand"
    content = history.to_json()
    assert content["val_kl"] is None
    assert content["notes"]["val_kl"] == "no teacher at hand"
    assert content["val_loss"] == [2.0, 2.0]


@pytest.mark.parametrize(("value", "word"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_a_value_that_is_not_finite_becomes_null_with_its_name(value: float, word: str) -> None:
    history = History()
    for train_loss in (1.0, value, 2.0):
        history.append(history.train, {"train_loss": train_loss})
    content = strict(history.to_json())
    assert content["train_loss"] == [1.0, None, 2.0]
    assert content["notes"]["train_loss"].endswith(word)


def test_what_a_clock_measures_stands_under_timing_alone() -> None:
    history = History(timing={"wall_seconds": 1.5})
    content = history.to_json()
    assert content["timing"] == {"wall_seconds": 1.5}
    assert {key: value for key, value in content.items() if key != "timing"} == {
        key: value for key, value in History().to_json().items() if key != "timing"
    }


# --- holding a run ----------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from kd.config import Config, TrainingConfig
from kd.runs import Fingerprints, Run, describe_environment, run_identity

run = Run(run_identity(Config(train=TrainingConfig(alpha=0.7, temperature=4.0)), Fingerprints("c", "t", "w")))
with run.hold():
    run.write_configuration({}, describe_environment(run.identity))
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run() -> Run:
    return Run(run_identity(CONFIG, INPUTS))


@contextmanager
def held_elsewhere() -> Iterator["subprocess.Popen[str]"]:
    """Let another process hold the run."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLDER]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_live_holder_is_respected_and_a_killed_one_is_not(run: Run) -> None:
    with held_elsewhere() as process:
        with pytest.raises(RunHeldError, match=rf"process {process.pid} on") as caught, run.hold():
            pytest.fail("two processes hold one run")
        assert caught.value.exit_code == 3
        with pytest.raises(RunHeldError):
            run.refuse_if_held()
        process.send_signal(signal.SIGKILL)
        process.wait(20)
        run.refuse_if_held()
        with run.hold():
            assert run.directory.is_dir()


def test_a_run_can_be_held_again_after_its_end(run: Run) -> None:
    for _ in range(2):
        with run.hold():
            pass


def test_a_failed_run_is_not_held(run: Run) -> None:
    with pytest.raises(RuntimeError), run.hold():
        raise RuntimeError
    run.refuse_if_held()


def test_asking_makes_nothing(run: Run, tmp_path: Path) -> None:
    run.refuse_if_held()
    assert run.result() is None
    check_outputs("default")
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_made_is_a_resource_error(run: Run) -> None:
    run.directory.parent.mkdir(parents=True)
    run.directory.write_text("")
    with pytest.raises(ResourceError, match=run.directory.name) as caught, run.hold():
        pytest.fail("there is no directory")
    assert caught.value.exit_code == 7


@pytest.mark.parametrize("path", ["outputs", "outputs/default"])
def test_a_file_in_place_of_a_folder_is_refused(path: str) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text("mine")
    with pytest.raises(ResourceError, match=f"{path} is a file"):
        check_outputs("default")
    assert Path(path).read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_without_permission_is_refused() -> None:
    Path("outputs").mkdir(mode=0o500)
    with pytest.raises(ResourceError, match="cannot be written"):
        check_outputs("default")


# --- files of a run ---------------------------------------------------------------------------------------------


def test_the_result_says_that_the_run_is_done(run: Run) -> None:
    assert run.result() is None
    with run.hold():
        assert run.result() is None
        run.write_result({"val_loss": 2.5})
    assert run.result() == {"state": "done", "run": run.directory.name, "val_loss": 2.5}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"state": "running"}', '{"val_loss": 1}'])
def test_a_damaged_result_is_neither_done_nor_absent(run: Run, content: str) -> None:
    run.directory.mkdir(parents=True)
    run.result_file.write_text(content)
    with pytest.raises(IntegrityError, match=r"result\.json"):
        run.result()


def test_clearing_removes_all_but_the_lock(run: Run, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    with run.hold():
        run.write_configuration({".hydra/config.yaml": "a: 1\n", "config.yaml": "a: 1\n"}, {"x": 1})
        (run.directory / "checkpoints" / "checkpoint-1").mkdir(parents=True)
        (run.directory / "link").symlink_to(outside, target_is_directory=True)
        run.write_result({})
        run.clear()
        assert [path.name for path in run.directory.iterdir()] == [".lock"]
        with pytest.raises(RunHeldError):
            run.refuse_if_held()
    assert (outside / "kept").read_text() == "kept"


def test_the_configuration_and_environment_are_written(run: Run) -> None:
    environment = describe_environment(run.identity, tokenizer={"location": "here"})
    with run.hold():
        run.write_configuration({".hydra/overrides.yaml": "- a=1\n", "config.yaml": "a: 1\n"}, environment)
    assert (run.directory / ".hydra/overrides.yaml").read_text() == "- a=1\n"
    written = read_json(run.directory / "environment.json")
    assert written == strict(environment)
    assert written["identity"]["model"] == asdict(CONFIG.model)
    assert written["inputs"] == {"tokenizer": {"location": "here"}}
    assert written["libraries"]["torch"]
    assert re.fullmatch(r"[0-9a-f]{64}", written["code"]["sha256"])


def test_another_version_is_said_when_a_run_is_continued(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    environment = describe_environment(run.identity)
    with run.hold(), caplog.at_level(logging.WARNING):
        run.write_configuration({}, environment)
        run.write_configuration({}, environment)
        assert not caplog.records
        run.write_configuration({}, {**environment, "libraries": {**environment["libraries"], "torch": "0.1"}})
    assert len(caplog.records) == 1
    assert "libraries" in caplog.records[0].getMessage()
    assert "0.1" in caplog.records[0].getMessage()


def test_a_machine_without_git_records_the_code_without_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    identity = run_identity(CONFIG, INPUTS)
    before = describe_environment(identity)["code"]
    monkeypatch.setenv("PATH", "")
    assert describe_environment(identity)["code"] == {"sha256": before["sha256"], "commit": None}
