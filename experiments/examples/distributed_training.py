"""Train in several processes with the real trainer: a language model of a text, byte by byte.

    torchrun --standalone --nproc-per-node=2 experiments/examples/distributed_training.py [ddp|fsdp]

Without torchrun the same script trains in one process, with as many rows to an optimizer step.
"""

import argparse
import sys
from pathlib import Path

import torch

from kd.config import ModelConfig, PretrainConfig
from kd.distributed import get_rank, get_world_size, process_group
from kd.model import StudentModel
from kd.trainers import PretrainTrainer

ROWS_PER_STEP, ROWS = 16, 4


def main(strategy: str = "ddp") -> None:
    """Train on a module of the standard library; print the loss on its last part."""
    tokens = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    rows = tokens[: len(tokens) // 65 * 65].view(-1, 65)  # 64 inputs and, one further on, their 64 targets
    # All processes are given the same batches; the trainer deals them out.
    batches = [
        {"input_ids": x[:, :-1], "labels": x[:, 1:], "block_id": torch.arange(len(x))} for x in torch.split(rows, ROWS)
    ]
    with process_group() as device:  # cuda:LOCAL_RANK, or the CPU
        torch.manual_seed(0)
        model = StudentModel(ModelConfig(64, 2, 4, 2, 128, vocab_size=256, max_seq_len=64, rope_theta=10000.0))
        accumulation = ROWS_PER_STEP // ROWS // get_world_size()
        config = PretrainConfig(
            batch_size=ROWS,
            gradient_accumulation_steps=accumulation,
            learning_rate=3e-3,
            warmup_steps=20,
            num_epochs=2,
            strategy=strategy,
        )
        run_dir = Path("outputs/examples/distributed_training")
        trainer = PretrainTrainer(
            model, None, batches[:-40], batches[-40:], config=config, device=device, run_dir=run_dir
        )
        before = trainer.evaluate()["val_loss"]
        after = trainer.train()["val_loss"][-1]
        if get_rank() == 0:  # all have the same figures
            print(f"{get_world_size()} processes, {strategy}: loss {before:.3f} before, {after:.3f} after")


if __name__ == "__main__":
    main(*sys.argv[1:])
