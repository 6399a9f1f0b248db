"""How long does one optimizer step of distillation take, and how much memory?

    python experiments/benchmarks/step.py                  # a teacher of SmolLM2-135M's shape, a small student
    python experiments/benchmarks/step.py --job specified  # Qwen2.5-0.5B's shape, the specified student, 8 x 512 tokens

A step is forward, loss, backward, clipping and AdamW on one batch of random tokens; all weights are random, in one
dtype (`--dtype`) for both models. All variants compute the same loss on the same positions (its value stands in the
JSON file), and none logs, evaluates or saves:

- `plain`: a loop over full logits of both models and `kd.losses.distillation_loss`;
- `trl`: TRL's GKDTrainer with lmbda 0 and beta 0 (`pip install -e ".[bench]"`), its own training_step on a
  LlamaForCausalLM with the student's weights: no gradient checkpointing, no autocast, the optimizer step as in its
  train(). It knows no temperature and no cross-entropy, so where it takes part, alpha and temperature are 1;
- `kd live`, `kd cached`: DistillationTrainer's own step, on a teacher that runs, or on its hidden states from disk;
- `floor live`, `floor cached`: the head's matrix products, the student's body forward and backward and, live, the
  teacher's body forward. No optimizer.

Memory is the most that the process ever held, everything included; on CUDA, the most it ever allocated there. The
specified job starts its variants one at a time: `plain` alone needs 23 GB (use `--batch-size 4`, or leave it out with
`--variants`, where that does not fit).
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from measure import Measurement, add_common_arguments, compare, save, serve
from step_jobs import CACHED, FLOOR_CACHED, FLOOR_LIVE, JOBS, LIVE, PLAIN, TRL, Job

from kd.config import TrainingConfig
from kd.data import PackedBlocks, build_blocks, eval_loader
from kd.data.corpora import Corpus
from kd.data.sources.base import Documents, describe_document
from kd.heads import SplitModel
from kd.losses import IGNORE_INDEX, distillation_loss
from kd.model import StudentModel
from kd.teacher import LiveTeacher, Teacher, freeze
from kd.teacher_cache import TeacherCacheKey, open_cached_teacher
from kd.trainers import DistillationTrainer
from kd.trainers.dealing import Dealt
from kd.trainers.progress import Progress
from tests.llama import make_llama

BUILD_CACHE, PART, EOS = "build the cache", "train", "<eos>"
NUM_BATCHES = 2
LEARNING_RATE = 3e-4
GB = 1e9

Batch = dict[str, Tensor]
Step = Callable[[Batch], float]


# --- data and models ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A job on a device."""

    job: Job
    batch_size: int
    device: torch.device
    dtype: torch.dtype

    def blocks(self) -> PackedBlocks:
        """Return random tokens as a packed store in the cache, of as many blocks as the batches need."""
        length, vocab = self.job.student.max_seq_len, self.job.student.vocab_size
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(1, vocab, (NUM_BATCHES * self.batch_size * length,), generator=generator)
        text = " ".join(str(token) for token in tokens.tolist())
        documents = [describe_document("random", "random", text)]
        source = Documents("random tokens", documents, lambda chosen: (text for _ in chosen))
        words = {EOS: 0} | {str(token): token for token in range(1, vocab)}
        tokenizer = Tokenizer(WordLevel(words, unk_token=EOS))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)  # type: ignore[no-untyped-call]
        corpus = Corpus(source, {PART: range(1)}, f"{length} x {self.batch_size}")
        return PackedBlocks(build_blocks(corpus, fast, f"{vocab} words", length), PART)

    def batches(self) -> list[Batch]:
        """Return the batches; TRL has no target for the last position of a block, so no variant has."""
        batches = list(eval_loader(self.blocks(), self.batch_size))
        for batch in batches:
            batch["labels"][:, -1] = IGNORE_INDEX
        return batches

    def student(self) -> StudentModel:
        """Return the student with random weights."""
        torch.manual_seed(0)
        return StudentModel(self.job.student).to(self.device, self.dtype)

    def teacher(self) -> PreTrainedModel:
        """Return the frozen teacher with random weights."""
        torch.manual_seed(1)
        teacher = self.job.teacher(self.job.teacher_config)
        teacher.config.use_cache = False
        freeze(teacher)
        nn.Module.to(teacher, self.device, self.dtype)
        return teacher

    def cached_teacher(self, load: Callable[[], LiveTeacher]) -> Teacher:
        """Return the teacher's hidden states, computed by `load`'s result where they are not on disk yet."""
        dtype = str(self.dtype).removeprefix("torch.")
        return open_cached_teacher(TeacherCacheKey("random", dtype), [self.blocks()], load, self.device)

    def build_cache(self) -> None:
        """Put the teacher's hidden states on disk."""
        self.cached_teacher(lambda: LiveTeacher(self.teacher(), self.device))


# --- the variants ------------------------------------------------------------------------------------------------


def plain(setting: Setting) -> Step:
    """Return a plain loop's step."""
    student, teacher = setting.student(), setting.teacher()
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step(batch: Batch) -> float:
        moved = {name: value.to(setting.device) for name, value in batch.items()}
        student_logits = student(moved["input_ids"])
        with torch.no_grad():
            teacher_logits = teacher(moved["input_ids"]).logits
        loss, _ = distillation_loss(
            student_logits, teacher_logits, moved["labels"], setting.job.alpha, setting.job.temperature
        )
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def trl(setting: Setting) -> Step:
    """Return the step of TRL's trainer."""
    from gkd import make_gkd_trainer, to_batch

    converted = [to_batch(batch["input_ids"], batch["labels"]) for batch in setting.batches()]
    student = make_llama(setting.student().cpu())
    nn.Module.to(student, setting.dtype)
    with tempfile.TemporaryDirectory() as folder:
        use_cpu = setting.device.type == "cpu"
        trainer: Any = make_gkd_trainer(
            student, setting.teacher(), converted, LEARNING_RATE, Path(folder), use_cpu=use_cpu
        )
    trainer.create_optimizer_and_scheduler(num_training_steps=10**9)

    def step(batch: Batch) -> float:
        inputs = to_batch(batch["input_ids"], batch["labels"])
        count = (batch["labels"] != IGNORE_INDEX).sum()
        loss = trainer.training_step(trainer.model, inputs, count)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.model.zero_grad()
        return float(loss)

    return step


def ours(setting: Setting, teacher: nn.Module | Teacher) -> Step:
    """Return what DistillationTrainer.train() does for one batch."""
    config = TrainingConfig(
        batch_size=setting.batch_size,
        learning_rate=LEARNING_RATE,
        weight_decay=0.0,
        warmup_steps=0,
        num_epochs=10**6,  # so that the rate stays where it is
        log_interval=10**9,  # else the meter is emptied
        alpha=setting.job.alpha,
        temperature=setting.job.temperature,
    )
    trainer = DistillationTrainer(setting.student(), teacher, setting.batches(), None, config, setting.device)
    with Progress("step", 0, trainer.total_steps) as progress:
        pass  # its bar is closed, and shows nothing

    def step(batch: Batch) -> float:
        # train() would also log, and save at the end.
        trainer._train_window([Dealt(batch, counts=True)], progress)
        return trainer._meter.latest()["loss"]

    return step


def cached(setting: Setting) -> Step:
    """Return our step with the teacher's hidden states from disk; its body is never loaded."""

    def refuse() -> LiveTeacher:
        raise RuntimeError("the hidden states are not all in the cache")

    return ours(setting, setting.cached_teacher(refuse))


def floor(setting: Setting, *, is_live: bool) -> Step:
    """Return the products that every implementation must compute, as large as they come."""
    student = setting.student()
    teacher = SplitModel(setting.teacher()) if is_live else None
    student_weight = student.lm_head.weight.detach()
    width = setting.job.teacher_config.get_text_config().hidden_size
    teacher_weight = torch.randn(len(student_weight), width, device=setting.device, dtype=setting.dtype)

    def step(batch: Batch) -> float:
        tokens = batch["input_ids"].to(setting.device)
        states = student.hidden_states(tokens)
        hidden = states.detach().flatten(0, 1)
        logits = hidden @ student_weight.T
        if teacher is None:
            teacher_hidden = torch.ones(len(hidden), width, device=setting.device, dtype=setting.dtype)
        else:
            with torch.no_grad():
                teacher_hidden = teacher.hidden(tokens).flatten(0, 1)
        torch.mm(teacher_hidden, teacher_weight.T, out=logits)
        torch.mm(logits.T, hidden)
        states.backward((logits @ student_weight).view_as(states))  # type: ignore[no-untyped-call]
        student.zero_grad()
        return float("nan")

    return step


def prepare(setting: Setting, variant: str) -> Callable[[], float]:
    """Return the repetition of a variant: one step on the next batch."""
    makers: dict[str, Callable[[], Step]] = {
        PLAIN: lambda: plain(setting),
        TRL: lambda: trl(setting),
        LIVE: lambda: ours(setting, setting.teacher()),
        CACHED: lambda: cached(setting),
        FLOOR_LIVE: lambda: floor(setting, is_live=True),
        FLOOR_CACHED: lambda: floor(setting, is_live=False),
    }
    step = makers[variant]()
    batches: Iterator[Batch] = itertools.cycle(setting.batches())
    return lambda: step(next(batches))


# --- the comparison ----------------------------------------------------------------------------------------------


def step_table(results: Sequence[Measurement], job: Job, batch_size: int) -> str:
    """Return the results as text, with what they are held to in brackets."""
    by_name = {result.name: result for result in results}
    memory_bars = job.memory_bars if batch_size == job.batch_size else {}
    head = f"{'tokens/s':>10}{'/ floor':>9}{'speed / ' + job.reference:>22}"
    lines = [f"{'variant':<14}{'s':>8}{'spread':>8}{head}{'GB':>20}"]
    for result in results:
        if result.skipped:
            lines.append(f"{result.name:<14}  skipped: {result.skipped}")
            continue
        lowest = _median(by_name, FLOOR_CACHED if result.name in (CACHED, FLOOR_CACHED) else FLOOR_LIVE)
        speed = _held_to(_median(by_name, job.reference) / result.median, ">=", job.speed_bars.get(result.name))
        memory = _held_to(result.extra_bytes / GB, "<=", memory_bars.get(result.name))
        tokens = batch_size * job.student.max_seq_len / result.median
        lines.append(
            f"{result.name:<14}{result.median:>8.3f}{result.spread:>8.0%}{tokens:>10.0f}{result.median / lowest:>9.2f}"
            f"{speed:>22}{memory:>20}"
        )
    return "\n".join(lines)


def _median(by_name: dict[str, Measurement], name: str) -> float:
    return by_name[name].median if name in by_name else float("nan")


def _held_to(value: float, relation: str, bar: float | None) -> str:
    return f"{value:.2f}" + ("" if bar is None else f" (bar {relation} {bar:g})")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--job", default="smollm2", choices=list(JOBS))
    parser.add_argument("--batch-size", type=int, help="blocks per step; default: 8")
    parser.add_argument("--variants", nargs="+", help="only these; default: all of the job's")
    parser.add_argument("--name", help="of the result files; default: step-JOB-DEVICE-DTYPE")
    return parser.parse_args()


def main() -> None:
    """Measure the job's variants, print the table and write the files."""
    args = parse()
    torch.set_num_threads(args.threads)
    job = JOBS[args.job]
    batch_size = args.batch_size or job.batch_size
    setting = Setting(job, batch_size, torch.device(args.device), getattr(torch, args.dtype))
    if args.variant == BUILD_CACHE:
        setting.build_cache()
    elif args.variant is not None:
        serve(lambda: prepare(setting, args.variant), setting.device, count_whole_process=True)
    else:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["KD_CACHE"] = folder
            measure(args, job, batch_size)


def measure(args: argparse.Namespace, job: Job, batch_size: int) -> None:
    """Run the variants in processes of their own and report."""
    settings = {"job": args.job, "device": args.device, "dtype": args.dtype, "threads": args.threads}
    settings["batch_size"] = batch_size
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    variants = args.variants or list(job.variants)
    if CACHED in variants:
        subprocess.run([sys.executable, __file__, "--variant", BUILD_CACHE, *arguments], check=True)
    results = compare(__file__, variants, arguments, args.rounds, one_at_a_time=job.one_at_a_time)
    print(step_table(results, job, batch_size))
    length = job.student.max_seq_len
    title = f"One optimizer step: job {args.job}, {batch_size} x {length} tokens, {args.device} {args.dtype}"
    settings |= {"tokens": batch_size * length, "rounds": args.rounds, "memory": "of the whole process"}
    settings |= {"alpha": job.alpha, "temperature": job.temperature}
    save(args.name or f"step-{args.job}-{args.device}-{args.dtype}", settings, results, title, "peak memory, MiB")


if __name__ == "__main__":
    main()
