"""Measure variants of one computation side by side.

Each variant lives in a process of its own, prepared once and then asked in turn for one repetition: whatever else the
machine does meanwhile hits all of them alike, and no variant profits from another's warm memory. Medians are reported.
Where they do not fit into memory together, each round starts them anew, one after the other.
"""

import argparse
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kd.openmp import let_threads_sleep

RESULTS = Path(__file__).parent / "results"
PEAK_FILE = Path("/proc/self/status")
CPU_FILE = Path("/proc/cpuinfo")
MIB = 2**20


@dataclass
class Measurement:
    """What repetitions of one variant gave."""

    name: str
    seconds: list[float] = field(default_factory=list)
    """Wall time of each repetition."""
    extra_bytes: int = 0
    """Most memory taken beyond the inputs, or by the whole process (resident on a CPU, allocated on CUDA)."""
    value: float | None = None
    """What the variant computed, to compare."""
    skipped: str = ""
    """Why there is no measurement; empty if there is one."""

    @property
    def median(self) -> float:
        """Median wall time in seconds; NaN if there is none."""
        return statistics.median(self.seconds) if self.seconds else float("nan")

    @property
    def spread(self) -> float:
        """(Slowest - fastest) / median: how noisy the machine was."""
        return (max(self.seconds) - min(self.seconds)) / self.median if self.seconds else float("nan")


def serve(
    prepare: Callable[[], Callable[[], float]],
    device: torch.device,
    *,
    count_whole_process: bool = False,
    unmeasured: int = 0,
) -> None:
    """Answer each line of standard input with one measured repetition, as a line of JSON; the child's side.

    Args:
        prepare: makes the inputs and returns the repetition; a ModuleNotFoundError in it skips the variant.
        device: where it runs.
        count_whole_process: count memory from nothing, with libraries, inputs and their preparation.
        unmeasured: repetitions before each measured one. While other variants have their turn, a machine may give away
            what this one's memory and caches held; in a training loop a step follows a step.
    """
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print too
    try:
        repetition = prepare()
    except ModuleNotFoundError as error:
        print(json.dumps({"skipped": f"{error.name} is not installed"}), file=answers, flush=True)
        return
    _warm_up(device)
    base = 0 if count_whole_process else _reset_peak(device)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for _ in sys.stdin:
        for _ in range(unmeasured):
            repetition()
        _synchronize(device)
        start = time.perf_counter()
        value = repetition()
        _synchronize(device)
        seconds = time.perf_counter() - start
        answer = {"seconds": seconds, "extra": _peak(device) - base, "value": value}
        print(json.dumps(answer), file=answers, flush=True)


def compare(
    script: str, variants: Sequence[str], arguments: Sequence[str], rounds: int, *, one_at_a_time: bool = False
) -> list[Measurement]:
    """Run `script --variant NAME arguments` for every variant, one repetition of each in turn, `rounds` times.

    A process's first repetition warms up: it counts for memory, not for time. With `one_at_a_time` each round starts
    the processes anew, so that only one of them takes memory; else all stay for all rounds.
    """
    commands = {name: [sys.executable, script, "--variant", name, *arguments] for name in variants}
    if not one_at_a_time:
        return _compare_side_by_side(commands, rounds)
    results = [Measurement(name) for name in variants]
    for _ in range(rounds):
        for result in results:
            (once,) = _compare_side_by_side({result.name: commands[result.name]}, 1)
            result.skipped = once.skipped
            result.seconds += once.seconds
            result.extra_bytes, result.value = max(result.extra_bytes, once.extra_bytes), once.value
    return results


def _compare_side_by_side(commands: dict[str, list[str]], rounds: int) -> list[Measurement]:
    results = [Measurement(name) for name in commands]
    children = [_start(command) for command in commands.values()]
    try:
        for child, result in zip(children, results, strict=True):
            result.skipped = str(_answer(child, result.name).get("skipped", ""))
        running = [pair for pair in zip(children, results, strict=True) if not pair[1].skipped]
        turns = [(is_warm_up, pair) for is_warm_up in (True, *[False] * rounds) for pair in running]
        for is_warm_up, (child, result) in tqdm(turns, unit="repetition", leave=False):
            _measure_once(child, result, is_warm_up)
    finally:
        for child in children:
            child.terminate()
            child.wait()
    return results


def _start(command: list[str]) -> "subprocess.Popen[str]":
    # As kd.train does: otherwise idle threads spin, and any other work on the machine slows a variant manifold.
    environment = {**os.environ, **let_threads_sleep(os.environ)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _measure_once(child: "subprocess.Popen[str]", result: Measurement, is_warm_up: bool) -> None:
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()
    answer = _answer(child, result.name)
    result.extra_bytes = max(result.extra_bytes, answer["extra"])
    result.value = answer["value"] if math.isfinite(answer["value"]) else None  # the bare products have none
    if not is_warm_up:
        result.seconds.append(answer["seconds"])


def _answer(child: "subprocess.Popen[str]", name: str) -> dict[str, Any]:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise RuntimeError(f"The process of variant {name} ended without an answer (exit code {child.wait()}).")
    answer: dict[str, Any] = json.loads(line)
    return answer


def _warm_up(device: torch.device) -> None:
    """Start thread pools and libraries, so that their memory is not taken for the variant's."""
    small = torch.randn(256, 256, device=device, requires_grad=True)
    (small @ small).exp().log_softmax(-1).sum().backward()  # type: ignore[no-untyped-call]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> int:
    """Forget the highest memory so far; return the present one in bytes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
    return _peak(device)


def _peak(device: torch.device) -> int:
    """Return the highest memory in bytes.

    Not getrusage's: that of a child starts at what its parent had when it forked.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    line = next(line for line in PEAK_FILE.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def table(results: Sequence[Measurement], reference: str, floor: str) -> str:
    """Return the results as text: time, its ratio to the reference and to the floor, and memory."""
    by_name = {result.name: result for result in results}
    base, lowest = by_name[reference], by_name[floor]
    lines = [f"{'variant':<28}{'ms':>9}{'spread':>8}{'/ floor':>9}{'/ ' + reference:>9}{'MiB':>8}{'/ ' + reference:>9}"]
    for result in results:
        if result.skipped:
            lines.append(f"{result.name:<28}  skipped: {result.skipped}")
            continue
        lines.append(
            f"{result.name:<28}{result.median * 1e3:>9.1f}{result.spread:>8.0%}{result.median / lowest.median:>9.2f}"
            f"{result.median / base.median:>9.2f}{result.extra_bytes / MIB:>8.0f}"
            f"{result.extra_bytes / max(base.extra_bytes, 1):>9.2f}"
        )
    return "\n".join(lines)


def save(
    name: str,
    settings: dict[str, Any],
    results: Sequence[Measurement],
    title: str,
    memory_label: str = "extra peak memory, MiB",
) -> None:
    """Write results/NAME.json and results/NAME.png."""
    rows = [asdict(result) | {"median_seconds": result.median if result.seconds else None} for result in results]
    write_json(name, settings, rows)
    _plot(RESULTS / f"{name}.png", results, title, memory_label)


def write_json(name: str, settings: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write results/NAME.json: what was measured, where, and how."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    machine = {"processor": _processor(), "torch": torch.__version__, "python": platform.python_version()}
    text = json.dumps({"settings": settings, "machine": machine, "results": list(rows)}, indent=1, allow_nan=False)
    (RESULTS / f"{name}.json").write_text(text + "\n")


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{_cpu_model()} {capability}, {torch.get_num_threads()} threads"


def _cpu_model() -> str:
    """Name the CPU; on Linux by family and model too, since virtual machines often hide the generation in the name."""
    if not CPU_FILE.exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in CPU_FILE.read_text().split("\n\n")[0].splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    if "model name" not in fields:
        return platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"


def _plot(path: Path, results: Sequence[Measurement], title: str, memory_label: str) -> None:
    """Draw bars of time and of memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [result for result in reversed(results) if not result.skipped]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 0.35 * len(shown) + 1.2), sharey=True)
    names = [result.name for result in shown]
    left.barh(names, [result.median for result in shown], color="tab:blue")
    left.set_xlabel("median seconds")
    right.barh(names, [result.extra_bytes / MIB for result in shown], color="tab:orange")
    right.set_xlabel(memory_label)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --device, --dtype, --threads, --rounds and, for child processes, --variant."""
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each process")
    parser.add_argument("--rounds", type=int, default=5, help="measured repetitions of each variant")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
