"""How a run meets its teacher: live, or through hidden states that are kept on disk."""

import logging
from pathlib import Path

import torch

from kd.config import Config, EmbeddedTeacherConfig, PresentTeacherConfig, TrainingConfig
from kd.data import BlockLoader
from kd.embedded_teacher import embedded_teacher_content, embedded_teacher_directory, load_embedded_teacher
from kd.plan import Plan
from kd.stop import StopSignal
from kd.teacher import LiveTeacher, Teacher, check_teacher, choose_dtype, load_pretrained
from kd.teacher_cache import TeacherCacheKey, has_states, open_cached_teacher
from kd.teacher_files import check_vocabulary
from kd.torchrun import num_processes

log = logging.getLogger("kd")


def teacher_content(plan: Plan, blocks: Path, device: torch.device, stop: StopSignal) -> str | None:
    """Return what identifies the weights of a run's teacher; None where there is none.

    The plan knows a pretrained one by content, the embedded one by its recipe alone: that is trained here if need be.
    Arguments and errors as for `open_teacher`.
    """
    config, fingerprint = plan.config.teacher, plan.fingerprints.teacher
    if fingerprint is None or not isinstance(config, EmbeddedTeacherConfig):
        return fingerprint
    return embedded_teacher_content(config, embedded_teacher_directory(config, fingerprint, blocks, device, stop))


def open_teacher(
    plan: Plan,
    content: str | None,
    blocks: Path,
    train_loader: BlockLoader,
    val_loader: BlockLoader,
    device: torch.device,
    stop: StopSignal,
) -> Teacher | None:
    """Return a run's teacher, also at alpha 0, where evaluations compare with it; None where there is none.

    Args:
        plan: The run.
        content: From `teacher_content`.
        blocks: Directory of the packed blocks.
        train_loader: The training blocks.
        val_loader: The validation blocks.
        device: Where the teacher computes.
        stop: Asked between the steps of an embedded teacher's training whether to stop.

    Raises:
        KDError: of the kind that fits.
    """
    config = plan.config
    if content is None:
        return None
    assert isinstance(config.teacher, PresentTeacherConfig)
    key = TeacherCacheKey(content, _dtype(plan, device))
    parts = [val_loader.dataset]
    if _distils(config):
        parts.append(train_loader.dataset)
    if config.teacher.cache != "off" and has_states(key, parts):
        return open_cached_teacher(key, parts, lambda: _load(plan, blocks, device, stop), device)
    teacher = _load(plan, blocks, device, stop)
    if _runs_live(config, config.teacher.cache, teacher, train_loader):
        batch = next(iter(val_loader))
        check_teacher(teacher, {name: value.to(device) for name, value in batch.items()}, config.model.vocab_size)
        return teacher
    if teacher.head is not None:
        check_vocabulary(teacher.head.vocab_size, config.model.vocab_size)
    return open_cached_teacher(key, parts, lambda: teacher, device)


def _distils(config: Config) -> bool:
    return isinstance(config.train, TrainingConfig) and config.train.alpha > 0


def _runs_live(config: Config, cache: str, teacher: LiveTeacher, train_loader: BlockLoader) -> bool:
    """Return whether not to keep hidden states; says why, if it was left open."""
    if cache == "auto" and teacher.head is None:
        log.info("The teacher runs live; its hidden states cannot stand for its logits: %s", teacher.no_head)
        return True
    if cache == "auto" and _distils(config) and not _takes_an_epoch(config, train_loader):
        log.info(
            "The teacher runs live: train.max_steps=%d ends before all %d training blocks were seen "
            "(teacher.cache=require would keep their hidden states all the same, for later runs)",
            config.train.max_steps,
            len(train_loader.dataset),
        )
        return True
    return cache == "off"


def _takes_an_epoch(config: Config, train_loader: BlockLoader) -> bool:
    """Return whether training sees every block, so that keeping their states costs no more than it saves."""
    limit = config.train.max_steps
    return limit is None or limit * config.train.gradient_accumulation_steps * num_processes() >= len(train_loader)


def _dtype(plan: Plan, device: torch.device) -> str:
    """Return the dtype that the teacher computes in; the embedded one's is fixed."""
    name = "float32" if plan.teacher is None else plan.teacher.dtype
    return str(choose_dtype(name, device)).removeprefix("torch.")


def _load(plan: Plan, blocks: Path, device: torch.device, stop: StopSignal) -> LiveTeacher:
    config, fingerprint = plan.config.teacher, plan.fingerprints.teacher
    if isinstance(config, EmbeddedTeacherConfig):
        assert fingerprint is not None
        return load_embedded_teacher(config, fingerprint, blocks, device, stop)
    assert plan.teacher is not None
    return load_pretrained(plan.teacher, device)
