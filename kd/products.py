"""What a run gives besides its checkpoints: merged weights where adapters trained, integer ones where it was for them.

Each function changes the trainer's model into what it writes, so call it when all else is done.
"""

import logging
from typing import Any

from kd.adapters import merge_adapters
from kd.checkpoint import holds_adapters, save_model_file
from kd.checkpoint_files import MERGED, MODEL_FILE, QUANTIZED
from kd.config import IntegerConfig
from kd.files import publish_directory, remove_leftovers
from kd.prepare import Loader
from kd.quantization import save_quantized, to_integers
from kd.trainers import BaseTrainer

log = logging.getLogger("kd")


def merge_into_weights(trainer: BaseTrainer[Any]) -> None:
    """Write the model with what its adapters have learned in its weights; a model without any is left alone."""
    if not holds_adapters(trainer.model):
        return
    assert trainer.run_dir is not None
    merge_adapters(trainer.model)
    if trainer.is_main:
        remove_leftovers(trainer.run_dir)
        with publish_directory(trainer.run_dir / MERGED) as folder:
            save_model_file(folder / MODEL_FILE, trainer.model)


def turn_into_integers(trainer: BaseTrainer[Any], config: IntegerConfig, test_loader: Loader | None) -> None:
    """Write the model with integer weights, and enter its scores into the history as `quantized_val_*` and `_test_*`.

    Args:
        trainer: At its end.
        config: What was trained for.
        test_loader: The test part, if there is any.
    """
    assert trainer.run_dir is not None
    to_integers(trainer.model, config)
    if trainer.is_main:
        remove_leftovers(trainer.run_dir)
        save_quantized(trainer.run_dir / QUANTIZED, trainer.model, config)
    for part, loader in (("val", trainer.val_loader), ("test", test_loader)):
        if loader is not None:
            trainer.record_part(f"quantized_{part}", trainer.score(loader, with_teacher=False))
