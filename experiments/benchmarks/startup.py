"""How soon does the command line answer, and how soon does a run take its first step?

    python experiments/benchmarks/startup.py

Every measurement is a whole process, from its start to its end: `--help` beside that of a Hydra application with four
groups and nothing else; a refused command and the skip of a finished run; and a warm run (tokenizer, blocks, teacher
and its hidden states are cached) to the end of its first optimizer step, beside the import of the libraries that any
such program needs. The sizes are the embedded default's; that the teacher is hardly trained changes no time here.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from measure import RESULTS, Measurement, write_json

CHECKOUT = Path(__file__).resolve().parents[2]
EMPTY_HELP, KD_HELP = "empty Hydra app --help", "kd --help"
TORCH, LIBRARIES = "import torch", "import torch, transformers"
REFUSAL, SKIP, FIRST_STEP = "kd refusal", "kd skip", "kd warm run to first step"
BARS = ((KD_HELP, EMPTY_HELP, 1.2), (FIRST_STEP, LIBRARIES, 2.5))
"""A variant takes at most so many times as long as another."""
EMPTY_APP = """
import hydra
from omegaconf import DictConfig

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    pass

main()
"""
STEPPED = 99
"""Exit code of a process that ends itself right after its first optimizer step."""
STOP_AFTER_A_STEP = f"""
import os
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *_: os._exit({STEPPED}))
from kd.train import main
main()
"""
TRAIN = ("-m", "kd.train")
RUN = ("data.sample_size=2_000_000", "data.max_eval_blocks=64", "train.num_epochs=1", "teacher.train.max_steps=20")


@dataclass(frozen=True)
class Command:
    """A variant: what Python is given, and how it must end."""

    name: str
    arguments: tuple[str, ...]
    exit_code: int = 0


COMMANDS = (
    Command(EMPTY_HELP, ("empty.py", "--help")),
    Command(KD_HELP, (*TRAIN, "--help")),
    Command(REFUSAL, (*TRAIN, "data=text", "data.path=missing"), 4),
    Command(SKIP, (*TRAIN, *RUN)),
    Command(TORCH, ("-c", TORCH)),
    Command(LIBRARIES, ("-c", LIBRARIES)),
    # A run that was stopped in this way has saved nothing: in the next round it starts afresh.
    Command(FIRST_STEP, ("-c", STOP_AFTER_A_STEP, *RUN, "name=first_step"), STEPPED),
)


def prepare(folder: Path) -> None:
    """Write the empty application and do the run that fills the cache and is then skipped."""
    (folder / "empty.py").write_text(EMPTY_APP)
    groups = ("model", "train", "data", "teacher")
    for group in groups:
        (folder / "conf" / group).mkdir(parents=True)
        for option in ("one", "two"):
            (folder / "conf" / group / f"{option}.yaml").write_text(f"value: {option}\n")
    defaults = "".join(f"  - {group}: one\n" for group in groups)
    (folder / "conf" / "config.yaml").write_text(f"defaults:\n{defaults}  - _self_\n")
    print("Preparing: one short run fills the cache ...", flush=True)
    seconds(Command("the preparing run", (*TRAIN, *RUN)), folder)


def seconds(command: Command, folder: Path) -> float:
    """Return the wall time of a process, from before its start to after its end.

    Raises:
        RuntimeError: if it ends in another way than it should.
    """
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1"}
    environment.pop("KD_CACHE", None)
    started = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, *command.arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    elapsed = time.perf_counter() - started
    if ended.returncode != command.exit_code:
        raise RuntimeError(f"{command.name} ended with {ended.returncode}, not {command.exit_code}:\n{ended.stderr}")
    return elapsed


def measure(folder: Path, rounds: int) -> list[Measurement]:
    """Time all commands in turn; a first round, which writes byte code and fills the file cache, does not count."""
    results = [Measurement(command.name) for command in COMMANDS]
    for number in range(rounds + 1):
        for command, result in zip(COMMANDS, results, strict=True):
            elapsed = seconds(command, folder)
            if number > 0:
                result.seconds.append(elapsed)
    return results


def report(results: Sequence[Measurement]) -> dict[str, float]:
    """Print times and ratios, each ratio beside its bar; return the ratios by name."""
    print(f"{'':<28}{'seconds':>9}{'spread':>8}")
    for result in results:
        print(f"{result.name:<28}{result.median:>9.2f}{result.spread:>8.0%}")
    median = {result.name: result.median for result in results}
    ratios = {}
    for name, reference, bar in BARS:
        ratio = ratios[f"{name} / {reference}"] = median[name] / median[reference]
        print(f"{name} / {reference}: {ratio:.2f}, at most {bar}: {'held' if ratio <= bar else 'MISSED'}")
    return ratios


def plot(path: Path, results: Sequence[Measurement]) -> None:
    """Draw the medians, and each bar as a line across the variant that it holds for."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [result.name for result in reversed(results)]
    median = {result.name: result.median for result in results}
    figure, axes = plt.subplots(figsize=(8, 3))
    axes.barh(names, [median[name] for name in names], color="tab:blue")
    for name, reference, bar in BARS:
        row = names.index(name)
        axes.vlines(bar * median[reference], row - 0.45, row + 0.45, color="tab:red")
    axes.set_xlabel("median seconds; red: the most that is allowed")
    axes.set_title("Start-up, whole processes", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    """Measure, print and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="measured repetitions of each command")
    parser.add_argument("--name", default="startup-cpu", help="of the result files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        results = measure(folder, args.rounds)
    ratios = report(results)
    rows = [asdict(result) | {"median_seconds": result.median} for result in results]
    write_json(args.name, {"rounds": args.rounds, "run": RUN, "ratios": ratios}, rows)
    plot(RESULTS / f"{args.name}.png", results)


if __name__ == "__main__":
    main()
