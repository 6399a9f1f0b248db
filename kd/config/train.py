"""How to train: a configuration for each trainer, derived from a common base."""

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from kd.config.checks import require, require_finite, require_positive

OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("cosine", "linear", "constant", "wsd")
PRECISIONS = ("float32", "bfloat16", "float16")
STRATEGIES = ("ddp", "fsdp")
REWARDS = ("exact_text", "exact_answer")
"""As in `kd.rewards`."""

NOT_IN_IDENTITY = ("checkpoint_dir", "log_interval", "save_interval", "compile", "gradient_checkpointing", "strategy")
"""What changes no result but by rounding."""
LATER = ("optimizer", "schedule", "decay_steps", "precision", "early_stopping_patience")
"""What came later: as it was before, it does not enter, so that earlier runs are still known."""


@dataclass
class TrainerConfig:
    """What every trainer needs; each trainer's own configuration derives from it."""

    trainer: ClassVar[str] = ""
    """Name of the trainer that takes this configuration."""
    compiles: ClassVar[bool] = True
    """Whether `compile` has an effect."""
    shards: ClassVar[bool] = True
    """Whether the trainer can do with a part of the weights in each process (`strategy=fsdp`)."""

    batch_size: int = 8
    """Sequences (of preferences pairs, of GRPO prompts) per micro-batch."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; norm weights have none."""
    warmup_steps: int = 500
    """Linear warm-up, in optimizer steps."""
    num_epochs: int = 3
    """Passes over the training blocks."""
    gradient_clip: float = 1.0
    """Largest global norm of the gradient."""
    checkpoint_dir: str = "checkpoints/"
    """Relative to the run's directory."""
    log_interval: int = 50
    """Optimizer steps between log lines."""
    eval_interval: int = 500
    """Optimizer steps between evaluations."""
    save_interval: int = 1000
    """Optimizer steps between checkpoints."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step; of each process, where there are several."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, if that is sooner than num_epochs; null: no limit."""
    eval_blocks: int | None = None
    """Validation blocks, or examples, of the evaluations on the way (the last one takes all); null: all."""
    compile: bool = False
    """Let torch compile the student's body: slower to start, and results differ by rounding."""
    optimizer: str = "adamw"
    """adamw, adam (decay as part of the gradient) or sgd (momentum 0.9)."""
    schedule: str = "cosine"
    """After the warm-up: cosine or linear, down to 0; constant; or wsd (warm-up, stable, decay): constant, then linear
    down to 0 over the last decay_steps."""
    decay_steps: int | None = None
    """Of schedule=wsd, in optimizer steps; null: a tenth of the run."""
    precision: str = "float32"
    """Of the matrix products of training: float32, bfloat16, or float16 with loss scaling. Weights and evaluations are
    float32 in all of them; a teacher computes in teacher.dtype, its head too, whatever this is."""
    gradient_checkpointing: bool = False
    """Keep no activations inside a block, but compute them again for the backward pass: less memory, a third slower."""
    early_stopping_patience: int | None = None
    """Stop after this many evaluations in a row without a lower validation loss, and go back to the weights of the
    lowest; null: train to the end."""
    strategy: str = "ddp"
    """How several processes (torchrun's) train together: ddp, each with the whole model; or fsdp, each with a part of
    its weights and of the optimizer's state. One process needs none."""

    def __post_init__(self) -> None:
        require(self.optimizer in OPTIMIZERS, "train.optimizer", self.optimizer, f"use one of {', '.join(OPTIMIZERS)}")
        require(self.schedule in SCHEDULES, "train.schedule", self.schedule, f"use one of {', '.join(SCHEDULES)}")
        require(self.precision in PRECISIONS, "train.precision", self.precision, f"use one of {', '.join(PRECISIONS)}")
        require(self.strategy in STRATEGIES, "train.strategy", self.strategy, f"use one of {', '.join(STRATEGIES)}")
        if self.strategy == "fsdp":
            require(self.shards, "train.strategy", "fsdp", f"{self.trainer} needs whole models; set train.strategy=ddp")
            advice = "with train.strategy=fsdp it is not supported; use bfloat16 or float32"
            require(self.precision != "float16", "train.precision", self.precision, advice)
            require(not self.compile, "train.compile", "true", "with train.strategy=fsdp it is not supported")
        has_decay = self.decay_steps is None or self.schedule == "wsd"
        require(has_decay, "train.decay_steps", self.decay_steps, "it has an effect with train.schedule=wsd only")
        require(
            self.compiles or not self.compile, "train.compile", self.compile, f"{self.trainer} cannot make use of it"
        )
        require_positive("train", self, "decay_steps", "early_stopping_patience")
        require_finite("train", self, "learning_rate", "weight_decay", "gradient_clip")
        require_positive("train", self, "batch_size", "learning_rate", "num_epochs", "gradient_clip")
        require_positive("train", self, "log_interval", "eval_interval", "save_interval")
        require_positive("train", self, "gradient_accumulation_steps", "max_steps", "eval_blocks")
        for name in ("weight_decay", "warmup_steps"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name}", value, "it must be 0 or more")
        require(bool(self.checkpoint_dir), "train.checkpoint_dir", "''", "give a folder, like checkpoints/")

    def require_checkpoints_inside(self, group: str) -> None:
        """Check that checkpoints go into a folder of the run's own; in Python alone they may go anywhere.

        Args:
            group: Where this configuration stands, for the message: `train`.

        Raises:
            ConfigError: if they do not.
        """
        parts = {part for part in self.checkpoint_dir.replace("\\", "/").split("/") if part not in ("", ".")}
        is_inside = bool(parts) and ".." not in parts and not self.checkpoint_dir.startswith("/")
        advice = "it must be a folder inside the run's directory, like checkpoints/"
        require(is_inside, f"{group}.checkpoint_dir", self.checkpoint_dir, advice)

    def identity(self) -> dict[str, Any]:
        """Return the settings that determine the result, by name."""
        usual = asdict(TrainerConfig())
        values = {name: value for name, value in asdict(self).items() if name not in NOT_IN_IDENTITY}
        return {name: value for name, value in values.items() if name not in LATER or value != usual[name]}


@dataclass
class PretrainConfig(TrainerConfig):
    """Plain next-token training: cross-entropy on all tokens."""

    trainer: ClassVar[str] = "pretrain"


@dataclass
class TrainingConfig(TrainerConfig):
    """Distillation: alpha * T^2 * KL(teacher/T || student/T) + (1 - alpha) * cross-entropy."""

    trainer: ClassVar[str] = "distillation"

    alpha: float = 0.5
    """Weight of the distillation term, in [0, 1]; 0 is plain cross-entropy."""
    temperature: float = 2.0
    """Distillation temperature, > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # From Python, 4 and 4.0 must be one run.
        self.alpha, self.temperature = float(self.alpha), float(self.temperature)
        require(0 <= self.alpha <= 1, "train.alpha", self.alpha, "it must be in [0, 1]")
        require(
            math.isfinite(self.temperature) and self.temperature > 0,
            "train.temperature",
            self.temperature,
            "it must be a finite number greater than 0",
        )


@dataclass
class SFTConfig(TrainerConfig):
    """Supervised fine-tuning: cross-entropy on the answers."""

    trainer: ClassVar[str] = "sft"


@dataclass
class DPOConfig(TrainerConfig):
    """Direct preference optimisation."""

    trainer: ClassVar[str] = "dpo"
    compiles: ClassVar[bool] = False
    shards: ClassVar[bool] = False  # the reference is a copy of the whole model

    beta: float = 0.1
    """How strongly the policy is held to the reference, > 0."""
    label_smoothing: float = 0.0
    """Assumed share of wrong preferences, in [0, 0.5)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_finite("train", self, "beta", "label_smoothing")
        require_positive("train", self, "beta")
        is_share = 0 <= self.label_smoothing < 0.5
        require(is_share, "train.label_smoothing", self.label_smoothing, "it must be in [0, 0.5)")


@dataclass
class ORPOConfig(TrainerConfig):
    """Odds-ratio preference optimisation: cross-entropy of the chosen answer + beta * odds-ratio loss."""

    trainer: ClassVar[str] = "orpo"
    compiles: ClassVar[bool] = False

    beta: float = 0.1
    """Weight of the odds-ratio loss (lambda in the paper), > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_finite("train", self, "beta")
        require_positive("train", self, "beta")


@dataclass
class GRPOConfig(TrainerConfig):
    """Group-relative policy optimisation. A batch is of prompts."""

    trainer: ClassVar[str] = "grpo"
    compiles: ClassVar[bool] = False
    shards: ClassVar[bool] = False  # as for DPO; and responses are sampled with all weights

    group_size: int = 8
    """Responses to each prompt, which are judged against each other; at least 2."""
    clip_range: float = 0.2
    """The ratio to the policy that drew a response counts within 1 +- this."""
    kl_coef: float = 0.04
    """Weight of the KL penalty to the reference; 0: there is no reference."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    optimization_epochs: int = 1
    """Optimizer steps on each window of rollouts."""
    max_new_tokens: int = 64
    """Longest response, in tokens."""
    sampling_temperature: float = 1.0
    """Of the responses that are trained on, > 0."""
    reward: str = "exact_text"
    """Of a command's runs (in Python, `reward_fn` is given). exact_text: 1 if the response is the reference answer;
    exact_answer: 1 if the first number in it is; else 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_finite("train", self, "clip_range", "kl_coef", "entropy_coef", "sampling_temperature")
        require_positive("train", self, "clip_range", "optimization_epochs", "max_new_tokens", "sampling_temperature")
        require(self.reward in REWARDS, "train.reward", self.reward, f"use one of {', '.join(REWARDS)}")
        require(self.group_size >= 2, "train.group_size", self.group_size, "it must be 2 or more")
        for name in ("kl_coef", "entropy_coef"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name}", value, "it must be 0 or more")
