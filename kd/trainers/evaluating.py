"""Evaluation on the way and at the end: scores, records, and when training has stopped gaining."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sized

import torch

from kd.data import BlockLoader
from kd.distributed import gather_objects, largest_of_all
from kd.errors import Interrupted
from kd.runs import Number
from kd.stop import STOPPED
from kd.trainers.dealing import check_dealing, deal
from kd.trainers.evaluation import BlockScores, Scores
from kd.trainers.progress import tracked
from kd.trainers.state import Batch, C, TrainerState

log = logging.getLogger("kd")


class StopRequest(Interrupted):
    """Leaves the loop at the next point where the state is whole; outside of a loop, whatever there is."""


class EvaluatingTrainer(TrainerState[C], ABC):
    """A trainer's evaluations, apart from the loop that asks for them (see `BaseTrainer` for the arguments)."""

    @abstractmethod
    def _prepare_batch(self, batch: Batch) -> Batch:
        """Move a batch to the device and build what the forward pass needs."""

    def _prepare_for_scoring(self, batch: Batch) -> Batch:
        """Prepare a batch for `_score_batch`."""
        return self._prepare_batch(batch)

    def _score_batch(self, batch: Batch, with_teacher: bool) -> Scores:
        """Score a prepared batch, also against a teacher if asked and at hand; only needed for evaluation."""
        raise NotImplementedError(f"{type(self).__name__} cannot evaluate: it has no _score_batch")

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
    ) -> Scores:
        """Return the scores, per block or example, behind `evaluate`; `with_teacher=False` spares its forward pass.

        Whatever `precision` trains, scores are computed in the weights' own dtype, float32: so that they compare.
        """
        loader = self.val_loader if loader is None else loader
        if loader is None:
            raise ValueError(f"{type(self).__name__}.evaluate() needs a val_loader, and none was given")
        if self.world_size > 1 and loader is not self.val_loader:
            check_dealing(None, loader)
        before, training = self.state, self.model.training
        self.state = "evaluating"
        self.model.eval()
        try:
            parts: list[Scores] = []
            seen = 0
            for dealt in tracked(deal(loader), "Evaluation", self._batches_to_score(loader, max_blocks)):
                self.raise_if_stopped()
                with torch.autocast(self.device.type, enabled=False):
                    part = self._score_batch(self._prepare_for_scoring(dealt.batch), with_teacher)
                # A batch of each process at a time, by rank: the order of the loader.
                new = [found for found in gather_objects(part if dealt.counts else None) if found is not None]
                parts += new
                seen += sum(map(len, new))
                if max_blocks is not None and seen >= max_blocks:
                    break
        finally:
            self.model.train(training)
            self.state = before
        if not parts:
            raise ValueError("the validation loader is empty: there is nothing to evaluate")
        scores = parts[0].joined(parts)
        return scores if max_blocks is None else scores.first(max_blocks)

    def _batches_to_score(self, loader: Iterable[Batch], max_blocks: int | None) -> int | None:
        """Return about how many batches this process scores, None if it cannot be told."""
        if not isinstance(loader, Sized):
            return None
        limit = len(loader) if max_blocks is None else -(-max_blocks // self.config.batch_size)
        return -(-min(len(loader), limit) // self.world_size)

    def _evaluate_if_due(self) -> None:
        steps = self.history.validation.get("val_step", [])
        last = int(steps[-1] or 0) if steps else 0
        interval = self.config.eval_interval
        is_due = self.step < self.total_steps and self.step // interval > last // interval
        if self.val_loader is None or not is_due:
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
        if self._has_stopped_gaining():
            log.info(
                "Stopped early at step %d of %d: %d evaluations in a row (train.early_stopping_patience) were not "
                "below that of step %s, the best",
                self.step,
                self.total_steps,
                self._evaluations_without_gain,
                self.best_step,
            )
        if self.best_step not in (None, self.step):
            assert self.best_step is not None
            log.info("Going back to the weights of step %d, whose validation loss is lowest", self.best_step)
            self.strategy.load_weights(self._checkpoint_path(self.best_step), self.model)
            self.history.totals["final_step"] = self.best_step

    @property
    def final_step(self) -> int:
        """The step of which the weights are: the latest, unless training has gone back to the best."""
        return int(self.history.totals.get("final_step") or self.step)

    def _record_final_scores(self, scores: Scores) -> None:
        """Enter the final evaluation in place of an earlier one of the same weights: each value has its own step."""
        steps = self.history.validation.get("val_step", [])
        if self.final_step not in steps:
            self._record_scores(scores)
            return
        row = steps.index(self.final_step)
        for name, value in self._row_of(scores).items():
            self.history.validation[name][row] = self.history.finite(name, value)
        log.info("final, of step %d  %s", self.final_step, _describe(self._row_of(scores)))
        self._write_history()

    def _row_of(self, scores: Scores) -> dict[str, Number]:
        row: dict[str, Number] = dict(scores.metrics())
        if isinstance(scores, BlockScores):
            self.history.totals["teacher_val_ppl"] = self.history.finite("teacher_val_ppl", row.pop("teacher_val_ppl"))
            row["val_bits_per_byte"] = self._bits_per_byte(scores)
        return row

    def _record_scores(self, scores: Scores) -> None:
        row: dict[str, Number] = {"val_step": self.step, **self._row_of(scores)}
        self.history.append(self.history.validation, row)
        log.info("step %d  %s", self.step, _describe(row))
        # The last evaluation takes all blocks: compare on those that every evaluation has seen.
        limit = self.config.eval_blocks
        loss = (scores if limit is None else scores.first(limit)).metrics()["val_loss"]
        assert loss is not None
        if math.isfinite(loss) and (self.best_val_loss is None or loss < self.best_val_loss):
            self.best_val_loss, self.best_step = loss, self.step
        self._write_history()

    def record_part(self, part: str, scores: Scores) -> None:
        """Enter a part's loss, and what else is known of it, into the history as single values: `test_loss`, ..."""
        for key, value in scores.metrics().items():
            if value is not None:
                name = key.replace("val_", f"{part}_", 1)
                self.history.totals[name] = self.history.finite(name, value)
        self._write_history()

    def _bits_per_byte(self, scores: BlockScores) -> float | None:
        """Bits per byte of the raw text, which compares across tokenizers; None for loaders of unknown text."""
        if not isinstance(self.val_loader, BlockLoader):
            return None
        loss = scores.mean(scores.nll)
        assert loss is not None
        return loss / math.log(2) * self.val_loader.dataset.tokens_per_byte

    def raise_if_stopped(self) -> None:
        """Leave if a process was asked to stop; all leave at the same point, since all ask each other.

        Raises:
            Interrupted: if so.
        """
        if signum := largest_of_all(self.stop.signum or 0):
            self.stop.signum = signum
            raise StopRequest(STOPPED, signum)


def _describe(row: dict[str, Number]) -> str:
    return "  ".join(f"{key} {value:.4f}" for key, value in row.items() if isinstance(value, float))
