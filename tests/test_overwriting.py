"""overwrite=true begins afresh once, and then goes on: a job that is stopped again and again comes to its end."""

import logging
from pathlib import Path

import pytest

import kd.runs
from kd.config import Config
from kd.errors import IntegrityError
from kd.files import remove_path
from kd.overwriting import begin_afresh, end, needless_because
from kd.runs import Fingerprints, Run, run_identity


@pytest.fixture
def run() -> Run:
    """A finished run."""
    finished = Run(run_identity(Config(), Fingerprints("corpus", "tokenizer", "teacher")))
    finished.directory.mkdir(parents=True)
    save_checkpoint(finished)
    finished.write_result({"val_loss": 2.5})
    return finished


def save_checkpoint(run: Run) -> None:
    (run.directory / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (run.directory / "checkpoints" / "checkpoint-1" / "state.json").write_text("{}")


def names(run: Run) -> set[str]:
    return {path.name for path in run.directory.iterdir()}


def test_a_finished_run_is_begun_afresh_and_a_begun_one_is_not(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    assert needless_because(run, overwrite=False) == run.result()
    assert needless_because(run, overwrite=True) is None
    begin_afresh(run)
    assert names(run) == {".overwriting"}
    save_checkpoint(run)
    for _ in range(2):  # stopped, and started again
        assert needless_because(run, overwrite=True) is None
        with caplog.at_level(logging.INFO, "kd"):
            begin_afresh(run)
        assert names(run) == {".overwriting", "checkpoints"}
    assert f"remove {run.directory}" in caplog.text


def test_once_it_is_done_it_is_done_until_it_is_overwritten_again(run: Run) -> None:
    begin_afresh(run)
    run.write_result({"val_loss": 2.0})
    # Killed here: the same command has nothing left to do.
    assert needless_because(run, overwrite=True) == run.result()
    end(run)
    assert needless_because(run, overwrite=True) is None
    begin_afresh(run)
    assert run.result() is None


def test_a_result_that_cannot_be_read_is_overwritten(run: Run) -> None:
    begin_afresh(run)
    save_checkpoint(run)
    run.result_file.write_text("{")
    with pytest.raises(IntegrityError):
        needless_because(run, overwrite=False)
    assert needless_because(run, overwrite=True) is None
    begin_afresh(run)
    assert names(run) == {".overwriting"}


@pytest.mark.parametrize("removed", range(3))
def test_a_run_that_is_half_removed_does_not_count_as_done(
    run: Run, removed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.directory / "history.json").write_text("{}")
    left = removed

    def remove(path: Path) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        remove_path(path)

    monkeypatch.setattr(kd.runs, "remove_path", remove)
    if removed < 2:
        with pytest.raises(KeyboardInterrupt):
            begin_afresh(run)
        # Nor as begun afresh: the same command removes the rest.
        assert not (run.directory / ".overwriting").exists()
    else:
        begin_afresh(run)
    assert run.result() is None
