"""BaseTrainer: the only training loop. A window is the micro-batches of one optimizer step."""

import itertools
import logging
import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, final

import torch
from torch import Tensor, nn

from kd.checkpoint import load_weights
from kd.data import BlockLoader
from kd.errors import Interrupted, NumericError
from kd.losses import IGNORE_INDEX
from kd.runs import Number
from kd.trainers.evaluation import BlockScores, join
from kd.trainers.progress import Progress
from kd.trainers.state import Batch, C, TrainerState

log = logging.getLogger("kd")

Terms = dict[str, Tensor]
"""Detached 0-d loss terms by name, for the log."""


class _StopRequest(Exception):  # noqa: N818 - not an error
    """Leaves the loop at the next point where the state is whole."""


MAX_BAD_STEPS = 10
"""So many optimizer steps in a row without finite gradients end the run: it has diverged."""


class BaseTrainer(TrainerState[C], ABC):
    """Everything general about training: the loop, accumulation, clipping, schedule, evaluation, checkpoints, logging.

    A trainer implements `_prepare_batch`, `_forward` and `_compute_loss`; the rest are optional hooks.
    The gradient of an optimizer step is that of the mean loss over all valid units of its window, however
    the window is cut into micro-batches.

    Args:
        model: The model that is trained; moved to `device`.
        optimizer: Built from the config (AdamW, no decay on norms) if None.
        train_loader, val_loader: Iterables of batches with a length. A `BlockLoader` can restore its
            position exactly; others are fast-forwarded. Either may be None if its method is not called.
        lr_scheduler: Stepped once per optimizer step; linear warm-up, then cosine to 0, if None.
        config: The trainer's configuration; its class's defaults if None.
        device: Where to train; the model's own device if None.
        run_dir: Where checkpoints and history.json go; the working directory, and no history file, if None.
    """

    # --- what a trainer implements -------------------------------------------------------------------------------

    @abstractmethod
    def _prepare_batch(self, batch: Batch) -> Batch:
        """Move a batch to the device and build what the forward pass needs."""

    @abstractmethod
    def _forward(self, batch: Batch) -> Any:
        """Run the model(s)."""

    @abstractmethod
    def _compute_loss(self, outputs: Any, batch: Batch) -> tuple[Tensor, Terms]:
        """Return the mean loss over the batch's valid units (0-d, with a graph) and its detached terms.

        A loss with parts that are means over different units is (K,), and `_count_units` then gives (K,) too.
        """

    def _score_batch(self, batch: Batch, with_teacher: bool) -> BlockScores:
        """Score a prepared batch, also against a teacher if asked and at hand; only needed for evaluation."""
        raise NotImplementedError(f"{type(self).__name__} cannot evaluate: it has no _score_batch")

    def _get_extra_log_info(self, batch: Batch) -> str:  # noqa: ARG002
        """Return further text for a log line; `batch` is the latest."""
        return ""

    def _count_tokens(self, batch: Batch) -> int:
        """Return the tokens that a batch's throughput counts."""
        return batch["input_ids"].numel()

    def _count_units(self, batch: Batch) -> Tensor:
        """Return how many units the loss of a batch is a mean over: its valid targets. 0-d, or (K,) for K parts."""
        return (batch["labels"] != IGNORE_INDEX).sum()

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
                    self._train_window(window)
                    self._after_step(window[-1], progress)
                self._finish()
            except _StopRequest:
                self._save_and_stop()
        self.state = "completed"
        empty: dict[str, list[float | int | None]] = {"train_loss": [], "val_loss": [], "val_ppl": []}
        return {**empty, **self.history.train, **self.history.validation}

    @final
    def training_step(self, batch: Batch, units: Tensor | None = None) -> dict[str, float]:
        """Add one micro-batch's gradient to the parameters'; take no optimizer step.

        Args:
            batch: As the loader gives it.
            units: Valid units of the whole window that the loss is normalised by; the batch's own if None.

        Returns:
            `loss` (the batch's mean) and the loss terms. With `precision=float16` the gradients are scaled.
        """
        prepared = self._prepare_batch(batch)
        count = self._count_units(prepared)
        terms = self._backward(prepared, count, count if units is None else units)
        return {name: float(value.sum()) for name, value in terms.items()}

    def _windows(self) -> Iterator[list[Batch]]:
        """Yield the windows that are left, from the current epoch and batch on."""
        while not self._is_over():
            batches = self._open_epoch()
            self._restore_pending_rng()
            while window := list(itertools.islice(batches, self.config.gradient_accumulation_steps)):
                self.batch_in_epoch += len(window)
                yield window
                if self._is_over():
                    return
            self.epoch += 1
            self.batch_in_epoch = 0

    def _is_over(self) -> bool:
        return self.step >= self.total_steps or self._has_stopped_gaining()

    def _open_epoch(self) -> Iterator[Batch]:
        loader = self.train_loader
        assert loader is not None
        if isinstance(loader, BlockLoader):
            loader.set_position(self.epoch, self.batch_in_epoch)
            return iter(loader)
        return itertools.islice(loader, self.batch_in_epoch, None)

    def _train_window(self, window: list[Batch]) -> None:
        batches = [self._prepare_batch(batch) for batch in window]
        counts = [self._count_units(batch) for batch in batches]
        # clamp_min stays on the device; max(1, int(n)) would stall a GPU once per window.
        units = torch.stack(counts).sum().clamp_min(1)
        for batch, count in zip(batches, counts, strict=True):
            self._meter.add(self._backward(batch, count, units), weight=count)
        self._optimizer_step()
        self._meter.tokens += sum(self._count_tokens(batch) for batch in batches)
        self.step += 1

    def _backward(self, batch: Batch, count: Tensor, units: Tensor) -> Terms:
        with self.precision.autocast():
            loss, terms = self._compute_loss(self._forward(batch), batch)
        share = (loss * (count / units.clamp_min(1))).sum()
        self.precision.scale(share).backward()  # type: ignore[no-untyped-call]
        return {"loss": loss.detach(), **terms}

    def _optimizer_step(self) -> None:
        self.precision.unscale(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if torch.isfinite(norm):
            # Not before: clipping by a NaN norm would spread it to all gradients and hide where it began.
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.gradient_clip, norm)
            self.precision.step(self.optimizer)
            self._meter.add({"grad_norm": norm.detach()}, weight=torch.ones_like(norm))
            self._bad_steps = 0
        elif self.precision.can_lower_scale:
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
        name = first_nonfinite_gradient(self.model)
        latest = self._meter.latest()
        latest.pop("grad_norm", None)  # an earlier step's
        terms = ", ".join(f"{key} {value:g}" for key, value in latest.items())
        log.warning(
            "step %d: gradients are not finite (%s; first bad parameter: %s); the step is not taken",
            self.step + 1,
            terms,
            name,
        )
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
        self._evaluate_if_due()
        if self.step % self.config.save_interval == 0 and self.step < self.total_steps:
            self._save()
        self._raise_if_stopped()

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

    def _raise_if_stopped(self) -> None:
        if self.stop.signum is not None:
            raise _StopRequest

    def _save_and_stop(self) -> None:
        assert self.stop.signum is not None
        self._save()
        raise Interrupted(
            f"Stopped at step {self.step}/{self.total_steps}, checkpoint saved. The same command continues from there.",
            self.stop.signum,
        )

    # --- evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self, loader: Iterable[Batch] | None = None, max_blocks: int | None = None) -> dict[str, float | None]:
        """Score the model on a loader's blocks without training.

        Args:
            loader: The validation loader if None.
            max_blocks: Score only the first so many blocks.

        Returns:
            val_loss (nats per token at temperature 1: summed NLL / number of tokens), val_ppl = exp(val_loss), and
            val_kl, val_agreement, teacher_val_ppl where a teacher is at hand (else None).
        """
        return self.score(loader, max_blocks).metrics()

    @torch.no_grad()
    def score(
        self, loader: Iterable[Batch] | None = None, max_blocks: int | None = None, *, with_teacher: bool = True
    ) -> BlockScores:
        """Return the per-block scores behind `evaluate`; `with_teacher=False` spares the teacher's forward pass."""
        loader = self.val_loader if loader is None else loader
        if loader is None:
            raise ValueError(f"{type(self).__name__}.evaluate() needs a val_loader, and none was given")
        before, training = self.state, self.model.training
        self.state = "evaluating"
        self.model.eval()
        try:
            parts: list[BlockScores] = []
            seen = 0
            for batch in loader:
                self._raise_if_stopped()
                with self.precision.autocast():
                    parts.append(self._score_batch(self._prepare_batch(batch), with_teacher))
                seen += len(parts[-1].tokens)
                if max_blocks is not None and seen >= max_blocks:
                    break
        finally:
            self.model.train(training)
            self.state = before
        if not parts:
            raise ValueError("the validation loader is empty: there is nothing to evaluate")
        scores = join(parts, torch.cat)
        return scores if max_blocks is None else scores.first(max_blocks)

    def _evaluate_if_due(self) -> None:
        due = self.step > 0 and self.step % self.config.eval_interval == 0 and self.step < self.total_steps
        steps = self.history.validation.get("val_step", [])
        if self.val_loader is None or not due or (steps and steps[-1] == self.step):
            return
        self._record_scores(self.score(max_blocks=self.config.eval_blocks))
        self._watch_for_gain()

    def _watch_for_gain(self) -> None:
        """Keep the weights of a new lowest loss, if training may have to go back to them."""
        if self.config.early_stopping_patience is None:
            return
        if self.best_step == self.step:
            self._evaluations_without_gain = 0
            self._save()
        else:
            self._evaluations_without_gain += 1

    def _has_stopped_gaining(self) -> bool:
        patience = self.config.early_stopping_patience
        return patience is not None and self._evaluations_without_gain >= patience

    def _return_to_best(self) -> None:
        """Load the weights of the lowest validation loss."""
        steps = self.history.validation.get("val_step", [])
        if not steps or steps[-1] != self.step:
            self._record_scores(self.score(max_blocks=self.config.eval_blocks))
        for column in self.history.validation.values():
            column.pop()  # the final evaluation takes its place
        if self.best_step not in (None, self.step):
            log.info("Going back to the weights of step %d, whose validation loss is lowest", self.best_step)
            load_weights(self._checkpoint_path(self.best_step), self.model)

    def _record_scores(self, scores: BlockScores) -> None:
        row: dict[str, Number] = {"val_step": self.step, **scores.metrics()}
        self.history.totals["teacher_val_ppl"] = self.history.finite("teacher_val_ppl", row.pop("teacher_val_ppl"))
        row["val_bits_per_byte"] = self._bits_per_byte(scores)
        self.history.append(self.history.validation, row)
        log.info("step %d  %s", self.step, _describe(row))
        # The last evaluation takes all blocks: compare on those that every evaluation has seen.
        limit = self.config.eval_blocks
        loss = (scores if limit is None else scores.first(limit)).metrics()["val_loss"]
        assert loss is not None
        if math.isfinite(loss) and (self.best_val_loss is None or loss < self.best_val_loss):
            self.best_val_loss, self.best_step = loss, self.step
        self._write_history()

    def record_test(self, scores: BlockScores) -> None:
        """Enter the test part's loss and perplexity into the history."""
        metrics = scores.metrics()
        for key in ("loss", "ppl"):
            self.history.totals[f"test_{key}"] = self.history.finite(f"test_{key}", metrics[f"val_{key}"])
        self._write_history()

    def _bits_per_byte(self, scores: BlockScores) -> float | None:
        """Bits per byte of the raw text, which compares across tokenizers; None for loaders of unknown text."""
        if not isinstance(self.val_loader, BlockLoader):
            return None
        loss = scores.mean(scores.nll)
        assert loss is not None
        return loss / math.log(2) * self.val_loader.dataset.tokens_per_byte

    def _finish(self) -> None:
        """Evaluate on the whole validation set, and save."""
        if self.val_loader is not None:
            if self.config.early_stopping_patience is not None:
                self._return_to_best()
            self.final_scores = self.score()
            steps = self.history.validation.get("val_step", [])
            if not steps or steps[-1] != self.step:
                self._record_scores(self.final_scores)
            loss = self.final_scores.metrics()["val_loss"]
            assert loss is not None
            if not math.isfinite(loss):
                raise NumericError(f"the final validation loss is {loss}: training has diverged. Lower the rate.")
        self._save()
        self._write_history()


def first_nonfinite_gradient(model: nn.Module) -> str:
    """Return the name of the first parameter whose gradient holds NaN or infinity, `none` if all are finite."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return name
    return "none"


def _describe(row: dict[str, Number]) -> str:
    return "  ".join(f"{key} {value:.4f}" for key, value in row.items() if isinstance(value, float))
