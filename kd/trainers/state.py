"""What a trainer holds at a step: model, optimizer, position, history; and how that is saved and restored."""

import logging
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kd.checkpoint import holds_adapters, load_state, save_checkpoint
from kd.config import TrainerConfig
from kd.distributed import get_rank, get_world_size, require_group, wait_for_all
from kd.errors import ConfigError
from kd.files import write_json
from kd.heads import enable_gradient_checkpointing
from kd.model import StudentModel, forward_flops_per_token, num_parameters
from kd.optim import configure_optimizer, create_schedule
from kd.runs import History
from kd.stop import StopSignal
from kd.trainers.dealing import check_dealing, num_batches
from kd.trainers.evaluation import Scores
from kd.trainers.machine import peak_memory_bytes, restore_rng, rng_state
from kd.trainers.meter import Meter
from kd.trainers.precision import Precision
from kd.trainers.strategies import make_strategy, random_numbers_of_its_own

log = logging.getLogger("kd")

Batch = dict[str, Tensor]
"""`input_ids` and `labels` (B, L) int64, `block_id` (B,); labels are next-token targets, -100 is ignored."""
C = TypeVar("C", bound=TrainerConfig)


class TrainerState(Generic[C]):
    """The state of a training run, apart from the loop that moves it on (see `BaseTrainer` for the arguments)."""

    config_class: ClassVar[type[TrainerConfig]] = TrainerConfig
    loss_terms: tuple[str, ...] = ()
    """Terms that `_compute_loss` reports; each is a column of the history."""
    units_of_terms: Mapping[str, int] = {}
    """Where a loss has K parts: which of its units a term is a mean over, by name; the last one if not named."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        train_loader: Iterable[Batch] | None = None,
        val_loader: Iterable[Batch] | None = None,
        *,
        lr_scheduler: LRScheduler | None = None,
        config: C | None = None,
        device: torch.device | str | None = None,
        run_dir: Path | None = None,
    ) -> None:
        self.config: C = config if config is not None else self.config_class()  # type: ignore[assignment]
        self.device = torch.device(device) if device is not None else next(model.parameters()).device
        self.model = model.to(self.device)
        self.train_loader, self.val_loader = train_loader, val_loader
        self.run_dir = run_dir
        self._join(has_optimizer=optimizer is not None)
        self.total_steps = self._count_steps()
        self._check_early_stopping()
        # Before the optimizer, which must be of the weights that this leaves.
        self.strategy = make_strategy(self.config.strategy, self._trained_module)
        self.optimizer = optimizer or configure_optimizer(
            self.model, self.config.optimizer, lr=self.config.learning_rate, weight_decay=self.config.weight_decay
        )
        self.lr_scheduler = lr_scheduler or self._create_schedule()
        self.precision = Precision(self.config.precision, self.device)
        if self.config.gradient_checkpointing:
            enable_gradient_checkpointing(self.model)

        self.state = "initialized"
        self.step = 0
        self.epoch = 0
        self.batch_in_epoch = 0
        self.current_loss: float | None = None
        self.best_val_loss: float | None = None
        self.best_step: int | None = None
        self.final_scores: Scores | None = None
        self.history = History()
        self.stop = StopSignal()
        self._bad_steps = 0
        self._taken_steps = 0
        self._evaluations_without_gain = 0
        self._meter = Meter(("loss", "grad_norm", *self.loss_terms))
        self._pending_rng: dict[str, Any] | None = None
        self._has_random_numbers = False
        self._learning_rate = self.config.learning_rate
        self._wall_before = 0.0
        self._started = time.monotonic()

    def _join(self, has_optimizer: bool) -> None:
        """Find out which of several processes this one is, and check that they can work together."""
        require_group()
        self.is_main, self.world_size = get_rank() == 0, get_world_size()
        self.use_ddp = self.world_size > 1 and self.config.strategy == "ddp"
        if self.world_size > 1:
            check_dealing(self.train_loader, self.val_loader)
        if has_optimizer and self.config.strategy == "fsdp":
            raise ConfigError("train.strategy=fsdp makes its own optimizer, of parts of weights: give none.")
        if self.config.strategy == "fsdp" and holds_adapters(self.model):
            raise ConfigError("train.strategy=fsdp does not go with adapters: set train.strategy=ddp.")

    def _create_schedule(self) -> LRScheduler:
        config = self.config
        steps = max(self.total_steps, 1)
        return create_schedule(config.schedule, self.optimizer, config.warmup_steps, steps, config.decay_steps)

    def _check_early_stopping(self) -> None:
        if (
            self.config.early_stopping_patience is not None
            and self.train_loader is not None
            and self.val_loader is None
        ):
            raise ValueError("early_stopping_patience watches the validation loss, and no val_loader was given")

    def _trained_module(self) -> nn.Module:
        """Return the module whose forward pass training runs: the model, or one that holds it."""
        return self.model

    @property
    def module(self) -> nn.Module:
        """What `_forward` must call in training: the module whose forward pass it runs, or what several processes have
        wrapped it in. The model itself without its wrapper is `model`.
        """
        return self.strategy.module

    @property
    def optimization_epochs(self) -> int:
        """Optimizer steps on each window of batches."""
        return 1

    def _get_extra_config_info(self) -> dict[str, Any]:
        """Return further lines for the settings that are logged at the start."""
        return {}

    def _get_extra_checkpoint_state(self) -> dict[str, Any] | None:
        """Return further state for checkpoints (nested dicts, lists, numbers, tensors)."""
        return None

    def _load_extra_checkpoint_state(self, state: dict[str, Any]) -> None:
        """Restore what `_get_extra_checkpoint_state` returned."""

    def _flops_per_token(self, length: float) -> float:
        """Return the training FLOPs of one token: forward and backward of the trained model (3 forward passes).

        Weights beside adapters need no gradients of their own (2 forward passes).

        Args:
            length: Mean length of the sequence that a token is in.
        """
        passes = 2 if holds_adapters(self.model) else 3
        if isinstance(self.model, StudentModel):
            return passes * forward_flops_per_token(self.model.config, length)
        return 2.0 * passes * num_parameters(self.model)

    def _flops(self) -> float:
        """Return the training FLOPs so far, without those of padding; all processes must ask."""
        tokens, length = self._meter.sequence_tokens()
        if tokens == 0:  # batches of a kind of their own, of which no more is known
            tokens, length = self._meter.tokens, self._longest()
        return tokens * self._flops_per_token(length)

    def _longest(self) -> int:
        return self.model.config.max_seq_len if isinstance(self.model, StudentModel) else 1

    @property
    def _batches_per_step(self) -> int:
        """Micro-batches of an optimizer step, of all processes together."""
        return self.config.gradient_accumulation_steps * self.world_size

    def _count_steps(self) -> int:
        if self.train_loader is None:
            return 0
        windows = math.ceil(num_batches(self.train_loader) / self._batches_per_step)
        steps = windows * self.config.num_epochs * self.optimization_epochs
        return steps if self.config.max_steps is None else min(steps, self.config.max_steps)

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def save_checkpoint(self, path: str | Path) -> None:
        """Write a checkpoint directory: weights, optimizer, scheduler, position, losses, config, RNG, history.

        Of several processes all must call it, and the first one writes. What it writes does not depend on how many they
        are, or on their strategy.
        """
        before, self.state = self.state, "checkpointing"
        weights = self.strategy.weights(self.model)
        state = {
            "optimizer": self.strategy.optimizer_state(self.optimizer),
            "scheduler": self.lr_scheduler.state_dict(),
            "epoch": self.epoch,
            "batch_in_epoch": self.batch_in_epoch,
            "step": self.step,
            "current_loss": self.current_loss,
            "best_val_loss": self.best_val_loss,
            "best_step": self.best_step,
            "config": asdict(self.config) | {"gradient_accumulation_steps": self._batches_per_step},
            "rng": rng_state(),
            "meter": self._meter.state_dict(),
            "bad_steps": self._bad_steps,
            "taken_steps": self._taken_steps,
            "loss_scale": self.precision.state_dict(),
            "evaluations_without_gain": self._evaluations_without_gain,
            "history": asdict(self.history),
            "wall_seconds": self._wall_seconds(),
            "extra": self._get_extra_checkpoint_state(),
        }
        if self.is_main:
            save_checkpoint(Path(path), weights, state)
        if self.world_size > 1:
            wait_for_all()
        self.state = before

    def load_checkpoint(self, path: str | Path, *, weights_only: bool = False) -> None:
        """Restore what `save_checkpoint` wrote; with `weights_only` the model's weights alone.

        Raises:
            IntegrityError: if the checkpoint is damaged or of another architecture.
        """
        directory = Path(path)
        self.strategy.load_weights(directory, self.model)
        if weights_only:
            return
        state = load_state(directory)
        self.strategy.load_optimizer_state(self.optimizer, state["optimizer"])
        self.lr_scheduler.load_state_dict(state["scheduler"])
        self.config = type(self.config)(**self._divided(state["config"]))
        self.total_steps = self._count_steps()
        self.epoch, self.batch_in_epoch, self.step = state["epoch"], state["batch_in_epoch"], state["step"]
        self.current_loss = state["current_loss"]
        self.best_val_loss, self.best_step = state["best_val_loss"], state["best_step"]
        self.history = History(**state["history"])
        meter = state["meter"]
        # An earlier checkpoint has no lengths: it counted all sequences as the longest.
        earlier = {"lengths": torch.tensor([meter["tokens"], meter["tokens"] * self._longest()])}
        self._meter.load_state_dict({"lengths": earlier, **meter}, self.device)
        self._bad_steps = state["bad_steps"]
        self._taken_steps = state.get("taken_steps", self.step - self._bad_steps)  # earlier checkpoints do not say
        self.precision.load_state_dict(state["loss_scale"])
        self._evaluations_without_gain = state["evaluations_without_gain"]
        self._wall_before = state["wall_seconds"]
        self._pending_rng = state["rng"]
        if state["extra"] is not None:
            self._load_extra_checkpoint_state(state["extra"])

    def _divided(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return a checkpoint's settings with each process's share of the micro-batches of a step."""
        batches, rest = divmod(config["gradient_accumulation_steps"], self.world_size)
        if rest:
            total = config["gradient_accumulation_steps"]
            raise ConfigError(
                f"An optimizer step of this run has {total} micro-batches, which {self.world_size} processes cannot "
                f"share alike: start a number of processes that divides {total}."
            )
        return {**config, "gradient_accumulation_steps": batches}

    def _settle_rng(self) -> None:
        # Only now: opening a foreign loader may draw random numbers.
        if self._pending_rng is not None:
            restore_rng(self._pending_rng)
            self._pending_rng, self._has_random_numbers = None, False
        if not self._has_random_numbers:
            random_numbers_of_its_own()
            self._has_random_numbers = True

    def _save(self) -> None:
        self.save_checkpoint(self.last_checkpoint)

    @property
    def last_checkpoint(self) -> Path:
        """Where the checkpoint of the step it is at goes."""
        return self._checkpoint_path(self.step)

    def _checkpoint_path(self, step: int | None) -> Path:
        root = Path() if self.run_dir is None else self.run_dir
        return root / self.config.checkpoint_dir / f"checkpoint-{step}"

    # --- records -------------------------------------------------------------------------------------------------

    def _wall_seconds(self) -> float:
        return self._wall_before + time.monotonic() - self._started

    def _write_history(self) -> None:
        totals = self.history.totals
        totals["tokens"] = self._meter.tokens
        totals["flops"] = self._flops()
        totals["parameters"] = num_parameters(self.model)
        self.history.timing["wall_seconds"] = round(self._wall_seconds(), 3)
        self.history.timing["peak_memory_bytes"] = peak_memory_bytes(self.device)
        if self.run_dir is not None and self.is_main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            write_json(self.run_dir / "history.json", self.history.to_json())

    def _unusual_settings(self) -> dict[str, Any]:
        """Settings of the base that are not as specified, for the log."""
        usual = TrainerConfig()
        names = ("optimizer", "schedule", "precision", "gradient_checkpointing", "compile", "early_stopping_patience")
        return {name: value for name in names if (value := getattr(self.config, name)) != getattr(usual, name)}

    def _share_that_trains(self) -> dict[str, str]:
        """Return, for the log, how many weights train, where not all do."""
        count = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        return {} if count == num_parameters(self.model) else {"of which train": f"{count:,}"}

    def _announce(self) -> None:
        settings = {
            "parameters": f"{num_parameters(self.model):,}",
            **self._share_that_trains(),
            "device": self.device,
            "steps": self.total_steps,
            "batch": f"{self.config.batch_size} x {self.config.gradient_accumulation_steps}"
            + (f" x {self.world_size} processes ({self.config.strategy})" if self.world_size > 1 else ""),
            **self._unusual_settings(),
            **self._get_extra_config_info(),
        }
        log.info("%s: %s", type(self).__name__, ", ".join(f"{key} {value}" for key, value in settings.items()))
        if self.config.warmup_steps > self.total_steps:
            log.warning(
                "train.warmup_steps=%d exceeds the %d steps of this run: the learning rate only reaches %.0f %% of %g",
                self.config.warmup_steps,
                self.total_steps,
                100 * self.total_steps / self.config.warmup_steps,
                self.config.learning_rate,
            )
