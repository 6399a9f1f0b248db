"""How much time does a teacher that runs once save in a sweep, and does it change the outcome?

    python experiments/benchmarks/sweep.py                                           # the embedded default
    python experiments/benchmarks/sweep.py --job smollm2 --teacher DIR --gguf FILE   # SmolLM2-135M
    python experiments/benchmarks/sweep.py --count                                   # who sees which block how often

Alphas 0.3, 0.7, 1 by temperatures 1, 2, 4, each point a command `python -m kd.train` of its own, once with
`teacher.cache=off` and once with the cache, turn by turn. Tokenizer, packed blocks and the embedded teacher are there
before; hidden states are not: the first cached point computes them, and that counts. Times are of whole processes.

The embedded job is the default as it is (800 training blocks of 128 tokens, 3 epochs, batches of 8, evaluation on 64
blocks twice on the way, at the end on the whole validation part and, without a teacher, on the test part). The smollm2
job is the same, student and all, with another teacher (`pip install -e ".[gguf]"`), its tokenizer, and about an eighth
of the blocks: 96 for training, 192 for each evaluation at the end. Further `key=value` arguments go to all runs.

With `--count` nothing is timed: the cached points run with a hook in each process that notes every block that goes
through the teacher's body, first as they are, then with the build killed half-way (SIGKILL) and started again.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from measure import RESULTS, write_json
from omegaconf import OmegaConf

from kd.data import PackedBlocks
from kd.files import read_json
from kd.teacher_cache import HEADS, STATES, token_digests

REPOSITORY = Path(__file__).resolve().parents[2]
COUNTED = Path(__file__).with_name("counted_train.py")
ALPHAS, TEMPERATURES = (0.3, 0.7, 1), (1, 2, 4)
BARS = {"embedded": 0.8, "smollm2": 0.45}
PERPLEXITY_BAR = 0.001
POLL_SECONDS = 0.02
SMOLLM2 = (
    "teacher=local",
    "model.vocab_size=49152",
    "data.max_train_blocks=96",
    "data.max_eval_blocks=192",
    "train.warmup_steps=5",
    "train.log_interval=3",
    "train.eval_interval=12",
    "train.save_interval=12",
    "train.eval_blocks=8",
)


@dataclass
class Point:
    """One point of the grid, both ways."""

    alpha: float
    temperature: float
    live_seconds: float = 0.0
    cached_seconds: float = 0.0
    live_ppl: float = 0.0
    cached_ppl: float = 0.0

    @property
    def overrides(self) -> list[str]:
        """Return the settings that make the point."""
        return [f"train.alpha={self.alpha}", f"train.temperature={self.temperature}"]

    @property
    def difference(self) -> float:
        """Return the relative difference of the perplexities."""
        return abs(self.cached_ppl - self.live_ppl) / self.live_ppl


class Workplace:
    """A folder in which runs are made, and its cache.

    Args:
        directory: Kept between calls, but for runs and hidden states.
        overrides: Settings of all runs.
    """

    def __init__(self, directory: Path, overrides: Sequence[str]) -> None:
        self.directory = directory.absolute()
        self.cache = self.directory / "cache"
        self.seen_file = self.directory / "seen.txt"
        self._overrides = list(overrides)
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "KD_CACHE": str(self.cache),
            "KD_SEEN": str(self.seen_file),
        }

    def prepare(self) -> None:
        """Make what both ways share - tokenizer, blocks, embedded teacher - and remove what they do not."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.forget()
        self.run("prepare", ["teacher.cache=off", "train.max_steps=1", "train.warmup_steps=0", *_SHORT])
        shutil.rmtree(self.directory / "outputs")

    def forget(self) -> None:
        """Remove runs, notes and hidden states."""
        for folder in (self.directory / "outputs", self.cache / STATES, self.cache / HEADS):
            shutil.rmtree(folder, ignore_errors=True)
        self.seen_file.unlink(missing_ok=True)

    def start(self, name: str, overrides: Sequence[str], *, counted: bool = False) -> "subprocess.Popen[bytes]":
        """Start a run; its output goes to a file."""
        program = [str(COUNTED)] if counted else ["-m", "kd.train"]
        command = [sys.executable, *program, f"name={name}", *self._overrides, *overrides]
        with (self.directory / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                command, cwd=self.directory, env=self._environment, stdout=log, stderr=subprocess.STDOUT
            )

    def run(self, name: str, overrides: Sequence[str], *, counted: bool = False) -> float:
        """Make a run; return the seconds that its process took."""
        started = time.perf_counter()
        code = self.start(name, overrides, counted=counted).wait()
        if code != 0:
            text = (self.directory / f"{name}.log").read_text(errors="replace")
            raise RuntimeError(f"run {name} ended with code {code}:\n{text[-2000:]}")
        return time.perf_counter() - started

    def only_run(self, name: str) -> Path:
        """Return the directory of an experiment's only run."""
        (path,) = (path for path in (self.directory / "outputs" / name).iterdir() if path.is_dir())
        return path

    def perplexity(self, name: str) -> float:
        """Return the final validation perplexity of an experiment's only run."""
        return float(read_json(self.only_run(name) / "result.json")["val_ppl"])


_SHORT = ("train.log_interval=1", "train.eval_interval=1", "train.save_interval=1", "data.max_eval_blocks=8")


# --- timing ------------------------------------------------------------------------------------------------------


def compare(work: Workplace, points: Sequence[Point]) -> None:
    """Run each point both ways; which goes first alternates."""
    for index, point in enumerate(points):
        live, cached = f"live-{index}", f"cached-{index}"
        for is_cached in (False, True) if index % 2 == 0 else (True, False):
            if is_cached:
                point.cached_seconds = work.run(cached, ["teacher.cache=auto", *point.overrides])
            else:
                point.live_seconds = work.run(live, ["teacher.cache=off", *point.overrides])
        point.live_ppl, point.cached_ppl = work.perplexity(live), work.perplexity(cached)
        print(_row(point), flush=True)


def _row(point: Point) -> str:
    return (
        f"{point.alpha:>5} {point.temperature:>11} {point.live_seconds:>8.1f} {point.cached_seconds:>8.1f} "
        f"{point.cached_seconds / point.live_seconds:>6.2f} {point.live_ppl:>11.3f} {point.cached_ppl:>11.3f} "
        f"{point.difference:>10.5%}"
    )


def report(points: Sequence[Point], job: str) -> tuple[float, float]:
    """Print the sums; return the ratio of times and the largest difference of perplexities."""
    live, cached = (sum(getattr(point, f"{way}_seconds") for point in points) for way in ("live", "cached"))
    difference = max(point.difference for point in points)
    print(f"{'sum':>17} {live:>8.1f} {cached:>8.1f} {cached / live:>6.3f}  (bar <= {BARS[job]:g})")
    print(f"largest difference of final perplexities: {difference:.5%} (bar <= {PERPLEXITY_BAR:.1%})")
    return cached / live, difference


def plot(points: Sequence[Point], path: Path, title: str) -> None:
    """Draw the seconds of each point, both ways."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3))
    places = range(len(points))
    axes.bar([place - 0.2 for place in places], [point.live_seconds for point in points], 0.4, label="live")
    axes.bar([place + 0.2 for place in places], [point.cached_seconds for point in points], 0.4, label="cached")
    axes.set_xticks(list(places), [f"{point.alpha:g}\n{point.temperature:g}" for point in points])
    axes.set_xlabel("alpha, temperature")
    axes.set_ylabel("seconds")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


# --- counting ----------------------------------------------------------------------------------------------------


def count(work: Workplace, points: Sequence[Point]) -> bool:
    """Run the cached points with hooks, undisturbed and with a killed build; return whether all is as it should be."""
    _run_points(work, points)
    expected = blocks_of(work)
    once = _compare_counts("undisturbed", work, expected, may_repeat=0)
    work.forget()
    _kill_first_build(work, points[0], sum(expected.values()) // 2)
    _run_points(work, points)
    shard = max(read_json(meta)["shard_blocks"] for meta in (work.cache / STATES).glob("*/meta.json"))
    # What was computed for a shard that never got to the disk must be computed again.
    return _compare_counts("killed half-way", work, expected, may_repeat=shard) and once


def _run_points(work: Workplace, points: Sequence[Point]) -> None:
    for index, point in enumerate(points):
        work.run(f"counted-{index}", ["teacher.cache=auto", *point.overrides], counted=True)


def _kill_first_build(work: Workplace, point: Point, rows: int) -> None:
    process = work.start("counted-0", ["teacher.cache=auto", *point.overrides], counted=True)
    while sum(seen_rows(work).values()) < rows:
        if process.poll() is not None:
            raise RuntimeError(f"the build ended (code {process.returncode}) before it could be killed")
        time.sleep(POLL_SECONDS)
    process.send_signal(signal.SIGKILL)
    process.wait()


def seen_rows(work: Workplace) -> Counter[tuple[int, int]]:
    """Return how often each row, by digest and length, went through a teacher's body."""
    if not work.seen_file.exists():
        return Counter()
    pairs = (line.split() for line in work.seen_file.read_text().splitlines())
    return Counter((int(digest), int(length)) for digest, length in pairs)


def blocks_of(work: Workplace) -> Counter[tuple[int, int]]:
    """Return the training and validation blocks of the runs, by digest and length."""
    data = OmegaConf.load(work.only_run("counted-0") / "config.yaml").data
    (store,) = (path for path in (work.cache / "blocks").iterdir() if path.is_dir())
    limits = {"train": data.max_train_blocks, "validation": data.max_eval_blocks}
    rows: Counter[tuple[int, int]] = Counter()
    for part, limit in limits.items():
        blocks = PackedBlocks(store, part, limit)
        digests = token_digests(blocks[list(range(len(blocks)))]["input_ids"])
        rows.update((int(digest), data.seq_len) for digest in digests)
    return rows


def _compare_counts(case: str, work: Workplace, expected: Counter[tuple[int, int]], may_repeat: int) -> bool:
    seen = seen_rows(work)
    length = next(iter(expected))[1]
    probes = Counter({row: times for row, times in seen.items() if row[1] != length})
    blocks = seen - probes
    missing, repeated = expected - blocks, blocks - expected
    unknown = [row for row in repeated if row not in expected]
    print(
        f"{case}: {sum(expected.values())} blocks; never seen {sum(missing.values())}, seen again "
        f"{sum(repeated.values())} (at most {may_repeat}), unknown {len(unknown)}; {sum(probes.values())} short probes"
    )
    return not missing and not unknown and sum(repeated.values()) <= may_repeat


# --- the command -------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", default="embedded", choices=list(BARS))
    parser.add_argument("--teacher", type=Path, help="smollm2: the folder of the GGUF file")
    parser.add_argument("--gguf", help="smollm2: the name of the GGUF file")
    few = "fewer than the default make the cache look worse: its build is shared by fewer runs"
    parser.add_argument("--alphas", type=float, nargs="+", default=ALPHAS, help=few)
    parser.add_argument("--temperatures", type=float, nargs="+", default=TEMPERATURES, help=few)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each process")
    parser.add_argument("--work", type=Path, help="where runs are made; default: outputs/benchmarks/sweep-JOB")
    parser.add_argument("--count", action="store_true", help="count blocks instead of seconds")
    parser.add_argument("--name", help="of the result files; default: sweep-JOB")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="further settings of all runs")
    args = parser.parse_args()
    if args.job == "smollm2" and (args.teacher is None or args.gguf is None):
        parser.error("--job smollm2 needs --teacher DIR and --gguf FILE")
    return args


def main() -> None:
    """Measure or count, print the table and write the files."""
    args = parse()
    job = []
    if args.job == "smollm2":
        job = [*SMOLLM2, f"teacher.path={args.teacher.absolute()}", f"teacher.gguf_file={args.gguf}"]
    directory = args.work or REPOSITORY / "outputs" / "benchmarks" / f"sweep-{args.job}"
    work = Workplace(directory, [f"threads={args.threads}", *job, *args.overrides])
    work.prepare()
    points = [Point(alpha, temperature) for alpha, temperature in product(args.alphas, args.temperatures)]
    if args.count:
        sys.exit(0 if count(work, points) else 1)
    print("alpha temperature   live s cached s  ratio    live ppl  cached ppl difference")
    compare(work, points)
    ratio, difference = report(points, args.job)
    settings = {"job": args.job, "threads": args.threads, "overrides": args.overrides}
    settings |= {"ratio": ratio, "largest_ppl_difference": difference}
    name = args.name or f"sweep-{args.job}"
    write_json(name, settings, [asdict(point) for point in points])
    plot(
        points,
        RESULTS / f"{name}.png",
        f"{len(points)} points, job {args.job}: the cache takes {ratio:.2f} of the time",
    )


if __name__ == "__main__":
    main()
