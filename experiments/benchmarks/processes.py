"""How many tokens a second do several processes train on?

    python experiments/benchmarks/processes.py                     # two processes against one, on this machine's CPU
    torchrun --nproc-per-node=N experiments/benchmarks/processes.py --strategy fsdp    # one variant, on GPUs if any

Pre-training of a small student on 32 rows of 128 random tokens an optimizer step, however many processes share them,
in float32. Tokens a second are those of the optimizer steps after the first 20, evaluation and checkpoints left out.
Variants are started in turn, each as whole processes; medians are reported. On two cores it takes nine minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from measure import Measurement, write_json

from kd.config import ModelConfig, PretrainConfig
from kd.distributed import get_rank, get_world_size, process_group
from kd.model import StudentModel
from kd.openmp import let_threads_sleep
from kd.trainers import PretrainTrainer

ROWS_PER_STEP, ROWS, LENGTH, VOCABULARY = 32, 8, 128, 4096
WARM_UP_STEPS, STEPS = 20, 60
MODEL = ModelConfig(128, 3, 4, 2, 512, VOCABULARY, LENGTH, 10000.0)


@dataclass(frozen=True)
class Variant:
    """So many processes, and how they share the work."""

    processes: int
    threads: int
    """CPU threads of each."""
    strategy: str = "ddp"

    @property
    def name(self) -> str:
        """Return what the table calls it."""
        how = f", {self.strategy}" if self.processes > 1 else ""
        return f"{self.processes} process{'es' * (self.processes > 1)}{how}, {self.threads} threads"

    def command(self) -> list[str]:
        """Return the command that measures it once."""
        own = [__file__, "--strategy", self.strategy, "--device", "cpu"]
        if self.processes == 1:
            return [sys.executable, *own, "--alone"]
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={self.processes}",
            *own,
        ]


VARIANTS = (Variant(1, 1), Variant(1, 2), Variant(2, 1), Variant(2, 1, "fsdp"))
REFERENCE = VARIANTS[1]


class StepClock:
    """Notes when each optimizer step ends; what `train` does besides costs nothing here."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.times: list[float] = []

    def __call__(self, *_: Any) -> None:
        """Note the time; an optimizer's hook."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.times.append(time.perf_counter())

    @property
    def tokens_per_second(self) -> float:
        """Return the rate over the steps after the first ones."""
        seconds = self.times[STEPS - 1] - self.times[WARM_UP_STEPS - 1]
        return (STEPS - WARM_UP_STEPS) * ROWS_PER_STEP * LENGTH / seconds


def train_once(strategy: str, device_name: str) -> None:
    """Train in the processes of torchrun, or in this one; the first process prints its rate as a line of JSON."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (STEPS * ROWS_PER_STEP, LENGTH + 1), generator=generator)
    batches = [
        {"input_ids": rows[:, :-1], "labels": rows[:, 1:], "block_id": torch.arange(len(rows))}
        for rows in torch.split(tokens, ROWS)
    ]
    device = torch.device(device_name) if device_name != "auto" else None
    with process_group(device) as own_device, tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = PretrainConfig(
            batch_size=ROWS,
            gradient_accumulation_steps=max(1, ROWS_PER_STEP // ROWS // get_world_size()),
            num_epochs=1,
            max_steps=STEPS,
            eval_interval=10 * STEPS,
            save_interval=10 * STEPS,
            strategy=strategy,
        )
        model = StudentModel(MODEL)
        trainer = PretrainTrainer(model, None, batches, config=config, device=own_device, run_dir=Path(folder))
        clock = StepClock(own_device)
        trainer.optimizer.register_step_post_hook(clock)
        trainer.train()
        if get_rank() == 0:
            print(json.dumps({"tokens_per_second": clock.tokens_per_second}), flush=True)


def measure_once(variant: Variant) -> float:
    """Return the tokens a second of a variant's processes.

    Raises:
        RuntimeError: if they end in an error.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(variant.threads)} | let_threads_sleep(os.environ)
    ended = subprocess.run(variant.command(), env=environment, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise RuntimeError(f"{variant.name} ended with {ended.returncode}:\n{ended.stderr}")
    line = next(line for line in ended.stdout.splitlines() if line.startswith("{"))
    return float(json.loads(line)["tokens_per_second"])


def compare(rounds: int) -> list[Measurement]:
    """Measure all variants in turn; seconds are those of a thousand tokens."""
    results = [Measurement(variant.name) for variant in VARIANTS]
    for _ in range(rounds):
        for variant, result in zip(VARIANTS, results, strict=True):
            result.seconds.append(1000 / measure_once(variant))
    return results


def report(results: Sequence[Measurement]) -> None:
    """Print the table."""
    reference = next(result for result in results if result.name == REFERENCE.name)
    print(f"{'':<32}{'tokens/s':>10}{'spread':>8}{'  / ' + REFERENCE.name}")
    for result in results:
        rate, ratio = 1000 / result.median, reference.median / result.median
        print(f"{result.name:<32}{rate:>10.0f}{result.spread:>8.0%}{ratio:>10.2f}")


def main() -> None:
    """Measure one variant under torchrun, or compare all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="ddp", choices=["ddp", "fsdp"], help="under torchrun")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu"], help="under torchrun")
    parser.add_argument("--rounds", type=int, default=3, help="measured repetitions of each variant")
    parser.add_argument("--name", default="processes-cpu", help="of the result file")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone or "RANK" in os.environ:
        train_once(args.strategy, args.device)
        return
    results = compare(args.rounds)
    report(results)
    settings = {"rounds": args.rounds, "rows": ROWS_PER_STEP, "length": LENGTH, "model": asdict(MODEL)}
    write_json(args.name, settings, [asdict(result) | {"median_seconds": result.median} for result in results])


if __name__ == "__main__":
    main()
