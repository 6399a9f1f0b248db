"""What does a busy process beside it cost a training, and what does being ready for one cost on idle cores?

    python experiments/benchmarks/neighbour.py

Between two parallel sections OpenMP's threads spin, ready for the next one, or sleep. Spinning saves a wake-up; but
where another process wants one of the cores, a thread that spins holds it from the one that it waits for. How long
they spin is GNU OpenMP's GOMP_SPINCOUNT, which `kd.openmp` sets unless the user did.

Each setting trains the embedded default's student on its teacher's cached states (random weights and tokens, 8 x 128
tokens a step, `DistillationTrainer`'s own step) in processes of its own, all prepared beforehand, which take turns:
alone; beside a process that never rests; and beside a second training of the same setting, as two commands at once
are. Ratios are taken within each round, so that whatever else the machine does hits both sides alike; the medians over
the rounds are reported. Bars for what `kd.train` sets: beside a busy process at least half of its own speed alone;
alone, at least 0.97 of the speed with OpenMP's own spinning. The cores must be idle otherwise.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from measure import write_json
from step import Setting, prepare
from step_jobs import CACHED, Job

from kd.config import ModelConfig
from kd.openmp import SPIN_COUNT, WAITING

OWN, ONE_THREAD = "OpenMP's own", "one thread"
VALUES = (20_000, 3_000, 2_000, 1_000, 500, 0)
IDLE, BUSY, SECOND = "alone", "busy neighbour", "second training"
IDLE_BAR, BUSY_BAR = 0.97, 0.5
WARM_UP_STEPS = 10
BUSY_PROGRAM = "while True: pass"
EMBEDDED = Job(
    LlamaForCausalLM,
    LlamaConfig(
        vocab_size=4096,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=512,
        tie_word_embeddings=True,
    ),
    ModelConfig(96, 2, 4, 2, 256, vocab_size=4096, max_seq_len=128, rope_theta=10000.0),
    batch_size=8,
    alpha=0.5,
    temperature=2.0,
    variants=(CACHED,),
    reference=CACHED,
    speed_bars={},
    memory_bars={},
    one_at_a_time=False,
)
"""The shapes of conf/model/tiny.yaml and conf/teacher/embedded.yaml."""


@dataclass
class Variant:
    """How threads wait, and what was measured of it."""

    name: str
    variables: dict[str, str]
    """Of the environment."""
    threads: int
    rates: dict[str, list[float]] = field(default_factory=lambda: {IDLE: [], BUSY: [], SECOND: []})
    """Tokens a second by what ran beside it, in the rounds' order; with a second training, of both together."""


def variants(threads: int) -> list[Variant]:
    """Return what is compared."""
    spinning = [Variant(f"GOMP_SPINCOUNT={value}", {WAITING[0]: str(value)}, threads) for value in VALUES]
    return [Variant(OWN, {}, threads), *spinning, Variant(ONE_THREAD, {}, 1)]


# --- a child -----------------------------------------------------------------------------------------------------


def serve(threads: int) -> None:
    """Answer each line of the standard input, a number of seconds, with the tokens a second of so long a training."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print too
    torch.set_num_threads(threads)
    setting = make_setting()
    step = prepare(setting, CACHED)
    for _ in range(WARM_UP_STEPS):
        step()
    print(0.0, file=answers, flush=True)  # it is ready
    for line in sys.stdin:
        steps, start = 0, time.perf_counter()
        while time.perf_counter() - start < float(line):
            step()
            steps += 1
        rate = steps * setting.batch_size * EMBEDDED.student.max_seq_len / (time.perf_counter() - start)
        print(rate, file=answers, flush=True)


def make_setting() -> Setting:
    """Return what all train."""
    return Setting(EMBEDDED, EMBEDDED.batch_size, torch.device("cpu"), torch.float32)


class Child:
    """A training that waits to be asked for its speed."""

    def __init__(self, variant: Variant) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in WAITING} | variant.variables
        environment.pop("OMP_NUM_THREADS", None)
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--child", "--threads", str(variant.threads)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, seconds: float) -> None:
        """Let it train for so long."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()

    def answer(self) -> float:
        """Return what it measured since it was asked."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"A training ended without an answer (exit code {self._process.wait()}).")
        return float(line)

    def end(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


@contextmanager
def busy_process() -> Iterator[None]:
    """Keep a core busy while the block runs."""
    process = subprocess.Popen([sys.executable, "-c", BUSY_PROGRAM])
    try:
        yield
    finally:
        process.kill()
        process.wait()


# --- the comparison ----------------------------------------------------------------------------------------------


def measure(compared: Sequence[Variant], rounds: int, seconds: float) -> None:
    """Measure all variants in turn, beginning with another one in each round."""
    with ExitStack() as stack:
        pairs = []
        for variant in compared:
            pair = (Child(variant), Child(variant))
            for child in pair:
                stack.callback(child.end)
            pairs.append((variant, pair))
        for _, pair in pairs:
            for child in pair:
                child.answer()  # it is ready
        for number in tqdm(range(rounds), unit="round", leave=False):
            turned = number % len(pairs)
            for variant, pair in [*pairs[turned:], *pairs[:turned]]:
                variant.rates[IDLE].append(rate_of(pair[:1], seconds))
                with busy_process():
                    variant.rates[BUSY].append(rate_of(pair[:1], seconds))
                variant.rates[SECOND].append(rate_of(pair, seconds))


def rate_of(children: Sequence[Child], seconds: float) -> float:
    """Return the tokens a second of trainings at the same time, together."""
    for child in children:
        child.ask(seconds)
    return sum(child.answer() for child in children)


@dataclass(frozen=True)
class Ratios:
    """Medians over the rounds."""

    idle: float
    """Alone, of the speed with OpenMP's own spinning."""
    busy: float
    """Beside a busy process, of its own speed alone."""
    second: float
    """Two trainings together, of the speed of one alone."""


def ratios(variant: Variant, reference: Variant) -> Ratios:
    """Return a variant's ratios, each taken within a round."""

    def median(above: Sequence[float], below: Sequence[float]) -> float:
        return statistics.median(a / b for a, b in zip(above, below, strict=True))

    alone = variant.rates[IDLE]
    return Ratios(
        median(alone, reference.rates[IDLE]), median(variant.rates[BUSY], alone), median(variant.rates[SECOND], alone)
    )


def report(compared: Sequence[Variant]) -> dict[str, Ratios]:
    """Print the table, and whether kd's own setting holds the bars; return the ratios by variant."""
    found = {variant.name: ratios(variant, compared[0]) for variant in compared}
    print(f"{'':<24}{'alone':>8}{'/ first':>9}{'busy neighbour':>16}{'/ alone':>9}{'two trainings':>15}{'/ alone':>9}")
    for variant in compared:
        alone, busy, second = (statistics.median(variant.rates[name]) for name in (IDLE, BUSY, SECOND))
        ratio = found[variant.name]
        print(
            f"{variant.name:<24}{alone:>8.0f}{ratio.idle:>9.2f}{busy:>16.0f}{ratio.busy:>9.2f}"
            f"{second:>15.0f}{ratio.second:>9.2f}"
        )
    own = found[f"{WAITING[0]}={SPIN_COUNT}"]
    for name, ratio, bar in ((IDLE, own.idle, IDLE_BAR), (BUSY, own.busy, BUSY_BAR)):
        print(f"kd.train's setting, {name}: {ratio:.3f} (bar {bar}), {'held' if ratio >= bar else 'MISSED'}")
    return found


def main() -> None:
    """Measure, print and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of each training; as many as the machine has cores")
    parser.add_argument("--rounds", type=int, default=7, help="measured repetitions of each variant")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each repetition")
    parser.add_argument("--name", default="neighbour-cpu", help="of the result file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        serve(args.threads)
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KD_CACHE"] = folder
        make_setting().build_cache()
        compared = variants(args.threads)
        measure(compared, args.rounds, args.seconds)
    found = report(compared)
    settings = {"threads": args.threads, "rounds": args.rounds, "seconds": args.seconds, "kd.train": SPIN_COUNT}
    rows = [asdict(variant) | {"ratios": asdict(found[variant.name])} for variant in compared]
    write_json(args.name, settings, rows)


if __name__ == "__main__":
    main()
