"""The embedded teacher: a small model of the student's family, trained once on the training part and cached."""

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from kd.cache import cached_directory
from kd.checkpoint import load_model_file, save_model_file
from kd.checkpoint_files import MODEL_FILE, latest_checkpoint
from kd.config import EmbeddedTeacherConfig
from kd.data import PackedBlocks, eval_loader, train_loader
from kd.distributed import alone, seed_everything
from kd.files import write_text
from kd.model import StudentModel
from kd.stop import StopSignal
from kd.teacher import LiveTeacher
from kd.trainers import PretrainTrainer

log = logging.getLogger("kd")


def load_embedded_teacher(
    config: EmbeddedTeacherConfig, fingerprint: str, blocks: Path, device: torch.device, stop: StopSignal
) -> LiveTeacher:
    """Open the cached teacher, training it first if there is none. An interrupted training goes on.

    Args:
        config: Architecture and training.
        fingerprint: Its key in the cache.
        blocks: The packed blocks' directory.
        device: Where it is trained and runs.
        stop: Asked between steps whether to stop.
    """

    def build(work: Path) -> None:
        with alone():  # other processes wait for the cache
            _train(config, blocks, device, stop, work)

    directory = cached_directory("teachers", fingerprint[:32], build, "the embedded teacher")
    model = StudentModel(config.model)
    load_model_file(directory / MODEL_FILE, model)
    return LiveTeacher(model, device)


def _train(config: EmbeddedTeacherConfig, blocks: Path, device: torch.device, stop: StopSignal, work: Path) -> None:
    log.info("Training the embedded teacher, once: every later run reads it from the cache")
    seed_everything(config.seed)
    trainer = PretrainTrainer(
        StudentModel(config.model),
        train_loader=train_loader(PackedBlocks(blocks, "train"), config.train.batch_size, config.seed),
        val_loader=eval_loader(PackedBlocks(blocks, "validation"), config.train.batch_size),
        config=config.train,
        device=device,
        run_dir=work,
    )
    trainer.stop = stop
    checkpoints = work / config.train.checkpoint_dir
    if (checkpoint := latest_checkpoint(checkpoints)) is not None:
        trainer.load_checkpoint(checkpoint)
    trainer.train()
    save_model_file(work / MODEL_FILE, trainer.model)
    write_text(work / "config.json", json.dumps(asdict(config), indent=2) + "\n")
    shutil.rmtree(checkpoints)
