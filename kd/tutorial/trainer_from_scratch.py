"""A training loop, written out: from one batch's loss to a run with validation and checkpoints.

    python -m kd.tutorial.trainer_from_scratch

trains a character model on this file's own text: it shows that the cut into micro-batches does not matter, what a step
reports, perplexity before and after, and that a run that was stopped goes on to exactly the same weights.

The order of one optimizer step, which is where most mistakes of training code are made:

    count the targets of all its micro-batches
    for each micro-batch: forward in half precision, loss / that count, times the loss scale, backward
    take the loss scale out of the gradients -> measure their norm -> clip -> optimizer -> adapt the scale

中文摘要: 本文件从零实现完整的训练循环: 前向与反向, 梯度累积 (按整个优化步的有效目标数归一化,
而不是对各微批的平均值再取平均), 裁剪, 混合精度, 预热 + 余弦, 验证与困惑度, 以及可以精确恢复的检查点.
运行本文件会用它自身的文本训练一个字符模型, 并验证: 微批的切分不影响结果, 恢复的训练与不中断的逐位相同.
"""

import math
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

if not __package__:
    # Run as a plain file: Python then looks for packages beside this file alone.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kd.tutorial.character_model import NextCharacter, character_batches
from kd.tutorial.optimizer_from_scratch import AdamWFromScratch
from kd.tutorial.parts_from_scratch import (
    IGNORE_INDEX,
    LossScaler,
    clip_by_global_norm,
    count_targets,
    gradient_norm,
    no_scaling,
    perplexity,
    rng_state,
    set_rng_state,
    summed_cross_entropy,
    warmup_cosine,
)

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Batch = dict[str, Tensor]
"""`input_ids` and `labels`, (B, L) int64. Labels are next-token targets already: `labels[:, i]` is what should follow
`input_ids[:, i]`, and nothing here shifts them again."""


class Loader(Protocol):
    """Batches that can be gone through once an epoch: a list, or a DataLoader.

    A DataLoader that shuffles must draw from torch's global random numbers (its default), which checkpoints keep.
    """

    def __iter__(self) -> Iterator[Batch]: ...
    def __len__(self) -> int: ...


# --- the trainer ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainerSettings:
    """What `TrainerFromScratch` does beside what its optimizer says."""

    num_epochs: int = 1
    """Passes over the training batches."""
    accumulation_steps: int = 1
    """Micro-batches of one optimizer step: as one batch so many times as large, in the memory of one."""
    max_grad_norm: float = 1.0
    """Longest gradient, by its global norm."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    precision: str = "float32"
    """Of the forward pass: float32, bfloat16 or float16. The weights are float32 in all of them."""
    log_interval: int | None = None
    """Optimizer steps between printed lines; None prints nothing."""

    def __post_init__(self) -> None:
        if min(self.num_epochs, self.accumulation_steps, self.max_grad_norm) <= 0 or self.warmup_steps < 0:
            raise ValueError(f"{self} is not allowed: all but warmup_steps must be greater than 0, and that 0 or more.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision} is unknown: use one of {', '.join(PRECISIONS)}.")


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did."""

    step: int
    """Counted from 1."""
    loss: float
    """Mean over the step's targets, in nats, of the weights before the step."""
    num_targets: int
    """What the loss is a mean over."""
    grad_norm: float
    """Of the true gradient, before clipping; infinite or NaN after an overflow."""
    clip_factor: float
    """What the gradient was multiplied by, in (0, 1]."""
    learning_rate: float
    """Of the first parameter group."""
    loss_scale: float
    """The factor that this step's loss was multiplied by."""
    is_taken: bool
    """False where float16 overflowed: the weights are as before."""


@dataclass(frozen=True)
class Validation:
    """The model's quality on the validation batches after a step."""

    step: int
    loss: float
    """Mean over all their targets, in nats."""
    perplexity: float
    """exp(loss)."""


class TrainerFromScratch:
    """Trains a language model: any module that maps (B, L) token ids to (B, L, V) logits.

    Args:
        model: Trained on the device that its parameters are on.
        optimizer: Over the model's parameters; the learning rates of its groups are the peaks of the schedule.
        train_loader: Batches of one epoch.
        val_loader: Batches to validate on after each epoch; None: no validation.
        settings: The rest.
        scaler: The loss scaler; None: `LossScaler()` with float16, a factor of 1 otherwise.

    Raises:
        ValueError: if the training loader is empty.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        train_loader: Loader,
        val_loader: Loader | None = None,
        settings: TrainerSettings = TrainerSettings(),
        scaler: LossScaler | None = None,
    ) -> None:
        if len(train_loader) == 0:
            raise ValueError("train_loader is empty: there is nothing to train on. Give it at least one batch.")
        self.model, self.optimizer, self.settings = model, optimizer, settings
        self.train_loader, self.val_loader = train_loader, val_loader
        self.scaler = scaler or (LossScaler() if settings.precision == "float16" else no_scaling())
        self.device = next(model.parameters()).device
        self.peak_rates = [group["lr"] for group in optimizer.param_groups]
        # An epoch's last step may have fewer micro-batches than the others; it is a step all the same.
        self.steps_per_epoch = math.ceil(len(train_loader) / settings.accumulation_steps)
        self.total_steps = settings.num_epochs * self.steps_per_epoch
        self.step = 0
        self.validations: list[Validation] = []
        self._rng_of_epoch = rng_state()

    # --- one step ---

    def train_step(self, window: list[Batch]) -> StepReport:
        """Take one optimizer step on the micro-batches of a window.

        The gradient is that of the mean over all targets of the window. The mean of the micro-batches' means is another
        number: of a batch with 1 target of loss 4 and one with 3 targets of loss 2 the mean is (4 + 6) / 4 = 2.5, and
        the mean of means (4 + 2) / 2 = 3. There the lone target counts three times as much as each of the others, only
        because of the batch that it happened to be in; and the result depends on how the window is cut.

        Raises:
            FloatingPointError: if the gradient is not finite and no loss scale is to blame.
        """
        num_targets = sum(count_targets(batch["labels"]) for batch in window)
        self.optimizer.zero_grad()
        loss = sum(self._backward(batch, num_targets) for batch in window)
        rate, scale = self._set_learning_rate(), self.scaler.scale
        norm, factor, is_finite = self._prepare_gradient()
        if is_finite:
            self.optimizer.step()
        self.scaler.adapt(overflowed=not is_finite)
        self.step += 1
        return StepReport(self.step, loss, num_targets, norm, factor, rate, scale, is_finite)

    def _backward(self, batch: Batch, num_targets: int) -> float:
        """Add a micro-batch's part of the window's gradient to `grad`; return its part of the window's loss."""
        # A window without a target has the gradient 0: 0 / 0 would make it NaN.
        part = self._summed_loss(batch) / max(1, num_targets)
        (part * self.scaler.scale).backward()  # type: ignore[no-untyped-call]
        # grad sums up over calls, and sum_i (loss_i / N) = (sum_i loss_i) / N: the parts add up to the mean.
        return part.item()  # waits for a GPU to finish; the real trainers keep such sums on the device

    def _summed_loss(self, batch: Batch) -> Tensor:
        dtype = PRECISIONS[self.settings.precision]
        # Autocast computes matrix products in half precision and keeps sums and exponentials in float32. The weights,
        # their gradients and the optimizer's moments stay float32: an update of 1e-4 of a weight's size would be
        # rounded away in bfloat16, which has 8 bits (Micikevicius et al. 2018, section 3.1).
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            logits = self.model(batch["input_ids"].to(self.device))
        return summed_cross_entropy(logits, batch["labels"].to(self.device))

    def _set_learning_rate(self) -> float:
        share = warmup_cosine(self.step, self.settings.warmup_steps, self.total_steps)
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * share
        return float(self.optimizer.param_groups[0]["lr"])

    def _prepare_gradient(self) -> tuple[float, float, bool]:
        """Unscale and clip the gradient; return its norm before clipping, the factor, and whether it is finite."""
        parameters = list(self.model.parameters())
        self.scaler.unscale(parameters)
        norm = gradient_norm(parameters)
        if not math.isfinite(norm):
            if self.scaler.scale <= 1:
                raise FloatingPointError(
                    f"step {self.step + 1}: the gradient's norm is {norm}, and there is no loss scale to lower. "
                    "Training has diverged: lower the learning rate, or lengthen the warm-up."
                )
            return norm, 1.0, False
        return norm, clip_by_global_norm(parameters, norm, self.settings.max_grad_norm), True

    # --- the loop ---

    def train(self, until_step: int | None = None) -> list[StepReport]:
        """Train up to a step, or to the end, from wherever this trainer is; return a report of each step taken.

        After each epoch the model is validated; see `validations`.
        """
        stop = self.total_steps if until_step is None else min(until_step, self.total_steps)
        reports = []
        while self.step < stop:
            self.model.train()
            for window in self._rest_of_epoch():
                reports.append(self.train_step(window))
                self._log(reports[-1])
                if self.step == stop:
                    break
            if self.step % self.steps_per_epoch == 0 and self.val_loader is not None:
                self.validations.append(self.evaluate())
        return reports

    def _rest_of_epoch(self) -> Iterator[list[Batch]]:
        """Yield the windows of this epoch that are left."""
        done = self.step % self.steps_per_epoch * self.settings.accumulation_steps
        now = rng_state()
        if done == 0:
            self._rng_of_epoch = now
        # Half-way: shuffle as at the epoch's start, pass over what was seen, then draw on from where we are.
        set_rng_state(self._rng_of_epoch)
        batches = iter(self.train_loader)
        if done > 0:
            for _ in islice(batches, done):
                pass
            set_rng_state(now)
        while window := list(islice(batches, self.settings.accumulation_steps)):
            yield window

    def _log(self, report: StepReport) -> None:
        interval = self.settings.log_interval
        if interval is None or report.step % interval != 0:
            return
        print(
            f"   step {report.step:4}/{self.total_steps}  loss {report.loss:.4f}  lr {report.learning_rate:.2e}  "
            f"|gradient| {report.grad_norm:.3f} x {report.clip_factor:.3f}{'' if report.is_taken else '  not taken'}"
        )

    @torch.no_grad()
    def evaluate(self) -> Validation:
        """Return the mean loss over all targets of the validation batches, and its perplexity.

        Raises:
            ValueError: if there is nothing to validate on.
        """
        self.model.eval()  # no dropout
        total, num_targets = 0.0, 0
        for batch in self.val_loader or ():
            total += self._summed_loss(batch).item()
            num_targets += count_targets(batch["labels"])
        self.model.train()
        if num_targets == 0:
            raise ValueError("val_loader has no valid target: there is nothing to validate on.")
        # Sum over sum, for the same reason as in training: a small last batch must not count as much as a full one.
        return Validation(self.step, total / num_targets, perplexity(total / num_targets))

    # --- checkpoints ---

    def save_checkpoint(self, path: Path) -> None:
        """Write everything that the next step depends on: weights, optimizer, position, scale, random numbers."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),  # without its moments, Adam would start again
            "peak_rates": self.peak_rates,
            "scaler": {"scale": self.scaler.scale, "good_steps": self.scaler.good_steps},
            "step": self.step,  # the schedule and the position in the data follow from it
            "rng": rng_state(),  # dropout
            "rng_of_epoch": self._rng_of_epoch,  # the shuffling of the epoch that is under way
            "validations": [asdict(validation) for validation in self.validations],
        }
        unfinished = path.with_name(path.name + ".tmp")
        torch.save(state, unfinished)
        os.replace(unfinished, path)  # in one step: whoever is killed while saving keeps the checkpoint before

    def load_checkpoint(self, path: Path) -> None:
        """Restore what `save_checkpoint` wrote; the trainer must have been made with the same settings and data."""
        # A .pt file is a pickle, and unpickling can run any code. weights_only allows tensors and plain values alone.
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.peak_rates = state["peak_rates"]
        self.scaler.scale, self.scaler.good_steps = state["scaler"]["scale"], state["scaler"]["good_steps"]
        self.step = state["step"]
        self.validations = [Validation(**values) for values in state["validations"]]
        self._rng_of_epoch = state["rng_of_epoch"]
        set_rng_state(state["rng"])


# --- to follow by hand ----------------------------------------------------------------------------------------------


def _small_trainer(precision: str = "float32", log_interval: int | None = None) -> TrainerFromScratch:
    """Return a trainer of a character model on this file's text, the last ninth of which is for validation."""
    torch.manual_seed(0)
    batches, vocab_size = character_batches(Path(__file__).read_text(encoding="utf-8"))
    model, cut = NextCharacter(vocab_size), len(batches) * 8 // 9
    settings = TrainerSettings(5, 2, warmup_steps=10, precision=precision, log_interval=log_interval)
    optimizer = AdamWFromScratch(model.parameters(), lr=5e-3)
    return TrainerFromScratch(model, optimizer, batches[:cut], batches[cut:], settings)


def _show_accumulation() -> None:
    print("1. 16 rows with 2, 4, ..., 32 targets, as one batch and cut into micro-batches:")
    for rows in (16, 4, 1):
        trainer = _small_trainer()
        trainer.model.eval()  # dropout would draw other numbers for each cut
        ids, labels = next(iter(trainer.train_loader)).values()
        labels = labels.where(torch.arange(32) < 2 * torch.arange(1, 17)[:, None], IGNORE_INDEX)
        cut = zip(torch.split(ids, rows), torch.split(labels, rows), strict=True)
        window = [{"input_ids": x, "labels": y} for x, y in cut]
        means = [trainer._summed_loss(batch).item() / count_targets(batch["labels"]) for batch in window]
        report = trainer.train_step(window)
        print(
            f"   {len(window):2} x {rows:2}: loss {report.loss:.5f} over {report.num_targets} targets, "
            f"|gradient| {report.grad_norm:.5f}; mean of means {sum(means) / len(means):.5f}"
        )


def _show_training() -> None:
    trainer = _small_trainer(log_interval=10)
    print(f"\n2. Training; perplexity before {trainer.evaluate().perplexity:.1f}, after each epoch:")
    trainer.train()
    print("   " + ", ".join(f"{validation.perplexity:.1f}" for validation in trainer.validations))


def _show_precision() -> None:
    print(
        "\n3. Half precision. Loss after 20 steps; then float16 with so high a loss scale that the first step overflows"
    )
    for precision in PRECISIONS:
        print(f"   {precision:8}  {_small_trainer(precision).train(until_step=20)[-1].loss:.4f}")
    trainer = _small_trainer("float16")
    trainer.scaler.scale = 2.0**20
    for report in trainer.train(until_step=6):
        print(f"   step {report.step}  scale {report.loss_scale:7.0f}  {'taken' if report.is_taken else 'not taken'}")


def _show_resume() -> None:
    print("\n4. Stopped after step 23, in the middle of an epoch, and gone on from the checkpoint:")
    whole = _small_trainer()
    whole.train()
    with tempfile.TemporaryDirectory() as folder:
        first = _small_trainer()
        first.train(until_step=23)
        first.save_checkpoint(Path(folder) / "step23.pt")
        second = _small_trainer()
        second.load_checkpoint(Path(folder) / "step23.pt")
    second.train()
    pairs = zip(whole.model.parameters(), second.model.parameters(), strict=True)
    print(f"   largest difference of any weight: {max((a - b).abs().max().item() for a, b in pairs):g}")


def main() -> None:
    """Show what the trainer does; some seconds' work."""
    torch.set_num_threads(1)  # for so small a model, more only wait for each other
    _show_accumulation()
    _show_training()
    _show_precision()
    _show_resume()


if __name__ == "__main__":
    main()
