"""BaseTrainer: the only training loop. A window is the micro-batches of one optimizer step."""

import itertools
import logging
import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from torch import Tensor, nn

from kd.distributed import reduce_tensor, sum_of_all
from kd.errors import Interrupted, NumericError
from kd.losses import IGNORE_INDEX
from kd.runs import Number
from kd.trainers.dealing import Dealt, deal, position_after
from kd.trainers.evaluating import EvaluatingTrainer, StopRequest
from kd.trainers.progress import Progress
from kd.trainers.state import Batch, C

log = logging.getLogger("kd")

Terms = dict[str, Tensor]
"""Detached 0-d loss terms by name, for the log."""
MAX_BAD_STEPS = 10
"""So many optimizer steps in a row without finite gradients end the run: it has diverged."""


class BaseTrainer(EvaluatingTrainer[C], ABC):
    """Everything general about training: the loop, accumulation, clipping, schedule, evaluation, checkpoints, logging.

    A trainer implements `_prepare_batch`, `_forward` and `_compute_loss`; the rest are optional hooks.
    The gradient of an optimizer step is that of the mean loss over all valid units of its window, however
    the window is cut into micro-batches.

    Args:
        model: The model that is trained; moved to `device`.
        optimizer: Built from the config (AdamW, no decay on norms) if None.
        train_loader, val_loader: Iterables of batches with a length. A `PositionedLoader` can restore its
            position exactly; others are fast-forwarded. Either may be None if its method is not called. Several
            processes are given the same loaders, whose batches are dealt to them (`kd.trainers.dealing`).
        lr_scheduler: Stepped once per optimizer step; linear warm-up, then cosine to 0, if None.
        config: The trainer's configuration; its class's defaults if None.
        device: Where to train; the model's own device if None.
        run_dir: Where checkpoints and history.json go; the working directory, and no history file, if None.
    """

    # --- what a trainer implements -------------------------------------------------------------------------------

    @abstractmethod
    def _forward(self, batch: Batch) -> Any:
        """Run the model(s); the trained one as `self.module`, which with several processes is more than the model."""

    @abstractmethod
    def _compute_loss(self, outputs: Any, batch: Batch) -> tuple[Tensor, Terms]:
        """Return the mean loss over the batch's valid units (0-d, with a graph) and its detached terms.

        A loss with parts that are means over different units is (K,), and `_count_units` then gives (K,) too.
        """

    def _get_extra_log_info(self, batch: Batch) -> str:  # noqa: ARG002
        """Return further text for a log line; `batch` is the latest."""
        return ""

    def _count_tokens(self, batch: Batch) -> int:
        """Return the tokens that a batch's throughput counts."""
        return batch["input_ids"].numel()

    def _count_units(self, batch: Batch) -> Tensor:
        """Return how many units the loss of a batch is a mean over: its valid targets. 0-d, or (K,) for K parts."""
        return (batch["labels"] != IGNORE_INDEX).sum()

    def _sequence_lengths(self, batch: Batch) -> Tensor:
        """Return the lengths of a prepared batch's sequences, (B,): each ends with its last target, then comes padding.

        Of a batch that has no labels there are none, (0,).
        """
        if "labels" not in batch:
            return torch.zeros(0, dtype=torch.int64, device=self.device)
        places = torch.arange(1, batch["labels"].size(1) + 1, device=self.device)
        return (places * (batch["labels"] != IGNORE_INDEX)).amax(dim=1)

    # --- the loop ------------------------------------------------------------------------------------------------

    @final
    def train(self) -> dict[str, list[float | int | None]]:
        """Train to the end, from the start or from where a loaded checkpoint left off.

        Returns:
            The history's columns: train_loss, train_step, val_loss, val_ppl, val_step, and the loss terms.

        Raises:
            NumericError: if gradients stay non-finite, or the final validation loss is.
            Interrupted: after a request to `stop`, once a checkpoint is saved.
        """
        if self.train_loader is None:
            raise ValueError(f"{type(self).__name__}.train() needs a train_loader, and none was given")
        self._started = time.monotonic()
        self._announce()
        self.state = "training"
        self.model.train()
        with Progress(type(self).__name__, self.step, self.total_steps) as progress, self.stop.listening():
            try:
                self._evaluate_if_due()
                for window in self._windows():
                    self._train_window(window, progress)
                self._finish()
            except StopRequest:
                self._save_and_stop()
        self.state = "completed"
        self.raise_if_stopped()  # asked during the final save
        empty: dict[str, list[float | int | None]] = {"train_loss": [], "val_loss": [], "val_ppl": []}
        return {**empty, **self.history.train, **self.history.validation}

    @final
    def training_step(self, batch: Batch, units: Tensor | None = None) -> dict[str, float]:
        """Add one micro-batch's gradient to the parameters'; take no optimizer step.

        Args:
            batch: As the loader gives it.
            units: Valid units of the whole window that the loss is normalised by; the batch's own, of all processes
                together, if None.

        Returns:
            `loss` (the batch's mean) and the loss terms. With `precision=float16` the gradients are scaled.
        """
        prepared = self._prepare_batch(batch)
        count = self._count_units(prepared)
        terms = self._backward(prepared, count, reduce_tensor(count, op="sum") if units is None else units)
        return {name: float(value.sum()) for name, value in terms.items()}

    def _windows(self) -> Iterator[list[Dealt]]:
        """Yield this process's part of the windows that are left, from the current epoch and batch on."""
        while not self._is_over():
            assert self.train_loader is not None
            batches = deal(self.train_loader, self.epoch, self.batch_in_epoch)
            self._settle_rng()
            while window := list(itertools.islice(batches, self.config.gradient_accumulation_steps)):
                self.batch_in_epoch = position_after(self.train_loader, self.batch_in_epoch, len(window))
                yield window
                if self._is_over():
                    return
            self.epoch += 1
            self.batch_in_epoch = 0

    def _is_over(self) -> bool:
        return self.step >= self.total_steps or self._has_stopped_gaining()

    def _train_window(self, window: list[Dealt], progress: Progress) -> None:
        batches = [self._prepare_batch(dealt.batch) for dealt in window]
        counts = [self._count_units(batch) * dealt.counts for batch, dealt in zip(batches, window, strict=True)]
        # clamp_min stays on the device; max(1, int(n)) would stall a GPU once per window.
        units = reduce_tensor(torch.stack(counts).sum(dim=0), op="sum").clamp_min(1)
        counting = [batch for batch, dealt in zip(batches, window, strict=True) if dealt.counts]
        tokens = sum_of_all(sum(self._count_tokens(batch) for batch in counting))
        lengths = [self._sequence_lengths(batch) for batch in counting]
        first = self.step
        for _ in range(min(self.optimization_epochs, self.total_steps - first)):
            for index, (batch, count) in enumerate(zip(batches, counts, strict=True)):
                self._record_terms(self._backward(batch, count, units, index == len(batches) - 1), count)
            self._optimizer_step()
            self._meter.tokens += tokens
            if lengths:
                self._meter.add_lengths(torch.cat(lengths))
            self.step += 1
            self._after_step(batches[-1], progress)
        # Not within a window: a checkpoint, which either may lead to, knows positions between windows only.
        self._evaluate_if_due()
        if self.step // self.config.save_interval > first // self.config.save_interval and self.step < self.total_steps:
            self._save()
        self.raise_if_stopped()

    def _record_terms(self, terms: Terms, count: Tensor) -> None:
        if count.ndim == 0:
            self._meter.add(terms, weight=count)
            return
        for name, value in terms.items():
            own = count if name == "loss" else count[self.units_of_terms.get(name, -1)]
            self._meter.add({name: value}, weight=own)

    def _backward(self, batch: Batch, count: Tensor, units: Tensor, is_last: bool = True) -> Terms:
        with self.strategy.micro_batch(is_last):
            with self.precision.autocast():
                loss, terms = self._compute_loss(self._forward(batch), batch)
            # Gradients of several processes are averaged, not summed.
            share = (loss * (count / units.clamp_min(1))).sum() * self.world_size
            self.precision.scale(share).backward()  # type: ignore[no-untyped-call]
        self.strategy.check_called()
        return {"loss": loss.detach(), **terms}

    def _optimizer_step(self) -> None:
        self.precision.unscale(self.optimizer)
        norm = self.strategy.grad_norm(self.model)
        if torch.isfinite(norm):
            # Not before: clipping by a NaN norm would spread it to all gradients and hide where it began.
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.gradient_clip, norm)
            self.precision.step(self.optimizer)
            if self.is_main:  # all have the same
                self._meter.add({"grad_norm": norm.detach()}, weight=torch.ones_like(norm))
            self._bad_steps = 0
            self._taken_steps += 1
        elif self.precision.can_lower_scale and first_nonfinite_gradient(self.model, self.strategy.whole) is not None:
            log.info(
                "step %d: float16 gradients overflowed; the step is not taken, and the loss scaled less", self.step + 1
            )
        else:
            self._warn_not_finite()
        self.precision.adapt()
        self._learning_rate = self.optimizer.param_groups[0]["lr"]  # of this step: the scheduler now moves on
        with warnings.catch_warnings():
            # A step that was not taken counts for the schedule too, which torch takes for a mistake.
            warnings.filterwarnings("ignore", "Detected call of .lr_scheduler")
            self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _warn_not_finite(self) -> None:
        self._bad_steps += 1
        name = first_nonfinite_gradient(self.model, self.strategy.whole)
        latest = self._meter.latest()
        latest.pop("grad_norm", None)  # an earlier step's
        terms = ", ".join(f"{key} {value:g}" for key, value in latest.items())
        cause = "each is, but their norm overflows" if name is None else f"first bad parameter: {name}"
        log.warning("step %d: gradients are not finite (%s; %s); the step is not taken", self.step + 1, terms, cause)
        if self._bad_steps >= MAX_BAD_STEPS:
            raise NumericError(
                f"The gradients of the last {MAX_BAD_STEPS} steps, up to step {self.step + 1}, were not finite "
                f"({terms}): training has diverged. Lower train.learning_rate={self.config.learning_rate:g}"
                " or lengthen train.warmup_steps."
            )

    def _after_step(self, batch: Batch, progress: Progress) -> None:
        progress.advance()
        if self.step % self.config.log_interval == 0 or self.step == self.total_steps:
            self._log(batch, progress)

    def _log(self, batch: Batch, progress: Progress) -> None:
        means, speed = self._meter.take()
        loss = means.pop("loss")
        self.current_loss = loss if math.isfinite(loss) else None
        row: dict[str, Number] = {"train_step": self.step, "train_loss": loss, "learning_rate": self._learning_rate}
        self.history.append(self.history.train, {**row, **means})
        self.history.timing.setdefault("tokens_per_second", []).append(round(speed, 1))
        extra = "".join(f"  {name} {means[name]:.4f}" for name in self.loss_terms)
        progress.report(self.step, loss, speed, extra + self._get_extra_log_info(batch))
        self._write_history()

    def _save_and_stop(self) -> None:
        assert self.stop.signum is not None
        self._save()
        raise Interrupted(
            f"Stopped at step {self.step}/{self.total_steps}, checkpoint saved. The same command continues from there.",
            self.stop.signum,
        )

    def _check_learned(self) -> None:
        """Refuse to call a model trained that is what it was before."""
        if self.step > 0 and self._taken_steps == 0:
            raise NumericError(
                f"None of the {self.step} optimizer steps was taken, since their gradients were not finite: nothing "
                "was learned. Look for NaN in the data, the teacher or the weights it began with; else lower "
                f"train.learning_rate={self.config.learning_rate:g}, or use train.precision=float32."
            )

    def _finish(self) -> None:
        """Evaluate on the whole validation set, and save.

        Raises:
            NumericError: if no step was taken, or the validation loss is not finite.
        """
        self._check_learned()
        if self.val_loader is not None:
            if self.config.early_stopping_patience is not None:
                self._return_to_best()
            log.info("Final evaluation, on the whole validation set")
            self.final_scores = self.score()
            self._record_final_scores(self.final_scores)
            loss = self.final_scores.metrics()["val_loss"]
            assert loss is not None
            if not math.isfinite(loss):
                raise NumericError(f"the final validation loss is {loss}: training has diverged. Lower the rate.")
        self._save()
        self._write_history()


def first_nonfinite_gradient(model: nn.Module, whole: Callable[[Tensor], Tensor]) -> str | None:
    """Return the name of the first parameter whose `whole` gradient holds NaN or infinity, None if all are finite."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(whole(parameter.grad)).all():
            return name
    return None
