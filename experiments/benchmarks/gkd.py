"""TRL's GKDTrainer on fixed data, set up to compute what DistillationTrainer does at alpha 1 and temperature 1.

Its loss knows no cross-entropy and no temperature, whatever is configured: `GKDConfig.temperature` is for sampling.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl.experimental.gkd import (  # type: ignore[import-not-found, unused-ignore]
    GKDConfig,
    GKDTrainer,
)

EOS = "<eos>"


def to_batch(input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return a batch as GKDTrainer takes it.

    Args:
        input_ids: (B, L).
        labels: (B, L) next-token targets, -100 where there is none. GKDTrainer shifts by itself and has no target for
            the last position, so that the last must be -100.
    """
    shifted = torch.cat((torch.full_like(labels[:, :1], -100), labels[:, :-1]), dim=1)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": shifted}


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack rows of a data set."""
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def make_gkd_trainer(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    learning_rate: float,
    output_dir: Path,
    *,
    use_cpu: bool,
) -> GKDTrainer:
    """Return a trainer with lmbda 0 (the data as they are) and beta 0 (forward KL) that goes through `batches` once.

    Its own fused AdamW, at a constant rate without decay; weights as they are given (its default is bfloat16 autocast);
    no gradient checkpointing (its default is to use it); no checkpoints; `train` logs each step.

    Args:
        student: The model that is trained.
        teacher: The frozen one.
        batches: As `to_batch` returns them, all of one shape.
        learning_rate: Of all steps.
        output_dir: A folder that the library wants; nothing is left there.
        use_cpu: Whether to stay off a GPU.
    """
    config = GKDConfig(
        output_dir=str(output_dir),
        lmbda=0.0,
        beta=0.0,
        per_device_train_batch_size=len(batches[0]["input_ids"]),
        max_steps=len(batches),
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=use_cpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
    )
    rows = {name: torch.cat([batch[name] for batch in batches]).tolist() for name in batches[0]}
    return GKDTrainer(
        student,
        teacher_model=teacher,
        args=config,
        data_collator=collate,
        train_dataset=Dataset.from_dict(rows),
        processing_class=_any_tokenizer(),
    )


def _any_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer for the library to hold; it has no text to read."""
    words = Tokenizer(WordLevel({EOS: 0}, unk_token=EOS))
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words, eos_token=EOS, pad_token=EOS
    )
    return tokenizer
