"""What a run gives besides its checkpoints: merged weights where adapters trained, integer ones where it was for them.

Each function changes the trainer's model into what it writes or scores, so call it when all else is done.
"""

from typing import Any

from kd.adapters import merge_adapters
from kd.checkpoint import holds_adapters, save_model_file
from kd.checkpoint_files import MERGED, MODEL_FILE, QUANTIZED
from kd.config import IntegerConfig, QuantizationConfig
from kd.files import publish_directory
from kd.prepare import Loader
from kd.quantization import save_quantized, to_integers
from kd.trainers import BaseTrainer


def turn_into_integers(trainer: BaseTrainer[Any], config: IntegerConfig, test_loader: Loader | None) -> None:
    """Give the model integer weights, and enter its scores into the history as `quantized_val_*` and `_test_*`.

    Of several processes all must call it.

    Args:
        trainer: At its end.
        config: What was trained for.
        test_loader: The test part, if there is any.
    """
    to_integers(trainer.model, config)
    for part, loader in (("val", trainer.val_loader), ("test", test_loader)):
        if loader is not None:
            trainer.record_part(f"quantized_{part}", trainer.score(loader, with_teacher=False))


def write_products(trainer: BaseTrainer[Any], quantization: QuantizationConfig) -> None:
    """Write the merged model where adapters trained, or the one of integer weights after `turn_into_integers`.

    Of several processes the first one alone must call it: the others need not wait for a disk.
    """
    assert trainer.run_dir is not None
    if holds_adapters(trainer.model):
        merge_adapters(trainer.model)
        with publish_directory(trainer.run_dir / MERGED) as folder:
            save_model_file(folder / MODEL_FILE, trainer.model)
    if isinstance(quantization, IntegerConfig):
        save_quantized(trainer.run_dir / QUANTIZED, trainer.model, quantization)
