"""From a plan to ready parts: what training needs is made or opened, tokenizer, packed blocks, teacher, student."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kd.adapters import add_adapters
from kd.checkpoint import load_weights
from kd.config import Config, CorpusConfig, IntegerConfig, LoRAConfig, TrainingConfig
from kd.data import (
    BlockLoader,
    Corpus,
    EncodedExamples,
    PackedBlocks,
    PositionedLoader,
    TokenizerSource,
    bpe_content,
    bpe_tokenizer_directory,
    build_blocks,
    end_of_text_id,
    eval_loader,
    find_blocks,
    num_token_ids,
    train_loader,
)
from kd.data.corpora import TRAIN
from kd.distributed import own_device, seed_everything
from kd.errors import ConfigError
from kd.model import StudentModel
from kd.plan import Plan
from kd.prepare_examples import open_example_loaders
from kd.quantization import fake_quantize
from kd.stop import StopSignal
from kd.teacher import Teacher
from kd.teacher_choice import open_teacher, teacher_content
from kd.trainers.machine import require_compiler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BEGINNING = 10_000
"""Characters of the corpus that are looked at before it is encoded."""
BATCH = 1000
HOLDS_IDS = ("input_ids", "labels", "prompts")
"""Ends of the names of tensors in a batch that are token ids."""
Loader = BlockLoader | PositionedLoader[EncodedExamples]


@dataclass(frozen=True)
class Parts:
    """What a trainer takes."""

    device: torch.device
    student: StudentModel
    teacher: Teacher | None
    teacher_content: str | None
    """What identifies the teacher's weights."""
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
        _check_end_of_text(plan, tokenizer)
        examples = open_example_loaders(config, plan.data, tokenizer)
        _check_tokens(plan, num_token_ids(tokenizer), examples)
        return Parts(device, _new_student(plan), None, None, plan.tokenizer, *examples)
    source = _place_tokenizer(plan, plan.data)
    blocks = _place_blocks(plan, plan.data, source)
    loaders = _open_loaders(config, blocks, plan.data.part_names)
    _check_tokens(plan, loaders[0].dataset.vocab_size, loaders)
    content = teacher_content(plan, blocks, device, stop)
    teacher = open_teacher(plan, content, blocks, loaders[0], loaders[1], device, stop)
    return Parts(device, _new_student(plan), teacher, content, source, *loaders)


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
    source = TokenizerSource(plan.tokenizer.fingerprint, str(directory), content=bpe_content(directory))
    if plan.start is not None and plan.start.tokenizer.content not in (None, source.content):
        raise ConfigError(
            f"init_from={plan.config.init_from} was trained with another BPE than the one in {directory}, which the "
            "same recipe gave: another version of the library cuts text in another way. Set data.tokenizer=init_from."
        )
    return source


def _place_blocks(plan: Plan, corpus: Corpus, source: TokenizerSource) -> Path:
    """The packed blocks' directory. Loading a tokenizer takes longer than all else in a start with a warm cache."""
    data = plan.config.data
    assert isinstance(data, CorpusConfig)
    blocks = find_blocks(corpus, source.content_fingerprint, data.seq_len)
    if blocks is not None:
        return blocks
    tokenizer = source.load()
    _check_end_of_text(plan, tokenizer)
    _check_beginning(plan, corpus, tokenizer)
    return build_blocks(corpus, tokenizer, source.content_fingerprint, data.seq_len)


def _open_loaders(
    config: Config, blocks: Path, parts: Sequence[str]
) -> tuple[BlockLoader, BlockLoader, BlockLoader | None]:
    assert isinstance(config.data, CorpusConfig)
    size, workers = config.train.batch_size, config.data.num_workers
    limit = config.data.max_eval_blocks
    training = PackedBlocks(blocks, "train", config.data.max_train_blocks)
    test = None
    if "test" in parts:
        test = eval_loader(PackedBlocks(blocks, "test", limit), size, workers)
    return (
        train_loader(training, size, config.seed, workers),
        eval_loader(PackedBlocks(blocks, "validation", limit), size, workers),
        test,
    )


# --- tokens beyond the model's rows --------------------------------------------------------------------------------


def _check_end_of_text(plan: Plan, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Refuse at once what would be refused of any data, since each text ends with this token."""
    _check_largest(plan, num_token_ids(tokenizer), end_of_text_id(tokenizer))


def _check_beginning(plan: Plan, corpus: Corpus, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Refuse a vocabulary that is far too small before the whole corpus is encoded."""
    text = next(corpus.texts(TRAIN))[:BEGINNING]
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    _check_largest(plan, num_token_ids(tokenizer), max(ids, default=0))


def _check_tokens(plan: Plan, num_ids: int, loaders: Sequence[Loader | None]) -> None:
    """Check that the model has a row for each token in the data; a tokenizer may know others, which never occur."""
    if num_ids <= plan.config.model.vocab_size:
        return
    for loader in loaders:
        if loader is not None:
            _check_largest(plan, num_ids, _largest_id(loader.dataset))


def _largest_id(part: PackedBlocks | EncodedExamples) -> int:
    largest = 0
    for start in range(0, len(part), BATCH):
        batch = part[list(range(start, min(start + BATCH, len(part))))]
        ids = [values for name, values in batch.items() if name.endswith(HOLDS_IDS)]
        largest = max(largest, *(int(values.max()) for values in ids))
    return largest


def _check_largest(plan: Plan, num_ids: int, largest: int) -> None:
    rows = plan.config.model.vocab_size
    if largest < rows:
        return
    problem = f"model.vocab_size={rows} is less than the tokenizer's {num_ids} tokens, and the data hold the one of "
    problem += f"the id {largest}: "
    if plan.teacher is not None and isinstance(plan.config.train, TrainingConfig):
        raise ConfigError(
            f"{problem}the teacher has no logit for it either. Give the tokenizer that the teacher was trained with, "
            "or take that token out of the text."
        )
    if plan.start is not None:
        raise ConfigError(
            f"{problem}the model of init_from={plan.config.init_from} has no row for it. Give the tokenizer that it "
            "was trained with, or take that token out of the data."
        )
    raise ConfigError(f"{problem}set model.vocab_size={num_ids} or more.")
