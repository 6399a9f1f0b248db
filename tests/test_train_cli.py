"""`python -m kd.train` as a user sees it: real processes, exit codes, files, kills."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import kd.generate
from kd.data import PackedBlocks
from kd.errors import ConfigError, DataError, KDError
from kd.files import check_directory
from kd.student import load_student
from tests.commands import REPOSITORY, TINY, Outcome, environment, only_run, run, run_and_list, start, strict_json

SERIES = ("train_loss", "kl_loss", "ce_loss", "learning_rate", "grad_norm")
VAL_SERIES = ("val_loss", "val_ppl", "val_kl", "val_agreement", "val_bits_per_byte")
TOTALS = ("teacher_val_ppl", "test_loss", "test_ppl", "tokens", "flops", "parameters")
RUN_NAME = re.compile(r"alpha0\.5-temperature2-seed0-[0-9a-f]{8}")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one tiny run, and its cache with tokenizer, blocks and teacher; made once."""
    folder = tmp_path_factory.mktemp("prepared")
    before = Path.cwd()
    os.chdir(folder)
    try:
        outcome = run(*TINY, KD_CACHE=str(folder / "cache"))
    finally:
        os.chdir(before)
    assert outcome.code == 0, outcome.errors
    return folder


@pytest.fixture
def cache(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that cache of this test's own."""
    shutil.copytree(prepared / "cache", tmp_path / "warm")
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "warm"))
    return tmp_path / "warm"


@pytest.fixture
def finished(prepared: Path, cache: Path) -> Path:
    """The directory of a copy of that run, with its cache."""
    assert cache.is_dir()
    shutil.copytree(prepared / "outputs", "outputs")
    environment = only_run() / "environment.json"
    environment.write_text(environment.read_text().replace(str(prepared / "cache"), str(cache)))
    return only_run()


def weights(directory: Path, step: int) -> dict[str, np.ndarray]:
    return {
        name: tensor.numpy()
        for name, tensor in load_file(directory / "checkpoints" / f"checkpoint-{step}" / "model.safetensors").items()
    }


def assert_same_run(first: Path, second: Path, step: int) -> None:
    ours, theirs = weights(first, step), weights(second, step)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    histories = [strict_json(path / "history.json") for path in (first, second)]
    for history in histories:
        del history["timing"]
    assert histories[0] == histories[1]


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def test_a_run_writes_what_the_specification_lists(finished: Path) -> None:
    directory = finished
    assert RUN_NAME.fullmatch(directory.name)
    for name in ("config.yaml", "result.json", "environment.json", "samples.txt", "train.log", "val_blocks.npy"):
        assert (directory / name).stat().st_size > 0, name
    for name in ("config.yaml", "overrides.yaml", "hydra.yaml"):
        assert (directory / ".hydra" / name).is_file()
    history = strict_json(directory / "history.json")
    assert {len(history[name]) for name in SERIES} == {len(history["train_step"])} == {3}
    assert {len(history[name]) for name in VAL_SERIES} == {len(history["val_step"])} == {2}
    assert all(isinstance(history[name], int | float) for name in TOTALS)
    assert {"tokens_per_second", "wall_seconds", "peak_memory_bytes"} <= history["timing"].keys()
    assert history["val_ppl"] == pytest.approx([np.exp(loss) for loss in history["val_loss"]])
    result = strict_json(directory / "result.json")
    assert result["state"] == "done"
    assert result["val_loss"] == history["val_loss"][-1]
    check_directory(directory / "checkpoints" / "checkpoint-6", digests=True)
    assert not [path for path in directory.rglob("*") if path.suffix in (".pt", ".bin", ".pkl", ".pickle")]
    assert {path.name for path in Path("outputs").iterdir()} == {"debug"}


def test_each_part_is_scored_by_the_final_model_on_its_own_blocks(finished: Path, cache: Path) -> None:
    """Scored here once more, from the files alone: a part that stands for the other is not noticed by its own mean."""
    history, result = strict_json(finished / "history.json"), strict_json(finished / "result.json")
    model = load_student(finished).model
    (store,) = (path for path in (cache / "blocks").iterdir() if path.is_dir())
    texts = []
    for part, name in (("val", "validation"), ("test", "test")):
        blocks = PackedBlocks(store, name, max_blocks=32)
        batch = blocks[list(range(len(blocks)))]
        with torch.no_grad():
            log_p = torch.log_softmax(model(batch["input_ids"]).double(), dim=-1)
        nll = -log_p.gather(-1, batch["labels"].unsqueeze(-1)).squeeze(-1)
        table = np.load(finished / f"{part}_blocks.npy", allow_pickle=False)
        np.testing.assert_allclose(table["nll"], nll.sum(dim=1), rtol=1e-5)
        np.testing.assert_array_equal(table["document"], blocks.document_ids)
        assert (table["tokens"] == blocks.seq_len).all()
        recorded = history["val_loss"][-1] if part == "val" else history["test_loss"]
        assert recorded == result[f"{part}_loss"] == pytest.approx(float(nll.mean()), rel=1e-5)
        texts.append({row.numpy().tobytes() for row in batch["input_ids"]})
    assert not texts[0] & texts[1]


@pytest.mark.usefixtures("finished")
def test_a_finished_run_is_skipped_and_nothing_changes() -> None:
    before = contents(Path("outputs"))
    outcome = run(*TINY, "device=cpu", "train.log_interval=1", "threads=2")
    assert outcome.code == 0
    assert "Already done" in outcome.output
    assert contents(Path("outputs")) == before
    outcome, imported = run_and_list(*TINY)
    assert "Already done" in outcome.output
    assert imported == []
    assert run(*TINY, "overwrite=true").code == 0
    assert contents(Path("outputs")).keys() == before.keys()
    assert contents(Path("outputs")) != before


@pytest.mark.usefixtures("cache")
def test_alpha_zero_is_one_baseline_for_all_temperatures() -> None:
    assert run(*TINY, "train.alpha=0", "train.temperature=4", "teacher.cache=require").code == 0
    # Evaluations compare with the teacher; training does not, and its part is not kept.
    (states,) = (path for path in (Path(os.environ["KD_CACHE"]) / "teacher-states").iterdir() if path.is_dir())
    assert strict_json(states / "meta.json").keys() == {"shard_blocks"}
    assert len(np.load(states / "block_ids.npy")) == 32
    outcome = run(*TINY, "train.alpha=0", "train.temperature=1")
    assert "Already done" in outcome.output
    assert only_run().name.startswith("alpha0-seed0-")
    history = strict_json(only_run() / "history.json")
    assert history["kl_loss"] is None
    assert "alpha=0" in history["notes"]["kl_loss"]
    assert history["val_kl"] is not None


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("signum", "num_workers"),
    [
        (signal.SIGTERM, 2),
        (signal.SIGKILL, 0),
        pytest.param(signal.SIGTERM, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_half_way_ends_like_an_unstopped_one(
    signum: signal.Signals, num_workers: int, tmp_path: Path
) -> None:
    """The signal reaches all its processes, those that load data among them."""
    longer = (*TINY, "train.max_steps=160", "train.num_epochs=40", "train.save_interval=4", "model.dropout=0.1")
    longer = (*longer, "train.log_interval=7", "train.eval_interval=25", "train.gradient_accumulation_steps=2")
    assert run(*longer, "name=whole").code == 0
    cut = (*longer, "name=cut", f"data.num_workers={num_workers}")
    process = start(*cut)
    stop_at = wait_for_step(tmp_path / "outputs" / "cut", 12)
    os.killpg(process.pid, signum)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == (-9 if signum == signal.SIGKILL else 128 + signum), errors
    assert not (stop_at / "result.json").exists()
    assert f"Run: {stop_at.relative_to(tmp_path)}" in output
    outcome = run(*cut)
    assert outcome.code == 0, outcome.errors
    assert "Continuing from" in outcome.output
    assert_same_run(only_run("whole"), only_run("cut"), 160)


STOPPED_LATE = """
import os, signal, sys
from kd.trainers import BaseTrainer

def then_stop(name, number):
    method, calls = getattr(BaseTrainer, name), []
    def stopped(self, *args, **settings):
        result = method(self, *args, **settings)
        calls.append(0)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return result
    setattr(BaseTrainer, name, stopped)

then_stop(sys.argv.pop(1), int(sys.argv.pop(1)))
from kd.train import main
main()
"""


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("method", "call", "files"),
    [
        ("save_checkpoint", 2, ["checkpoint-6"]),
        ("_prepare_for_scoring", 11, ["checkpoint-6", "val_blocks.npy"]),
        ("record_part", 1, ["checkpoint-6", "val_blocks.npy", "test_blocks.npy"]),
    ],
)
def test_a_stop_after_the_last_step_is_an_interruption_too(
    method: str, call: int, files: list[str], finished: Path
) -> None:
    """In the final save, while the test part is scored, and after its score was written."""
    command = [sys.executable, "-c", STOPPED_LATE, method, str(call), *TINY, "name=cut"]
    stopped = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert stopped.returncode == 143, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not (only_run("cut") / "result.json").exists()
    left = {path.name for path in [*only_run("cut").iterdir(), *only_run("cut").glob("checkpoints/*")]}
    assert left & {"checkpoint-6", "val_blocks.npy", "test_blocks.npy"} == set(files)
    outcome = run(*TINY, "name=cut")
    assert outcome.code == 0, outcome.errors
    assert_same_run(finished, only_run("cut"), 6)


def wait_for_step(experiment: Path, step: int) -> Path:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        for path in experiment.glob("*/checkpoints/checkpoint-*"):
            if int(path.name.rpartition("-")[2]) >= step:
                return path.parents[1]
        time.sleep(0.005)
    raise AssertionError(f"no checkpoint of step {step} appeared")


@pytest.mark.usefixtures("cache")
def test_a_live_run_is_refused_to_a_second_process(tmp_path: Path) -> None:
    longer = (*TINY, "train.max_steps=100000", "train.num_epochs=100000", "train.save_interval=50")
    process = start(*longer)
    wait_for_step(tmp_path / "outputs" / "debug", 50)
    outcome = run(*longer)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert outcome.code == 3
    assert f"process {process.pid}" in outcome.errors


def test_a_killed_teacher_training_goes_on(tmp_path: Path) -> None:
    slow_teacher = (*TINY, "teacher.train.max_steps=400", "teacher.train.save_interval=20")
    slow_teacher = (*slow_teacher, "teacher.train.log_interval=100")
    process = start(*slow_teacher)
    deadline = time.monotonic() + 90
    while not list((tmp_path / "cache").glob("teachers/*.partial/checkpoints/checkpoint-40")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    outcome = run(*slow_teacher)
    assert outcome.code == 0, outcome.errors
    first_line = next(line for line in outcome.output.splitlines() if re.search(r"step \d+/400", line))
    assert "step 100/400" in first_line
    assert not list((tmp_path / "cache").glob("teachers/*.partial"))


BAD_VALUES = {
    ("train.alpha=1.5",): (2, "train.alpha=1.5", "[0, 1]"),
    ("train.alpha=nan",): (2, "train.alpha=nan", "[0, 1]"),
    ("train.temperature=0",): (2, "train.temperature=0", "greater than 0"),
    ("model.hidden_size=64", "model.num_heads=7"): (2, "model.num_heads=7", "divisible"),
    ("train.alpa=0.5",): (2, "train.alpa", "train.alpha"),
    ("+train.typo=1",): (2, "train.typo", "Known there"),
    ("train.batch_size=abc",): (2, "train.batch_size", "abc"),
    ("teacher=nope",): (2, "teacher", "embedded"),
    ("device=cuda:99",): (2, "device=cuda:99", "device=cpu"),
    ("data=text", "data.path=missing"): (4, "data.path=missing", "Give a file"),
    ("data=text", "data.path=empty"): (4, "data.path=empty", "empty"),
    ("data=text", "data.path=short"): (4, "data.seq_len=128", "more text"),
    ("data=text", "data.path=one-block", "model.vocab_size=260", "train.batch_size=999"): (
        4,
        "train.batch_size=999",
        "Lower",
    ),
    ("teacher=local", "teacher.path=missing"): (4, "teacher.path=missing", "directory"),
    ("teacher=hub", "teacher.model_id=nobody/nothing"): (4, "nobody/nothing", "hf download nobody/nothing"),
    ("data=hub", "data.path=nobody/nothing"): (4, "nobody/nothing", "load_dataset"),
    ("data.tokenizer=nobody/nothing", "teacher=none", "train.alpha=0"): (4, "nobody/nothing", "hf download"),
    ("teacher.model.vocab_size=5000",): (2, "teacher.model.vocab_size=5000", "model.vocab_size=4096"),
    ("model.vocab_size=100",): (2, "model.vocab_size=100", "model.vocab_size=257"),
    ("data.path=~/x",): (2, "data.path=~/x", """'data.path="~/x"'"""),
    ("hydra.run.dir=x/y",): (2, "hydra.run.dir=x/y", "name="),
    ("-m", "hydra.job.chdir=true"): (2, "hydra.job.chdir=True", "Leave it out"),
    ("-m", "--cfg", "job"): (2, "--cfg", "Only one of"),
    ("init_from=missing",): (4, "missing", "outputs/<name>/<run>"),
}


@pytest.fixture(scope="module")
def bad_corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    texts = {"empty": " \n", "short": "A few words.", "one-block": "def f(x):\n    return x\n" * 120}
    for name, text in texts.items():
        (folder / name).mkdir()
        for number in range(4):
            (folder / name / f"{number}.txt").write_text(text if name == "empty" else f"{text} {number}")
    return folder


@pytest.mark.parametrize("overrides", BAD_VALUES, ids=" ".join)
def test_bad_input_is_refused(overrides: tuple[str, ...], bad_corpora: Path) -> None:
    code, named, way_out = BAD_VALUES[overrides]
    os.chdir(bad_corpora)
    started = time.monotonic()
    outcome = run(*overrides, KD_CACHE="")
    check_refusal(outcome, code, named, way_out)
    assert time.monotonic() - started < 10
    # What was cached before it turned out is whole, and others may use it already; there is nothing else.
    assert all(path.is_relative_to("outputs/.cache") for path in Path("outputs").glob("*/*"))
    assert not list(Path("outputs").rglob("*.partial"))
    shutil.rmtree("outputs", ignore_errors=True)
    assert sorted(path.name for path in bad_corpora.iterdir()) == ["empty", "one-block", "short"]


def check_refusal(outcome: Outcome, code: int, named: str, way_out: str) -> None:
    assert outcome.code == code, outcome.errors
    assert named in outcome.errors
    assert way_out in outcome.errors
    assert "Traceback" not in outcome.errors
    assert "HYDRA_FULL_ERROR" not in outcome.errors


def test_a_file_in_place_of_the_output_folder() -> None:
    Path("outputs").write_text("mine")
    check_refusal(run(*TINY), 7, "outputs", "move it away")
    assert Path("outputs").read_text() == "mine"


@pytest.mark.usefixtures("cache")
def test_a_damaged_checkpoint_is_passed_over() -> None:
    longer = (*TINY, "train.max_steps=40", "train.num_epochs=10", "train.save_interval=5")
    assert run(*longer, "name=whole").code == 0
    shutil.copytree("outputs/whole", "outputs/cut")
    cut = only_run("cut")
    (cut / "result.json").unlink()
    for step in (40, 35):
        file = cut / "checkpoints" / f"checkpoint-{step}" / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    # What kills leave: in the middle of a save, of a file, and between the two renames of a checkpoint's replacement.
    (cut / "checkpoints" / ".checkpoint-35.1-abc.tmp").mkdir()
    for name in (".history.json.0123abcd.tmp", ".hydra/.config.yaml.0123abcd.tmp"):
        (cut / name).write_text("{")
    (cut / "checkpoints" / "checkpoint-30").rename(cut / "checkpoints" / ".checkpoint-30.1-0123abcd.old")
    outcome = run(*longer, "name=cut", "train.checkpoint_dir=elsewhere/")
    assert outcome.code == 0, outcome.errors
    assert not list(cut.rglob(".*.*"))
    assert "checkpoint-30" in outcome.output
    assert "damaged" in outcome.output
    assert "train.checkpoint_dir=elsewhere/ has no effect on a run that has begun" in outcome.output
    assert not (cut / "elsewhere").exists()
    assert_same_run(only_run("whole"), cut, 40)


@pytest.mark.usefixtures("cache")
def test_pretraining_and_init_from() -> None:
    assert run(*TINY, "train=pretrain", "train.max_steps=5", "train.log_interval=1").code == 0
    first = only_run()
    assert first.name.startswith("pretrain-seed0-")
    assert strict_json(first / "history.json")["kl_loss"] is None
    outcome = run(*TINY, f"init_from={first}", "name=second", "train.alpha=0", "train.log_interval=1")
    assert outcome.code == 0, outcome.errors
    history = strict_json(only_run("second") / "history.json")
    assert history["train_loss"][0] < strict_json(first / "history.json")["train_loss"][0] - 0.01


def test_generate_continues_a_prompt_also_without_the_cache(finished: Path, cache: Path) -> None:
    shutil.rmtree(cache)
    outcome = run(str(finished), "def f(", "--max-new-tokens", "12", module="kd.generate")
    assert outcome.code == 0, outcome.errors
    assert outcome.output.startswith("def f(")
    assert len(outcome.output) > len("def f(\n")


def test_generate_prints_what_a_terminal_cannot_show_as_escapes(finished: Path) -> None:
    arguments = (str(finished), "# \u00e9\u4e2d", "--max-new-tokens", "1")
    outcome = run(*arguments, module="kd.generate", PYTHONIOENCODING="ascii")
    assert outcome.code == 0, outcome.errors
    assert outcome.output.startswith(r"# \xe9\u4e2d")
    bare = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # as a locale that knows ASCII alone
    assert run(*arguments, module="kd.generate", PYTHONIOENCODING="ascii", **bare).output == outcome.output


def test_a_prompt_that_is_not_utf_8_is_refused(finished: Path) -> None:
    with pytest.raises(ConfigError, match="not valid Unicode at character 3"):
        kd.generate.generate([str(finished), os.fsdecode(b"caf\xe9")])


@pytest.mark.parametrize("strategy", ["greedy", "top_k", "top_p"])
def test_each_strategy_repeats_itself(finished: Path, strategy: str) -> None:
    options = ["--strategy", strategy, "--max-new-tokens", "12", "--seed", "3"]
    first, second = (kd.generate.generate([str(finished), "def f(", *options]) for _ in range(2))
    assert first == second
    assert first.startswith("def f(")


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        (("outputs/none", "x"), DataError, "outputs/<name>/<run>"),
        (("outputs/debug", "x", "--top-p", "2"), ConfigError, "top_p=2"),
    ],
)
def test_generate_refuses(arguments: tuple[str, ...], error: type[KDError], named: str) -> None:
    with pytest.raises(error, match=named):
        kd.generate.generate(list(arguments))


@pytest.mark.usefixtures("cache")
def test_a_sweep_returns_every_point() -> None:
    outcome = run("-m", *TINY, "train.alpha=0,1")
    assert outcome.code == 0, outcome.errors
    names = sorted(path.parent.name.rpartition("-")[0] for path in Path("outputs/debug").glob("*/result.json"))
    assert names == ["alpha0-seed0", "alpha1-temperature2-seed0"]


def test_help_and_the_configuration_print_without_torch() -> None:
    help_text = run("--help")
    assert help_text.code == 0
    assert "train.alpha" in help_text.output
    shown = run("--cfg", "job", "train.alpha=0.25")
    assert shown.code == 0
    assert "alpha: 0.25" in shown.output
    probe = (
        "import sys; sys.argv = ['kd.train', '--help']\n"
        "import kd.train\n"
        "try:\n    kd.train.main()\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", probe], check=True, cwd=REPOSITORY, capture_output=True)


@pytest.mark.usefixtures("cache")
def test_too_little_memory_names_the_way_out() -> None:
    # One such matrix takes 4 TB.
    outcome = run(*TINY, "train.batch_size=8", "model.hidden_size=1048576", "model.intermediate_size=1048576")
    assert outcome.code == 7, outcome.errors
    assert "train.batch_size=8" in outcome.errors
    assert "gradient_accumulation_steps" in outcome.errors
    assert not Path("outputs").exists()
