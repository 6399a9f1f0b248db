"""One run from its checked configuration to its result."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from kd.cache import RESOURCE_ERRNOS
from kd.checkpoint import latest_checkpoint
from kd.config import Config, PretrainConfig, TrainingConfig
from kd.errors import ResourceError
from kd.files import remove_leftovers, write_text
from kd.generation import GenerationConfig, TextGenerator
from kd.prepare import Parts, Plan, build_parts, make_plan
from kd.runs import Run, describe_environment
from kd.trainers import DistillationTrainer, PretrainTrainer
from kd.trainers.stop import StopSignal

log = logging.getLogger("kd")

AnyTrainer = DistillationTrainer | PretrainTrainer
CPU_ALLOCATOR = "DefaultCPUAllocator"
NUM_SAMPLES = 3
PROMPT_TOKENS = 16
SAMPLE_TOKENS = 64


def do_run(config: Config, files: dict[str, str]) -> float:
    """Do a run, continue it, or skip it if it is done.

    Args:
        config: The whole configuration.
        files: Further files for the run's directory, by relative name.

    Returns:
        The final validation loss (nats per token).

    Raises:
        KDError: of the kind that fits; see `kd.errors` for the exit codes.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    stop = StopSignal()
    with stop.installed(), _resources_named(config):
        plan = make_plan(config)
        run = Run(plan.identity)
        result = None if config.overwrite else run.result()
        if result is None:
            result = _train(plan, run, files, stop)
        else:
            log.info("Already done, nothing to do (overwrite=true does it again)")
    _announce(run, result)
    return float(result["val_loss"])


def _train(plan: Plan, run: Run, files: dict[str, str], stop: StopSignal) -> dict[str, Any]:
    run.refuse_if_held()
    parts = build_parts(plan, stop)
    with run.hold():
        if plan.config.overwrite:
            run.clear()
        elif (result := run.result()) is not None:  # another process finished it while the parts were built
            return result
        source = parts.tokenizer_source
        run.write_configuration(files, describe_environment(plan.identity, tokenizer=asdict(source)))
        with _logged_to(run.directory / "train.log"):
            trainer = make_trainer(plan, parts, run.directory)
            trainer.stop = stop
            _resume(trainer, plan.config)
            trainer.train()
            _score_test(trainer, parts)
            _write_samples(run.directory / "samples.txt", parts)
            result = _summarise(trainer)
            run.write_result(result)
            return result


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
            plan.device,
            run_dir=run_dir,
        )
    assert isinstance(config, PretrainConfig)
    return PretrainTrainer(
        parts.student,
        train_loader=parts.train_loader,
        val_loader=parts.val_loader,
        config=config,
        device=plan.device,
        run_dir=run_dir,
    )


def _resume(trainer: AnyTrainer, config: Config) -> None:
    assert trainer.run_dir is not None
    folder = trainer.run_dir / config.train.checkpoint_dir
    remove_leftovers(folder)
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        return
    trainer.load_checkpoint(checkpoint)
    # What may differ between attempts at one run follows the present command.
    trainer.config = replace(
        trainer.config, log_interval=config.train.log_interval, save_interval=config.train.save_interval
    )
    log.info("Continuing from %s", checkpoint)


def _score_test(trainer: AnyTrainer, parts: Parts) -> None:
    """Write the per-block scores, and score the test part, once, with the final model."""
    assert trainer.run_dir is not None
    assert trainer.final_scores is not None
    trainer.final_scores.save(trainer.run_dir / "val_blocks.npy", parts.val_loader.dataset.document_ids)
    if parts.test_loader is None:
        return
    scores = trainer.score(parts.test_loader, with_teacher=False)
    scores.save(trainer.run_dir / "test_blocks.npy", parts.test_loader.dataset.document_ids)
    trainer.record_test(scores)


def _write_samples(path: Path, parts: Parts) -> None:
    """Continue the beginnings of a few validation blocks."""
    generator = TextGenerator(parts.student, parts.tokenizer)
    blocks = parts.val_loader.dataset
    sections = []
    for index in range(0, len(blocks), max(1, len(blocks) // NUM_SAMPLES)):
        prompt = blocks[index]["input_ids"][:PROMPT_TOKENS]
        text = generator.decode(prompt.tolist())
        for strategy in ("greedy", "top_p"):
            settings = GenerationConfig(strategy=strategy, max_new_tokens=SAMPLE_TOKENS)
            answer = generator.decode(generator.generate_ids(prompt.unsqueeze(0), settings))
            sections.append(f"=== {strategy}\n{text}>>>{answer}\n")
        if len(sections) >= 2 * NUM_SAMPLES:
            break
    write_text(path, "\n".join(sections))


def _summarise(trainer: AnyTrainer) -> dict[str, Any]:
    totals, validation = trainer.history.totals, trainer.history.validation
    return {
        "steps": trainer.step,
        "val_loss": validation["val_loss"][-1],
        "val_ppl": validation["val_ppl"][-1],
        "val_kl": validation["val_kl"][-1],
        "val_agreement": validation["val_agreement"][-1],
        "val_bits_per_byte": validation["val_bits_per_byte"][-1],
        "best_val_loss": trainer.best_val_loss,
        "best_step": trainer.best_step,
        "teacher_val_ppl": totals["teacher_val_ppl"],
        "test_loss": totals.get("test_loss"),
        "test_ppl": totals.get("test_ppl"),
        "tokens": totals["tokens"],
        "flops": totals["flops"],
        "parameters": totals["parameters"],
        "timing": {key: trainer.history.timing[key] for key in ("wall_seconds", "peak_memory_bytes")},
    }


def _announce(run: Run, result: dict[str, Any]) -> None:
    teacher, test = result["teacher_val_ppl"], result["test_ppl"]
    log.info(
        "Validation perplexity %.2f%s%s",
        result["val_ppl"],
        "" if test is None else f", test {test:.2f}",
        "" if teacher is None else f" (teacher, validation: {teacher:.2f})",
    )
    log.info("Run: %s", run.directory)
    log.info('Try it: python -m kd.generate %s "prompt"', run.directory)


@contextmanager
def _resources_named(config: Config) -> Iterator[None]:
    """Turn what the machine lacks - memory, disk, a permission - into a ResourceError with the way out."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ResourceError(_out_of_memory(config, error)) from error
    except RuntimeError as error:
        if CPU_ALLOCATOR not in str(error):  # torch has no class of its own for the CPU
            raise
        raise ResourceError(_out_of_memory(config, error)) from error
    except OSError as error:
        if error.errno not in RESOURCE_ERRNOS:
            raise
        raise ResourceError(f"{error}. Free the space or the permission; the same command then continues.") from error


def _out_of_memory(config: Config, error: Exception) -> str:
    return (
        f"Out of memory with train.batch_size={config.train.batch_size} and data.seq_len={config.data.seq_len} "
        f"({str(error).splitlines()[0] if str(error) else 'no details'}). Lower train.batch_size and raise "
        "train.gradient_accumulation_steps to match: the result is the same."
    )


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
