"""A new trainer in a few lines: label smoothing, trained beside plain cross-entropy on the same text.

    python experiments/examples/custom_trainer.py

Source of the loss: Szegedy et al. 2016, arXiv:1512.00567, section 7.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.config import ModelConfig, PretrainConfig
from kd.losses import IGNORE_INDEX, causal_lm_loss
from kd.model import StudentModel
from kd.trainers import PretrainTrainer
from kd.trainers.state import Batch


class LabelSmoothingTrainer(PretrainTrainer):
    """Pre-training towards targets of which a tenth is spread evenly over the vocabulary."""

    def _reason_for_logits(self) -> str:
        return "label smoothing needs every token's probability"  # the loss without logits is cross-entropy alone

    def _compute_loss(self, outputs: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits, labels = outputs.flatten(0, 1), batch["labels"].flatten()
        total = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=0.1)
        # The mean over this batch's targets. The base trainer weighs it by their number when it accumulates.
        smoothed = total / (labels != IGNORE_INDEX).sum().clamp_min(1)
        return smoothed, {"ce_loss": causal_lm_loss(logits.detach(), labels)}


def main() -> None:
    """Train both on a module of the standard library, byte by byte; print their losses on its last part."""
    tokens = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    rows = tokens[: len(tokens) // 65 * 65].view(-1, 65)  # 64 inputs and, one further on, their 64 targets
    batches = [
        {"input_ids": x[:, :-1], "labels": x[:, 1:], "block_id": torch.arange(len(x))} for x in torch.split(rows, 16)
    ]
    for trainer_class in (PretrainTrainer, LabelSmoothingTrainer):
        torch.manual_seed(0)
        model = StudentModel(ModelConfig(64, 2, 4, 2, 128, vocab_size=256, max_seq_len=64, rope_theta=10000.0))
        config = PretrainConfig(learning_rate=3e-3, warmup_steps=20, num_epochs=2)
        run_dir = Path("outputs/examples/custom_trainer") / trainer_class.__name__
        trainer = trainer_class(model, None, batches[:-10], batches[-10:], config=config, run_dir=run_dir)
        before, history = trainer.evaluate()["val_loss"], trainer.train()
        print(
            f"{trainer_class.__name__}: own loss {history['train_loss'][-1]:.3f}, of which cross-entropy "
            f"{history['ce_loss'][-1]:.3f}; validation {before:.3f} before, {history['val_loss'][-1]:.3f} after"
        )


if __name__ == "__main__":
    main()
