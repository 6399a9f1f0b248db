"""The embedded teacher: a small model of the student's family, trained once on the training part and cached."""

import json
import logging
from dataclasses import asdict
from pathlib import Path

import torch

from kd.cache import cached_directory
from kd.checkpoint import load_model_file, save_model_file
from kd.checkpoint_files import MODEL_FILE, checkpoint_folders, latest_checkpoint
from kd.config import EmbeddedTeacherConfig
from kd.data import PackedBlocks, eval_loader, train_loader
from kd.distributed import alone, seed_everything
from kd.files import digest_of, file_digest, publish_file, remove_path, write_text
from kd.model import StudentModel
from kd.stop import StopSignal
from kd.teacher import LiveTeacher
from kd.trainers import PretrainTrainer

log = logging.getLogger("kd")

CONFIG_FILE = "config.json"


def load_embedded_teacher(
    config: EmbeddedTeacherConfig, fingerprint: str, blocks: Path, device: torch.device, stop: StopSignal
) -> LiveTeacher:
    """Return the cached teacher, training it first if there is none; arguments as of `embedded_teacher_directory`."""
    directory = embedded_teacher_directory(config, fingerprint, blocks, device, stop)
    model = StudentModel(config.model)
    load_model_file(directory / MODEL_FILE, model)
    return LiveTeacher(model, device)


def embedded_teacher_content(config: EmbeddedTeacherConfig, directory: Path) -> str:
    """Return the SHA-256 (hex) of the teacher in a directory: of its weights, which a recipe does not determine.

    The same recipe gives other weights on another CPU, with another version of torch or another number of threads.
    """
    return digest_of({"model": asdict(config.model), "weights": file_digest(directory / MODEL_FILE)})


def embedded_teacher_directory(
    config: EmbeddedTeacherConfig, fingerprint: str, blocks: Path, device: torch.device, stop: StopSignal
) -> Path:
    """Return the cached teacher's directory, training it first if there is none. An interrupted training goes on.

    Args:
        config: Architecture and training.
        fingerprint: Its recipe's.
        blocks: The packed blocks' directory, whose name is a hash of their content.
        device: Where it is trained and runs.
        stop: Asked between steps whether to stop.
    """

    def build(work: Path) -> None:
        # The description is written last: if it is there, only the checkpoints were still to be removed.
        if not (work / CONFIG_FILE).exists():
            with alone():  # other processes wait for the cache
                _train(config, blocks, device, stop, work)
        for folder in checkpoint_folders(work):
            remove_path(folder)

    key = digest_of({"recipe": fingerprint, "blocks": blocks.name})[:32]
    return cached_directory("teachers", key, build, "the embedded teacher")


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
    if (checkpoint := latest_checkpoint(*checkpoint_folders(work))) is not None:
        trainer.load_checkpoint(checkpoint)
    trainer.train()
    with publish_file(work / MODEL_FILE) as temporary:
        save_model_file(temporary, trainer.model)
    write_text(work / CONFIG_FILE, json.dumps(asdict(config), indent=2) + "\n")
