"""Makes finished runs without training: losses with document and seed effects of stated size, in the files of a run."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kd.files import digest_of

TEACHER_LOSS = 3.0
CLIP = 1.0


@dataclass
class Sweep:
    """A sweep's text: documents of unequal length in blocks, each with a loss of its own."""

    root: Path = Path("outputs/made")
    documents: int = 12
    document_spread: float = 0.02
    """SD of what a document adds to one setting more than to another, nats per token."""
    seed_spread: float = 0.002
    """SD of what a seed adds to one setting more than to another."""
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def __post_init__(self) -> None:
        blocks = self.random.integers(2, 7, self.documents)
        self.document = np.repeat(np.arange(self.documents), blocks)
        self.tokens = np.full(len(self.document), 32)
        self.common = self.random.normal(0, 0.3, self.documents)

    def add(
        self,
        alpha: float,
        temperature: float,
        loss: float,
        seed: int = 0,
        *,
        test: bool = True,
        test_shift: float = 0.0,
        curves: dict[str, Any] | None = None,
        **train: float | str,
    ) -> Path:
        """Write a finished run whose expected loss is `loss`; return its directory. `curves` replaces series."""
        settings = f"alpha{alpha:g}" + (f"-temperature{temperature:g}" if alpha else "")
        digest = digest_of([settings, seed, train])[:8]
        directory = self.root / f"{settings}-seed{seed}-{digest}"
        directory.mkdir(parents=True)
        noise = self.random.normal(0, self.seed_spread)
        final = self._part(directory / "val_blocks.npy", loss + noise)
        totals: dict[str, Any] = {"teacher_val_ppl": math.exp(TEACHER_LOSS), "tokens": 1000, "flops": 1e9}
        totals["parameters"] = 500
        if test:
            tested = self._part(directory / "test_blocks.npy", loss + noise + test_shift)
            totals |= {"test_loss": tested, "test_ppl": math.exp(tested)}
        self._write_files(directory, final, totals | (curves or {}), _identity(alpha, temperature, seed, train))
        return directory

    def prefer(
        self,
        trainer: str,
        beta: float,
        loss: float,
        accuracy: float,
        seed: int = 0,
        other: dict[str, Any] | None = None,
    ) -> Path:
        """Write a finished run on pairs of answers; return its directory. `other` stands in its identity instead."""
        directory = self.root / f"{trainer}-beta{beta:g}-seed{seed}-{digest_of([other])[:8]}"
        directory.mkdir(parents=True)
        identity = _identity(0.0, 1, seed, {"beta": beta}) | {"trainer": trainer, "max_eval_examples": None}
        del identity["train"]["alpha"], identity["seq_len"], identity["max_eval_blocks"]
        measured = {"loss": loss, "reward_accuracy": accuracy, "log_ratio_margin": 3.0}
        final = {f"val_{name}": value for name, value in measured.items()}
        totals = {f"test_{name}": value for name, value in measured.items()}
        totals |= {"tokens": 1000, "flops": 1e9, "parameters": 500}
        history = {"val_step": [2], **{name: [value] for name, value in final.items()}, **totals}
        environment = {"identity": identity | (other or {}), "process": {"arguments": ["train=dpo"]}}
        result = {"state": "done", "steps": 2, **final, **totals}
        for name, value in (("history", history), ("result", result), ("environment", environment)):
            (directory / f"{name}.json").write_text(json.dumps(value))
        return directory

    def _part(self, path: Path, loss: float) -> float:
        own = self.random.normal(0, self.document_spread, self.documents)
        rates = loss + (self.common + own)[self.document]
        table = np.zeros(len(rates), dtype=[("document", "<i8"), ("tokens", "<i8"), ("nll", "<f8")])
        table["document"], table["tokens"], table["nll"] = self.document, self.tokens, rates * self.tokens
        np.save(path, table)
        return float(table["nll"].sum() / table["tokens"].sum())

    def _write_files(self, directory: Path, final: float, totals: dict[str, Any], identity: dict[str, Any]) -> None:
        losses = [final + 1, final + 0.3, final]
        history = {
            "train_step": [2, 4, 6],
            "train_loss": [5.0, 4.5, 4.2],
            "grad_norm": [2 * CLIP, 0.5 * CLIP, 0.4 * CLIP],
            "val_step": [2, 4, 6],
            "val_loss": losses,
            "val_ppl": [math.exp(loss) for loss in losses],
            "val_kl": [final - 3.5, final - 3.8, final - 3.9],
            "val_agreement": [0.1, 0.2, 0.3],
            "val_bits_per_byte": None,
            "notes": {"val_bits_per_byte": "not measured in this run"},
            "timing": {"wall_seconds": 12.5, "tokens_per_second": [10.0, 11.0, 12.0]},
            **totals,
        }
        result = {"state": "done", "steps": 6, "val_loss": final, "val_ppl": math.exp(final), "best_val_loss": final}
        arguments = ["-m", "train.alpha=0,0.5,1", "name=a b"]
        environment = {"identity": identity, "process": {"arguments": arguments}}
        for name, value in (("history", history), ("result", result | totals), ("environment", environment)):
            (directory / f"{name}.json").write_text(json.dumps(value))


def _identity(alpha: float, temperature: float, seed: int, train: dict[str, float | str]) -> dict[str, Any]:
    values: dict[str, float | str] = {"alpha": alpha, "learning_rate": 3e-3, "gradient_clip": CLIP}
    values |= {"warmup_steps": 20, **train}
    if alpha:
        values["temperature"] = temperature
    return {
        "schema": 1,
        "trainer": "distillation",
        "model": {"hidden_size": 32},
        "train": values,
        "seq_len": 32,
        "max_eval_blocks": None,
        "seed": seed,
        "corpus": "c" * 64,
        "tokenizer": "t" * 64,
        "teacher": "e" * 64 if alpha else None,
    }


def fail(root: Path, name: str, error: str) -> Path:
    """Write a run that failed before it wrote anything but its failure; return its directory."""
    directory = root / name
    directory.mkdir(parents=True)
    (directory / "failure.json").write_text(json.dumps({"error": error, "exit_code": 5, "log": "train.log"}))
    return directory


def make_grid(sweep: Sweep, seeds: int = 3, *, test: bool = True, **train: float) -> None:
    """Write a grid in which alpha 1 at temperature 1 is best, alpha 1 at 2 its near equal, and all else far behind."""
    losses = {(0.0, 1.0): 5.0, (0.5, 1.0): 4.6, (0.5, 2.0): 4.7, (1.0, 1.0): 4.2, (1.0, 2.0): 4.2005}
    for (alpha, temperature), loss in losses.items():
        for seed in range(seeds):
            sweep.add(alpha, temperature, loss, seed, test=test, **train)
