"""Supervised fine-tuning: cross-entropy on the answers."""

from kd.config import SFTConfig
from kd.losses import IGNORE_INDEX
from kd.trainers.answers import pad_on_the_right
from kd.trainers.language_model import LanguageModelTrainer
from kd.trainers.state import Batch


class SFTTrainer(LanguageModelTrainer[SFTConfig]):
    """Train a language model on answers.

    Batches hold `input_ids` and `labels` (B, L), -100 where the target is a prompt or padding token, and optionally
    `attention_mask` (B, L), 0 at padding on either side.
    """

    config_class = SFTConfig

    def _prepare_batch(self, batch: Batch) -> Batch:
        prepared = super()._prepare_batch(batch)
        mask = prepared.pop("attention_mask", None)
        if mask is not None:
            # Padding on the left ends where an answer without a prompt begins: nothing predicts its first token.
            labels = prepared["labels"].masked_fill(mask == 0, IGNORE_INDEX)
            # With padding on the right a causal model needs no mask.
            inputs, labels = pad_on_the_right(mask, prepared["input_ids"], labels)
            prepared |= {"input_ids": inputs, "labels": labels}
        return prepared
