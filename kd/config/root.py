"""A whole run, and how its parts must fit together."""

import re
from dataclasses import dataclass, field

from kd.config.adapter import AdapterConfig, LoRAConfig
from kd.config.checks import require
from kd.config.data import CorpusConfig, DataConfig, HubDataConfig
from kd.config.model import ModelConfig
from kd.config.quantization import IntegerConfig, QuantizationConfig
from kd.config.teacher import EmbeddedTeacherConfig, HubTeacherConfig, TeacherConfig
from kd.config.train import GRPOConfig, TrainerConfig, TrainingConfig
from kd.errors import ConfigError

SMALLEST_BPE = 257
DATA_FOR = {
    "distillation": "a corpus: data=stdlib, data=text or data=hub",
    "pretrain": "a corpus: data=stdlib, data=text or data=hub",
    "sft": "prompts with responses: data=instructions, data=arithmetic or data=examples",
    "dpo": "pairs of answers: data=preferences or data=examples",
    "orpo": "pairs of answers: data=preferences or data=examples",
    "grpo": "prompts with reference answers: data=arithmetic or data=examples",
}
"""What each trainer learns from, by its name."""
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainerConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=HubDataConfig)
    teacher: TeacherConfig = field(default_factory=HubTeacherConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    name: str = "default"
    """Of the experiment: runs go to outputs/<name>/."""
    seed: int = 0
    """Of initialisation, data order and dropout."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    threads: int | None = None
    """CPU threads; null: as torch chooses."""
    init_from: str | None = None
    """A run's directory, or a pattern that fits one alone, whose last checkpoint initialises the student; null: from
    scratch."""
    overwrite: bool = False
    """Do a finished run again."""
    tracker: str = "none"
    """Experiment tracker."""

    def __post_init__(self) -> None:
        allowed = "use letters, digits, '.', '-' and '_' (100 at most, a letter or digit first)"
        require(NAME_PATTERN.fullmatch(self.name) is not None, "name", repr(self.name), allowed)
        require(0 <= self.seed < 2**32, "seed", self.seed, "it must be in [0, 2^32)")
        require(self.threads is None or self.threads > 0, "threads", self.threads, "it must be greater than 0")
        device_ok = re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None
        require(device_ok, "device", self.device, "use auto, cpu, cuda or cuda:N")
        require(self.tracker == "none", "tracker", self.tracker, "only none is supported")
        self.train.require_checkpoints_inside("train")
        self._check_strategy()
        if isinstance(self.adapter, LoRAConfig):
            self.adapter.check_fits(self.model)
        if isinstance(self.quantization, IntegerConfig):
            self._check_quantization(self.quantization)
        self._check_data()
        if isinstance(self.data, CorpusConfig):
            self._check_teacher(self.data)

    def _check_strategy(self) -> None:
        chosen = ["adapter=lora"] if isinstance(self.adapter, LoRAConfig) else []
        if isinstance(self.quantization, IntegerConfig):
            chosen.append(f"quantization=int{self.quantization.weight_bits}")
        if chosen and self.train.strategy == "fsdp":
            raise ConfigError(
                f"train.strategy=fsdp and {chosen[0]} do not go together: merged and integer weights are made of whole "
                "ones, of which fsdp leaves each process a part. Set train.strategy=ddp."
            )

    def _check_quantization(self, quantization: IntegerConfig) -> None:
        quantization.check_fits(self.model)
        if isinstance(self.adapter, LoRAConfig):
            raise ConfigError(
                f"adapter=lora and quantization{quantization.label.replace('-', '=')} do not go together: adapters "
                "would be merged into weights that were rounded without them. Leave one out."
            )
        if self.train.compile:
            raise ConfigError("train.compile=true is not supported with quantization: set it to false.")

    def _check_data(self) -> None:
        trainer, data = self.train.trainer, self.data
        # A trainer of one's own learns from what that learns from whose configuration it derives from.
        kinds = [cls.trainer for cls in type(self.train).__mro__ if issubclass(cls, TrainerConfig)]
        if not any(kind in data.trainers for kind in kinds):
            wanted = next((DATA_FOR[kind] for kind in kinds if kind in DATA_FOR), None)
            raise ConfigError(
                f"train ({trainer}) and data ({type(data).__name__}) do not go together: {trainer} learns from "
                f"{wanted or 'what no data give, since its configuration derives from that of no known trainer'}."
            )
        if isinstance(data, CorpusConfig) and data.seq_len > self.model.max_seq_len:
            raise ConfigError(
                f"data.seq_len={data.seq_len} is longer than model.max_seq_len={self.model.max_seq_len}: "
                f"set model.max_seq_len={data.seq_len} or shorten the blocks."
            )
        if data.tokenizer == "init_from" and self.init_from is None:
            raise ConfigError(
                "data.tokenizer=init_from, but init_from is null: add init_from=RUN, the run to go on from, or set "
                "data.tokenizer to a path or Hub id to begin from scratch."
            )
        if isinstance(self.train, GRPOConfig) and self.train.max_new_tokens >= self.model.max_seq_len:
            raise ConfigError(
                f"train.max_new_tokens={self.train.max_new_tokens} leaves no room for a prompt in "
                f"model.max_seq_len={self.model.max_seq_len}: lower the former."
            )

    def _check_teacher(self, data: CorpusConfig) -> None:
        without_teacher = type(self.teacher) is TeacherConfig
        if isinstance(self.train, TrainingConfig) and self.train.alpha > 0 and without_teacher:
            raise ConfigError(
                f"teacher=none with train.alpha={self.train.alpha}: distillation needs a teacher. "
                "Set train.alpha=0, or choose a teacher."
            )
        if data.tokenizer == "teacher" and without_teacher:
            raise ConfigError(
                "data.tokenizer=teacher with teacher=none: there is no teacher whose tokenizer could be used. "
                "Set data.tokenizer=bpe, or to a path or Hub id."
            )
        teacher = self.teacher
        trains_bpe = data.tokenizer == "bpe" or isinstance(teacher, EmbeddedTeacherConfig)
        if trains_bpe and self.model.vocab_size < SMALLEST_BPE:
            raise ConfigError(
                f"model.vocab_size={self.model.vocab_size} is too small for a byte-level BPE, which needs the 256 "
                f"bytes and an end-of-text token: set model.vocab_size={SMALLEST_BPE} or more."
            )
        if not isinstance(teacher, EmbeddedTeacherConfig):
            return
        if data.tokenizer not in ("teacher", "bpe"):
            raise ConfigError(
                f"data.tokenizer={data.tokenizer} with teacher=embedded: that teacher is trained with a "
                "BPE of its own. Set data.tokenizer=teacher."
            )
        if teacher.model.vocab_size != self.model.vocab_size:
            raise ConfigError(
                f"teacher.model.vocab_size={teacher.model.vocab_size}, but model.vocab_size={self.model.vocab_size}: "
                "their logits are compared column by column, so set both to the same."
            )
        if data.seq_len > teacher.model.max_seq_len:
            raise ConfigError(
                f"data.seq_len={data.seq_len} is longer than teacher.model.max_seq_len="
                f"{teacher.model.max_seq_len}: set teacher.model.max_seq_len={data.seq_len}."
            )
