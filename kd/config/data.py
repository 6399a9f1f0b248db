"""What to train on."""

from dataclasses import dataclass
from typing import Any, ClassVar

from kd.config.checks import require, require_positive
from kd.errors import ConfigError

MISSING = "???"
"""OmegaConf's mark for a value that must be given."""


@dataclass
class DataConfig:
    """What all data need: a tokenizer and a split."""

    trainers: ClassVar[tuple[str, ...]] = ()
    """Trainers that can learn from such data, by name."""

    tokenizer: str = "teacher"
    """`teacher`: the teacher's own; `bpe`: byte-level BPE of model.vocab_size tokens, trained on the training part, as
    the embedded teacher's is; `init_from`: that of the run that init_from names; else a path or Hub id."""
    val_ratio: float = 0.1
    """Share of documents, or examples, for validation."""
    test_ratio: float = 0.0
    """Share of documents, or examples, for the test part, scored once, at the end."""
    num_workers: int = 0
    """Processes that load batches; 0: the training process itself."""

    def __post_init__(self) -> None:
        require(bool(self.tokenizer), "data.tokenizer", "''", "use teacher, bpe, init_from, a path or a Hub id")
        require(self.num_workers >= 0, "data.num_workers", self.num_workers, "it must be 0 or more")
        require(0 < self.val_ratio < 1, "data.val_ratio", self.val_ratio, "it must be in (0, 1)")
        require(0 <= self.test_ratio < 1, "data.test_ratio", self.test_ratio, "it must be in [0, 1)")
        if self.val_ratio + self.test_ratio >= 1:
            raise ConfigError(
                f"data.val_ratio={self.val_ratio} and data.test_ratio={self.test_ratio} leave nothing to train on: "
                "their sum must be below 1."
            )

    def identity(self) -> dict[str, Any]:
        """Return the settings that determine the result beyond the content of the data, by name."""
        return {}


@dataclass
class CorpusConfig(DataConfig):
    """Running text, cut into blocks."""

    trainers: ClassVar[tuple[str, ...]] = ("distillation", "pretrain")

    seq_len: int = 512
    """Inputs (and targets) per block, in tokens."""
    sample_size: int | None = 50_000_000
    """About how many bytes of text to take (of each path), whole documents drawn at random; null: all."""
    max_train_blocks: int | None = None
    """Train on this many blocks, spread evenly over the training part; null: all."""
    max_eval_blocks: int | None = None
    """Validate, and test, on this many blocks, spread evenly over their parts; null: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("data", self, "seq_len", "sample_size", "max_train_blocks", "max_eval_blocks")

    def identity(self) -> dict[str, Any]:
        """Return block length and numbers of blocks."""
        return {name: getattr(self, name) for name in ("seq_len", "max_train_blocks", "max_eval_blocks")}


@dataclass
class StdlibDataConfig(CorpusConfig):
    """The embedded corpus: the source text of the running Python's standard library, split by top-level module."""


@dataclass
class TextDataConfig(CorpusConfig):
    """Local files: .txt, .md, .py (a document each), .jsonl, .jsonl.gz and .parquet (a document a row)."""

    path: str = MISSING
    """A file, a folder (searched through) or a glob pattern; .json and .csv are read where it names them."""
    text_column: str = "text"
    """Column of rows that holds the text."""
    document_separator: str | None = None
    r"""Cut .txt, .md and .py files into documents at this string, in which \n and \t are escapes; null: a file is a
    document."""
    val_path: str | None = None
    """Files of the validation part, as `path`; null: `val_ratio` of those of `path`."""
    test_path: str | None = None
    """Files of the test part, as `path`; null: `test_ratio` of those of `path`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_paths(self.path, self.val_path, self.test_path)
        require(self.document_separator != "", "data.document_separator", "''", "give a string, or null")


@dataclass
class HubDataConfig(CorpusConfig):
    """A data set of the Hugging Face Hub, or a local directory in the same format."""

    path: str = MISSING
    """Hub id or local directory, as for `datasets.load_dataset`."""
    name: str | None = None
    """Configuration of the data set."""
    revision: str | None = None
    """Branch, tag or commit; null: the default branch."""
    split: str = "train"
    """Split whose documents are taken (and split again by `val_ratio`)."""
    text_column: str = "text"
    """Column that holds the text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_paths(self.path)


def check_paths(path: str, val_path: str | None = None, test_path: str | None = None) -> None:
    """Raise a ConfigError for a path that is empty, or whose bytes are not UTF-8, or two equal ones."""
    given = {"data.path": path, "data.val_path": val_path, "data.test_path": test_path}
    named = {key: value for key, value in given.items() if value is not None}
    for key, value in named.items():
        require(bool(value), key, "''", "give a file, a folder or a glob pattern")
        shown = value.encode(errors="surrogateescape").decode(errors="backslashreplace")
        require(shown == value, key, shown, "it is not UTF-8; rename the file, or name its folder")
    if len(set(named.values())) < len(named):
        settings = " and ".join(f"{key}={value}" for key, value in named.items())
        raise ConfigError(f"{settings} must differ: each part has its own files.")
