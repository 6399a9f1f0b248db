"""From a plan to ready parts: what training needs is made or opened, tokenizer, packed blocks, teacher, student."""

from dataclasses import dataclass
from pathlib import Path

import torch

from kd.adapters import add_adapters
from kd.checkpoint import load_weights
from kd.config import Config, CorpusConfig, IntegerConfig, LoRAConfig
from kd.data import (
    BlockLoader,
    Corpus,
    EncodedExamples,
    PackedBlocks,
    PositionedLoader,
    TokenizerSource,
    bpe_tokenizer_directory,
    build_blocks,
    eval_loader,
    find_blocks,
    num_token_ids,
    train_loader,
)
from kd.distributed import own_device, seed_everything
from kd.errors import ConfigError
from kd.model import StudentModel
from kd.plan import Plan
from kd.prepare_examples import open_example_loaders
from kd.quantization import fake_quantize
from kd.stop import StopSignal
from kd.teacher import Teacher
from kd.teacher_choice import open_teacher
from kd.trainers.machine import require_compiler

Loader = BlockLoader | PositionedLoader[EncodedExamples]


@dataclass(frozen=True)
class Parts:
    """What a trainer takes."""

    device: torch.device
    student: StudentModel
    teacher: Teacher | None
    tokenizer: TokenizerSource
    """With its location filled in. It is loaded when text is at hand: blocks that are packed already need none."""
    train_loader: Loader
    val_loader: Loader
    test_loader: Loader | None


def build_parts(plan: Plan, stop: StopSignal) -> Parts:
    """Make or open what training needs; the student is initialised last, from the run's seed.

    Raises:
        KDError: of the kind that fits.
    """
    config = plan.config
    device = own_device(config.device)
    if config.train.compile:
        require_compiler(device)
    if not isinstance(plan.data, Corpus):
        tokenizer = plan.tokenizer.load()
        _check_vocabulary_fits(config, num_token_ids(tokenizer))
        examples = open_example_loaders(config, plan.data, tokenizer)
        return Parts(device, _new_student(plan), None, plan.tokenizer, *examples)
    source = _place_tokenizer(plan, plan.data)
    blocks = _place_blocks(config, plan.data, source)
    loaders = _open_loaders(config, blocks)
    _check_vocabulary_fits(config, loaders[0].dataset.vocab_size)
    teacher = open_teacher(plan, blocks, loaders[0], loaders[1], device, stop)
    return Parts(device, _new_student(plan), teacher, source, *loaders)


def _new_student(plan: Plan) -> StudentModel:
    seed_everything(plan.config.seed)
    student = StudentModel(plan.config.model)
    if plan.start is not None:
        load_weights(plan.start.checkpoint, student)
    if isinstance(plan.config.adapter, LoRAConfig):
        add_adapters(student, plan.config.adapter)
    if isinstance(plan.config.quantization, IntegerConfig):
        fake_quantize(student, plan.config.quantization)
    return student


# --- data --------------------------------------------------------------------------------------------------------


def _place_tokenizer(plan: Plan, corpus: Corpus) -> TokenizerSource:
    if plan.tokenizer.location is not None:
        return plan.tokenizer
    directory = bpe_tokenizer_directory(corpus, plan.config.model.vocab_size)
    return TokenizerSource(plan.tokenizer.fingerprint, str(directory))


def _place_blocks(config: Config, corpus: Corpus, source: TokenizerSource) -> Path:
    """The packed blocks' directory. Loading a tokenizer takes longer than all else in a start with a warm cache."""
    assert isinstance(config.data, CorpusConfig)
    blocks = find_blocks(corpus, source.fingerprint, config.data.seq_len)
    if blocks is not None:
        return blocks
    tokenizer = source.load()
    _check_vocabulary_fits(config, num_token_ids(tokenizer))
    return build_blocks(corpus, tokenizer, source.fingerprint, config.data.seq_len)


def _check_vocabulary_fits(config: Config, size: int) -> None:
    if size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is less than the tokenizer's {size} tokens: "
            f"set model.vocab_size={size} or more."
        )


def _open_loaders(config: Config, blocks: Path) -> tuple[BlockLoader, BlockLoader, BlockLoader | None]:
    assert isinstance(config.data, CorpusConfig)
    size, workers = config.train.batch_size, config.data.num_workers
    limit = config.data.max_eval_blocks
    training = PackedBlocks(blocks, "train", config.data.max_train_blocks)
    test = None
    if config.data.test_ratio > 0:
        test = eval_loader(PackedBlocks(blocks, "test", limit), size, workers)
    return (
        train_loader(training, size, config.seed, workers),
        eval_loader(PackedBlocks(blocks, "validation", limit), size, workers),
        test,
    )
