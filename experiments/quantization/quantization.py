"""What do int8 and int4 cost in quality: rounded after training, and trained for it?

    python -m kd.train -m quantization=none,int8,int4 seed=0,1,2 name=quantization threads=1 \
        train.alpha=1 train.temperature=1 train.learning_rate=0.001
    python experiments/quantization/quantization.py [outputs/quantization]

Each run without quantization is rounded as it is (post-training quantization), by both presets, and compared with the
runs of its seed that were trained for the preset and then turned into integers: the same blocks, the same layers.
Prints a Markdown table and writes a row a model to quantization.csv in the working directory.
"""

import json
import sys
from pathlib import Path

import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from kd.analysis import load_runs
from kd.attempt import AnyTrainer, make_trainer
from kd.checkpoint import load_weights
from kd.checkpoint_files import find_checkpoint
from kd.composition import conf_dir, register_schemas, to_config
from kd.config import IntegerConfig
from kd.plan import Plan, make_plan
from kd.prepare import Parts, build_parts
from kd.quantization import quantize
from kd.stop import StopSignal

PRESETS = {"int8": IntegerConfig(8), "int4": IntegerConfig(4, 32)}
LIMITS = {"int8": 0.02, "int4": 0.08}
"""What training for a preset may cost, as a share of the perplexity without it."""


def plan_of(run: Path) -> Plan:
    """Return the plan of a finished run, from the command that it was started by."""
    overrides = list(OmegaConf.load(run / ".hydra" / "overrides.yaml"))
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return make_plan(to_config(compose("config", overrides=overrides)))


def scores(trainer: AnyTrainer, parts: Parts) -> dict[str, float]:
    """Return the perplexities on both held-out parts."""
    assert parts.test_loader is not None
    loaders = {"val_ppl": parts.val_loader, "test_ppl": parts.test_loader}
    found = {name: trainer.score(loader, with_teacher=False).metrics() for name, loader in loaders.items()}
    return {name: float(metrics["val_ppl"] or 0) for name, metrics in found.items()}


def rounded_afterwards(run: Path, preset: str) -> dict[str, float]:
    """Return the perplexities of a run's model, rounded as it is."""
    plan = plan_of(run)
    if plan.config.threads is not None:
        torch.set_num_threads(plan.config.threads)
    parts = build_parts(plan, StopSignal())
    trainer = make_trainer(plan, parts, run)
    load_weights(find_checkpoint(run), parts.student)
    quantize(parts.student, PRESETS[preset])
    return scores(trainer, parts)


def read(folder: Path) -> pd.DataFrame:
    """Return a row a model: how it was made, preset, seed, val_ppl, test_ppl."""
    rows = []
    for run in load_runs(folder).runs.query("state == 'done'").to_dict("records"):
        directory, seed = Path(run["directory"]), int(run["seed"])
        result = json.loads((directory / "result.json").read_text())
        integers = json.loads((directory / "environment.json").read_text())["identity"].get("quantization")
        if integers is None:
            plain = {name: result[name] for name in ("val_ppl", "test_ppl")}
            rows.append({"made": "float32", "preset": "", "seed": seed, **plain})
            for preset in PRESETS:
                after = rounded_afterwards(directory, preset)
                rows.append({"made": "rounded after training", "preset": preset, "seed": seed, **after})
        else:
            trained = {name: result[f"quantized_{name}"] for name in ("val_ppl", "test_ppl")}
            preset = f"int{integers['weight_bits']}"
            rows.append({"made": "trained for it", "preset": preset, "seed": seed, **trained})
    return pd.DataFrame(rows).sort_values(["preset", "made", "seed"], ignore_index=True)


def table(models: pd.DataFrame) -> str:
    """Return the comparison as a Markdown table; costs are paired by seed."""
    plain = models[models["preset"] == ""].set_index("seed")
    lines = [
        "| weights | made | seeds | validation perplexity | cost, validation | cost, test | allowed |",
        "|---|---|---|---|---|---|---|",
    ]
    for (preset, made), own in models.groupby(["preset", "made"], sort=False):
        by_seed = own.set_index("seed")
        costs = {part: by_seed[part] / plain[part] - 1 for part in ("val_ppl", "test_ppl")}
        shown = [f"{cost.mean():+.1%} ({', '.join(f'{x:+.1%}' for x in cost.sort_index())})" for cost in costs.values()]
        allowed = f"{LIMITS[str(preset)]:.0%}" if made == "trained for it" else ""
        spread = f" +- {own['val_ppl'].std():.1f}" if len(own) > 1 else ""
        ppl = f"{own['val_ppl'].mean():.1f}{spread}"
        lines.append(
            f"| {preset or 'float32'} | {made if preset else ''} | {len(own)} | {ppl} "
            f"| {shown[0] if preset else ''} | {shown[1] if preset else ''} | {allowed} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    register_schemas()
    models = read(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/quantization"))
    models.to_csv("quantization.csv", index=False)
    print(table(models))
