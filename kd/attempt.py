"""One attempt at a run: parts, trainer, training from wherever an earlier attempt ended, samples, result."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kd.checkpoint import load_weights
from kd.checkpoint_files import checkpoint_folders, latest_checkpoint
from kd.config import Config, GRPOConfig, IntegerConfig, TrainingConfig
from kd.data import EncodedPrompts, PackedBlocks
from kd.distributed import first_of_node_first, process_group, told_by_first
from kd.errors import DataError
from kd.files import read_json, settle_leftovers
from kd.generation import TextGenerator
from kd.model import StudentModel
from kd.overwriting import begin_afresh, end, needless_because
from kd.plan import Plan
from kd.prepare import Loader, Parts, build_parts
from kd.products import turn_into_integers, write_products
from kd.rewards import REWARDS
from kd.run_tokenizer import keep_tokenizer
from kd.runs import ENVIRONMENT, Run, describe_environment
from kd.samples import write_samples
from kd.stop import StopSignal
from kd.torchrun import is_first
from kd.trainers import BaseTrainer, DistillationTrainer, GRPOTrainer, create_trainer
from kd.trainers.evaluation import Scores, save_scores
from kd.trainers.state import Batch

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

log = logging.getLogger("kd")

AnyTrainer = BaseTrainer[Any]
_SAME_RECIPE = (
    "the same recipe gives another one on another machine or with another version of a library. Set KD_CACHE to the "
    "folder with the one that was used first"
)
CPU_ALLOCATOR = "DefaultCPUAllocator"


def attempt(plan: Plan, run: Run, files: dict[str, str], stop: StopSignal) -> dict[str, Any]:
    """Do a run, or continue it from its last checkpoint.

    Args:
        plan: What to do.
        run: Where.
        files: Further files for the run's directory, by relative name.
        stop: Asked between steps whether to stop.

    Returns:
        The result, as in result.json.

    Raises:
        KDError: of the kind that fits.
        MemoryError: if the machine has too little, on any device.
    """
    if plan.config.threads is not None:
        torch.set_num_threads(plan.config.threads)
    with _memory_errors():
        return _attempt(plan, run, files, stop)


def _attempt(plan: Plan, run: Run, files: dict[str, str], stop: StopSignal) -> dict[str, Any]:
    with first_of_node_first():
        parts = build_parts(plan, stop)
    with run.hold() if is_first() else nullcontext():
        with process_group(parts.device):
            if (result := _begin(plan, run, files, parts)) is not None:
                return result
            with _logged_to(run.directory / "train.log") if is_first() else nullcontext():
                trainer = make_trainer(plan, parts, run.directory)
                trainer.stop = stop
                _resume(trainer, plan.config)
                trainer.train()
                with stop.listening():  # scoring asks between batches, so that several processes leave together
                    _score_test(trainer, parts)
                    if isinstance(plan.config.quantization, IntegerConfig):
                        turn_into_integers(trainer, plan.config.quantization, parts.test_loader)
                    trainer.raise_if_stopped()
        result = _summarise(trainer)
        if is_first():  # alone from here on, for as long as it takes
            write_products(trainer, plan.config.quantization)
            _write_samples(run.directory, _whole_student(trainer), parts)
            run.write_result(result)
            end(run)
        return result


def _begin(plan: Plan, run: Run, files: dict[str, str], parts: Parts) -> dict[str, Any] | None:
    """Make the run's directory ready; return the result if another process finished it while the parts were built."""
    contents = {"tokenizer": parts.tokenizer.content_fingerprint, "teacher": parts.teacher_content}
    if told_by_first(contents) != contents:
        raise DataError(f"The processes of this run have different tokenizers or teachers: {_SAME_RECIPE}.")
    result = None
    if is_first():
        result = needless_because(run, overwrite=plan.config.overwrite)
        if result is None:
            if plan.config.overwrite:
                begin_afresh(run)
            settle_leftovers(run.directory)
            _refuse_others(run, contents)
            inputs = {"tokenizer": asdict(parts.tokenizer), "contents": contents}
            run.write_configuration(files, describe_environment(plan.identity, **inputs))
            keep_tokenizer(parts.tokenizer, run.directory)
    told: dict[str, Any] | None = told_by_first(result)
    return told


def _refuse_others(run: Run, contents: dict[str, str | None]) -> None:
    """Refuse to go on with another tokenizer or teacher than the attempt had that left checkpoints."""
    if not checkpoint_folders(run.directory):
        return
    before = read_json(run.directory / ENVIRONMENT)["inputs"].get("contents", contents)
    if different := [name for name in contents if before.get(name) != contents[name]]:
        raise DataError(
            f"{run.directory} was begun with another {' and '.join(different)} than this cache holds: {_SAME_RECIPE}. "
            "Set overwrite=true to do the run again."
        )


def make_trainer(plan: Plan, parts: Parts, run_dir: Path) -> AnyTrainer:
    """Return the trainer that the configuration's class asks for."""
    config = plan.config.train
    if isinstance(config, TrainingConfig):
        return DistillationTrainer(
            parts.student,
            parts.teacher,
            parts.train_loader,
            parts.val_loader,
            config,
            parts.device,
            run_dir=run_dir,
        )
    if isinstance(config, GRPOConfig):
        return _grpo_trainer(config, parts, run_dir)
    return create_trainer(
        config.trainer,
        parts.student,
        train_loader=parts.train_loader,
        val_loader=parts.val_loader,
        config=config,
        device=parts.device,
        run_dir=run_dir,
    )


def _grpo_trainer(config: GRPOConfig, parts: Parts, run_dir: Path) -> GRPOTrainer:
    answers: dict[int, str] = {}
    for loader in (parts.train_loader, parts.val_loader, parts.test_loader):
        if loader is not None:
            assert isinstance(loader.dataset, EncodedPrompts)
            answers |= loader.dataset.answers
    reward = REWARDS[config.reward]

    def reward_fn(responses: list[str], batch: Batch) -> list[float]:
        pairs = zip(responses, batch["example_id"].tolist(), strict=True)
        return [reward(response, answers[example]) for response, example in pairs]

    return GRPOTrainer(
        parts.student,
        train_loader=parts.train_loader,
        val_loader=parts.val_loader,
        reward_fn=reward_fn,
        generator=TextGenerator(parts.student, parts.tokenizer.load()),
        config=config,
        device=parts.device,
        run_dir=run_dir,
    )


def _resume(trainer: AnyTrainer, config: Config) -> None:
    assert trainer.run_dir is not None
    found = None
    if trainer.is_main:
        # Its name may have changed since; and the one that it has now may be a link to another disk.
        folder = trainer.run_dir / config.train.checkpoint_dir
        settle_leftovers(folder)
        latest = latest_checkpoint(folder, *checkpoint_folders(trainer.run_dir))
        found = None if latest is None else str(latest)
    if (checkpoint := told_by_first(found)) is None:
        return
    trainer.load_checkpoint(checkpoint)
    if trainer.config.checkpoint_dir != config.train.checkpoint_dir:
        log.warning(
            "train.checkpoint_dir=%s has no effect on a run that has begun: its checkpoints stay in %s",
            config.train.checkpoint_dir,
            trainer.config.checkpoint_dir,
        )
    # What else may differ between attempts at one run follows the present command.
    trainer.config = replace(
        trainer.config,
        log_interval=config.train.log_interval,
        save_interval=config.train.save_interval,
        compile=config.train.compile,
        gradient_checkpointing=config.train.gradient_checkpointing,
        strategy=config.train.strategy,
    )
    log.info("Continuing from %s", checkpoint)


def _score_test(trainer: AnyTrainer, parts: Parts) -> None:
    """Write the scores of each block or example, and score the test part, once, with the final model."""
    assert trainer.final_scores is not None
    _write_scores(trainer, "val", trainer.final_scores, parts.val_loader)
    if parts.test_loader is None:
        return
    scores = trainer.score(parts.test_loader, with_teacher=False)
    _write_scores(trainer, "test", scores, parts.test_loader)
    trainer.record_part("test", scores)


def _write_scores(trainer: AnyTrainer, part: str, scores: Scores, loader: Loader) -> None:
    assert trainer.run_dir is not None
    if trainer.is_main:
        save_scores(scores, trainer.run_dir, part, _ids(loader))


def _ids(loader: Loader) -> "npt.NDArray[np.int64] | None":
    """The documents of blocks, or the examples themselves."""
    data = loader.dataset
    return data.document_ids if isinstance(data, PackedBlocks) else data.example_ids


def _whole_student(trainer: AnyTrainer) -> StudentModel:
    """Return the trained student, whole also where its weights are in parts."""
    student = trainer.model
    assert isinstance(student, StudentModel)
    if trainer.config.strategy != "fsdp":
        return student
    whole = StudentModel(student.config).to(trainer.device)
    load_weights(trainer.last_checkpoint, whole)
    return whole


def _write_samples(directory: Path, student: StudentModel, parts: Parts) -> None:
    generator = TextGenerator(student, parts.tokenizer.load())
    write_samples(directory / "samples.txt", generator, parts.val_loader.dataset)


def _summarise(trainer: AnyTrainer) -> dict[str, Any]:
    history = trainer.history
    totals = {name: value for name, value in history.totals.items() if name.startswith(("test_", "quantized_"))}
    final = history.validation["val_step"].index(trainer.final_step)
    return {
        "steps": trainer.step,
        **{name: column[final] for name, column in history.validation.items() if name != "val_step"},
        "best_val_loss": trainer.best_val_loss,
        "best_step": trainer.best_step,
        "teacher_val_ppl": history.totals.get("teacher_val_ppl"),
        **(dict.fromkeys(("test_loss", "test_ppl")) | totals),
        "tokens": history.totals["tokens"],
        "flops": history.totals["flops"],
        "parameters": history.totals["parameters"],
        "timing": {key: history.timing[key] for key in ("wall_seconds", "peak_memory_bytes")},
    }


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Turn torch's ways of saying that memory is used up into Python's."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(str(error)) from error
    except RuntimeError as error:
        if CPU_ALLOCATOR not in str(error):  # torch has no class of its own for the CPU
            raise
        raise MemoryError(str(error)) from error


@contextmanager
def _logged_to(path: Path) -> Iterator[None]:
    """Copy all log lines to a file while the block runs, an error that ends it included."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    except Exception as error:
        handler.handle(root.makeRecord(root.name, logging.ERROR, __file__, 0, str(error), (), None))
        raise
    finally:
        root.removeHandler(handler)
        handler.close()
