"""What does half precision cost in quality, and what does it save in time and memory?

    python -m kd.train -m name=precision train.precision=float32,bfloat16,float16 seed=0,1,2
    python experiments/precision/precision.py [outputs/precision]

Prints a row a precision: final validation loss (mean and standard deviation over seeds), its relative difference to
float32's (seed by seed), tokens per second (median over log intervals and seeds) and peak memory of the process. Let
the runs have the machine for themselves, one after the other: speed is part of the question.
"""

import json
import statistics
import sys
from pathlib import Path

import pandas as pd

from kd.analysis import load_runs

PRECISIONS = ("float32", "bfloat16", "float16")
GIB = 2**30


def read(folder: Path) -> pd.DataFrame:
    """Return a row a finished run: precision, seed, val_loss, tokens_per_second, peak_bytes."""
    rows = []
    for run in load_runs(folder).runs.query("state == 'done'").to_dict("records"):
        directory = Path(run["directory"])
        identity = json.loads((directory / "environment.json").read_text())["identity"]
        timing = json.loads((directory / "history.json").read_text())["timing"]
        rows.append(
            {
                "precision": identity["train"].get("precision", "float32"),
                "seed": run["seed"],
                "val_loss": run["val_loss"],
                # The first interval also starts everything up.
                "tokens_per_second": statistics.median(timing["tokens_per_second"][1:]),
                "peak_bytes": timing["peak_memory_bytes"],
            }
        )
    return pd.DataFrame(rows)


def table(runs: pd.DataFrame) -> str:
    """Return the comparison as a Markdown table."""
    losses = runs.pivot_table(index="seed", columns="precision", values="val_loss")
    lines = [
        "| precision | runs | validation loss | difference to float32 | tokens/s | peak memory, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for precision in [name for name in PRECISIONS if name in losses]:
        own = runs[runs["precision"] == precision]
        difference = (
            (losses[precision] / losses["float32"] - 1) if "float32" in losses else losses[precision] * float("nan")
        )
        spread = f" +- {own['val_loss'].std():.4f}" if len(own) > 1 else ""
        lines.append(
            f"| {precision} | {len(own)} | {own['val_loss'].mean():.4f}{spread} "
            f"| {difference.mean():+.3%} (at most {difference.abs().max():.3%}) "
            f"| {own['tokens_per_second'].median():,.0f} | {own['peak_bytes'].max() / GIB:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(read(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/precision"))))
