"""What to fine-tune on: prompts with answers, cut to model.max_seq_len."""

from dataclasses import dataclass
from typing import Any, ClassVar

from kd.config.checks import require, require_positive
from kd.config.data import MISSING, DataConfig, check_paths


@dataclass
class ExampleConfig(DataConfig):
    """What all examples need."""

    tokenizer: str = "init_from"
    """`init_from`: that of the run that init_from names; else a path or Hub id."""
    max_train_examples: int | None = None
    """Train on the first so many, a fair sample of all; null: all."""
    max_eval_examples: int | None = None
    """Validate, and test, on the first so many of their parts; null: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("data", self, "max_train_examples", "max_eval_examples")
        not_here = "examples have no BPE or teacher of their own; use init_from, a path or a Hub id"
        require(self.tokenizer not in ("bpe", "teacher"), "data.tokenizer", self.tokenizer, not_here)

    def identity(self) -> dict[str, Any]:
        """Return the numbers of examples."""
        return {name: getattr(self, name) for name in ("max_train_examples", "max_eval_examples")}


@dataclass
class InstructionsDataConfig(ExampleConfig):
    """Functions of the running Python's standard library, and what they do; and additions."""

    trainers: ClassVar[tuple[str, ...]] = ("sft",)

    max_chars: int = 340
    """Longest prompt and response together, in characters."""
    arithmetic_share: float = 0.6
    """Share of additions among the examples, in [0, 1]."""
    digits: int = 2
    """Most digits of an addition's operand."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("data", self, "max_chars", "digits")
        is_share = 0 <= self.arithmetic_share <= 1
        require(is_share, "data.arithmetic_share", self.arithmetic_share, "it must be in [0, 1]")


@dataclass
class PreferencesDataConfig(ExampleConfig):
    """Functions of the standard library, what they do, and what another function does."""

    trainers: ClassVar[tuple[str, ...]] = ("dpo", "orpo")

    max_chars: int = 340
    """Longest prompt and response together, in characters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("data", self, "max_chars")


@dataclass
class ArithmeticDataConfig(ExampleConfig):
    """Additions, whose answers can be verified."""

    trainers: ClassVar[tuple[str, ...]] = ("sft", "grpo")

    digits: int = 2
    """Most digits of an operand."""
    num_pairs: int | None = None
    """Pairs of operands, drawn at random; null: all (up to 2 digits)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("data", self, "digits", "num_pairs")


@dataclass
class ExampleFilesConfig(ExampleConfig):
    """Local .jsonl, .jsonl.gz and .parquet files, with an example a row; the trainer says which columns it needs."""

    trainers: ClassVar[tuple[str, ...]] = ("sft", "dpo", "orpo", "grpo")

    path: str = MISSING
    """A file, a folder (searched through) or a glob pattern; .json and .csv are read where it names them."""
    val_path: str | None = None
    """Files of the validation part, as `path`; null: `val_ratio` of those of `path`."""
    test_path: str | None = None
    """Files of the test part, as `path`; null: `test_ratio` of those of `path`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_paths(self.path, self.val_path, self.test_path)
