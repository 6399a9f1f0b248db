"""Reading `outputs/`: every state and every kind of damage, and numbers that are those of the raw files."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from kd.analysis import load_runs
from kd.errors import DataError, ResourceError
from kd.files import read_json
from kd.runs import LOCK

from .synthetic_runs import Sweep, fail, make_grid


def change(path: Path, **values: Any) -> None:
    """Edit a JSON file by hand."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | values))


def test_the_tables_hold_what_the_raw_files_hold() -> None:
    sweep = Sweep()
    make_grid(sweep, seeds=2)
    runs = load_runs("outputs")
    assert runs.problems == []
    assert len(runs.runs) == 10
    rows: list[Any] = runs.runs.to_dict("records")
    for row in rows:
        history = read_json(Path(str(row["directory"])) / "history.json")
        environment = read_json(Path(str(row["directory"])) / "environment.json")["identity"]
        assert row["state"] == "done"
        assert row["experiment"] == "made"
        assert [row["alpha"], row["seed"]] == [environment["train"]["alpha"], environment["seed"]]
        temperature = float(row["temperature"])
        assert temperature == environment["train"].get("temperature") or math.isnan(temperature)
        for name in ("val_loss", "val_ppl", "val_kl"):
            assert row[name] == history[name][-1]
        for name in ("test_loss", "test_ppl", "teacher_val_ppl", "tokens", "flops", "parameters"):
            assert row[name] == history[name]
        assert row["wall_seconds"] == 12.5
        assert row["clip_rate"] == pytest.approx(1 / 3)
        assert row["command"] == "python -m kd.train -m train.alpha=0,0.5,1 'name=a b'"


def test_the_long_table_has_a_row_a_run_metric_and_step() -> None:
    directory = Sweep().add(0.5, 2, 4.5)
    metrics = load_runs(directory).metrics
    history = read_json(directory / "history.json")
    chosen = metrics[metrics["metric"] == "val_loss"]
    assert chosen["step"].tolist() == history["val_step"]
    assert chosen["value"].tolist() == history["val_loss"]
    assert metrics[metrics["metric"] == "grad_norm"]["step"].tolist() == history["train_step"]
    assert set(metrics["metric"]) >= {"train_loss", "val_ppl", "tokens_per_second"}
    assert not metrics.duplicated(["directory", "metric", "step"]).any()


def test_further_settings_that_vary_become_columns() -> None:
    sweep = Sweep()
    sweep.add(0.0, 1, 5.0)
    sweep.add(0.5, 2, 4.5, weight_decay=0.1)
    sweep.add(0.5, 2, 4.5, weight_decay=0.0)
    runs = load_runs(sweep.root)
    assert runs.varied == ["train.weight_decay"]
    assert set(runs.runs["train.weight_decay"]) == {"0.1", "0.0", "None"}


def test_what_an_identity_leaves_out_is_as_usual() -> None:
    sweep = Sweep()
    sweep.add(0.5, 1, 4.0)
    sweep.add(0.5, 1, 4.1, precision="bfloat16")
    runs = load_runs(sweep.root)
    assert runs.varied == ["train.precision"]
    assert sorted(runs.runs["train.precision"]) == ["bfloat16", "float32"]


def test_runs_of_several_folders_are_met_once() -> None:
    directory = Sweep().add(0.5, 2, 4.5)
    assert len(load_runs("outputs", "outputs/made", directory).runs) == 1


# --- states ----------------------------------------------------------------------------------------------------


def test_states_are_read_from_the_files() -> None:
    sweep = Sweep()
    done, half = sweep.add(0.5, 1, 4.5), sweep.add(0.5, 2, 4.5)
    (half / "result.json").unlink()
    failed = fail(sweep.root, "alpha1-temperature4-seed3-0123abcd", "out of luck")
    retried = sweep.add(0.5, 4, 4.5)
    (retried / "failure.json").write_text('{"error": "earlier", "exit_code": 1, "log": "x"}')
    live = sweep.add(1.0, 4, 4.5)
    (live / "result.json").unlink()
    with FileLock(live / LOCK):
        frame: Any = load_runs("outputs").runs.set_index("directory")
    assert frame.at[str(live), "state"] == "running"
    assert frame.at[str(done), "state"] == frame.at[str(retried), "state"] == "done"
    assert frame.at[str(half), "state"] == "interrupted"
    assert frame.at[str(failed), "state"] == "failed"
    assert frame.at[str(failed), "error"] == "out of luck"
    assert frame.loc[str(failed), ["alpha", "temperature", "seed"]].tolist() == [1, 4, 3]
    assert not math.isnan(frame.at[str(half), "val_loss"])


def test_an_unreadable_failure_is_a_failure_still() -> None:
    directory = fail(Path("outputs/made"), "alpha1-temperature4-seed3-0123abcd", "x")
    (directory / "failure.json").write_text("{")
    runs = load_runs("outputs")
    assert runs.runs["state"].tolist() == ["failed"]
    assert "failure.json" in runs.problems[0]


# --- damage: a sentence each, and the rest goes on ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["history.json", "result.json", "environment.json"])
@pytest.mark.parametrize("content", ["", '{"val_loss": [1.0, ', "[1, 2]", "null", "[" * 100_000])
def test_a_damaged_file_is_left_out_with_a_sentence(name: str, content: str) -> None:
    sweep = Sweep()
    kept, damaged = sweep.add(0.5, 1, 4.5), sweep.add(0.5, 2, 4.5)
    (damaged / name).write_text(content)
    runs = load_runs("outputs")
    assert runs.runs["directory"].tolist() == [str(kept), str(damaged)]
    assert any(str(damaged / name) in problem for problem in runs.problems)
    assert not any(str(kept) in problem for problem in runs.problems)


def test_the_result_stands_in_for_a_truncated_history() -> None:
    directory = Sweep().add(0.5, 1, 4.5)
    text = (directory / "history.json").read_text()
    (directory / "history.json").write_text(text[: len(text) // 2])
    runs = load_runs("outputs")
    assert runs.runs["val_loss"].tolist() == [read_json(directory / "result.json")["val_loss"]]
    assert runs.metrics.empty


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"val_loss": [5.0, 4.0]}, "2 values for 3 steps"),
        ({"val_loss": [5.0, "four", 4.5]}, "1 values of val_loss are not numbers"),
        ({"val_loss": [5.0, True, 4.5]}, "1 values of val_loss are not numbers"),
        ({"val_loss": [5.0, 4.8, 1.0]}, "val_loss is 1 in history.json"),
        ({"test_loss": 9.0}, "test_loss is 9 in history.json"),
    ],
)
def test_an_edited_history_is_noticed(values: dict[str, Any], word: str) -> None:
    directory = Sweep().add(0.5, 1, 4.5)
    change(directory / "history.json", **values)
    assert any(word in problem for problem in load_runs("outputs").problems)


def test_numbers_that_are_not_numbers_never_get_in() -> None:
    directory = Sweep().add(0.5, 1, 4.5)
    text = (directory / "history.json").read_text()
    flops = '"flops": 1000000000.0'
    assert flops in text
    (directory / "history.json").write_text(text.replace(flops, '"flops": Infinity'))
    change(directory / "result.json", flops={"a": 1}, best_val_loss="low")
    row = load_runs("outputs").runs.iloc[0]
    assert math.isnan(row["flops"])
    assert row["best_val_loss"] == row["val_loss"]


def test_blocks_that_contradict_the_record_are_left_out() -> None:
    directory = Sweep().add(0.5, 1, 4.5)
    table = np.load(directory / "val_blocks.npy")
    table["nll"][0] += 10
    np.save(directory / "val_blocks.npy", table)
    runs = load_runs("outputs")
    assert "val_blocks.npy" in runs.problems[0]
    assert list(runs.files[str(directory)].blocks) == ["test"]


@pytest.mark.parametrize("content", [b"", b"not numpy", b"\x93NUMPY\x01\x00"])
def test_unreadable_blocks_are_left_out(content: bytes) -> None:
    directory = Sweep().add(0.5, 1, 4.5)
    (directory / "test_blocks.npy").write_bytes(content)
    runs = load_runs("outputs")
    assert "test_blocks.npy" in runs.problems[0]


def test_blocks_of_another_shape_are_left_out() -> None:
    directory = Sweep().add(0.5, 1, 4.5)
    np.save(directory / "test_blocks.npy", np.zeros(3))
    assert "not a table of document, tokens, nll" in load_runs("outputs").problems[0]


def test_foreign_folders_are_named_and_passed_over() -> None:
    sweep = Sweep()
    sweep.add(0.5, 1, 4.5)
    foreign = sweep.root / "my notes"
    foreign.mkdir()
    (foreign / "todo.txt").write_text("x")
    for silent in ("reports", ".hydra"):
        (sweep.root / silent).mkdir()
    runs = load_runs("outputs")
    assert len(runs.runs) == 1
    assert len(runs.problems) == 1
    assert "my notes" in runs.problems[0]


# --- nothing to read ----------------------------------------------------------------------------------------------


def test_an_empty_or_missing_outputs_is_a_sentence() -> None:
    with pytest.raises(DataError, match="outputs is not a folder"):
        load_runs()
    Path("outputs/made").mkdir(parents=True)
    with pytest.raises(DataError, match="no runs there"):
        load_runs("outputs")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_outputs_is_a_sentence() -> None:
    Path("outputs").mkdir(mode=0)
    with pytest.raises(ResourceError, match="cannot be read"):
        load_runs("outputs")


def test_a_folder_that_cannot_be_listed_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("outputs").mkdir()

    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ResourceError, match="cannot be read"):
        load_runs("outputs")


def test_reading_leaves_the_runs_as_they_are() -> None:
    directory = Sweep().add(0.5, 1, 4.5)
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    load_runs("outputs")
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before
