"""The configuration checks itself: a wrong value is refused by its key, and the YAML files say the defaults."""

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from kd.config import (
    ArithmeticDataConfig,
    Config,
    CorpusConfig,
    DataConfig,
    DPOConfig,
    EmbeddedTeacherConfig,
    ExampleConfig,
    ExampleFilesConfig,
    GRPOConfig,
    HubDataConfig,
    HubTeacherConfig,
    InstructionsDataConfig,
    LocalTeacherConfig,
    ModelConfig,
    ORPOConfig,
    PreferencesDataConfig,
    PretrainConfig,
    SFTConfig,
    StdlibDataConfig,
    TeacherConfig,
    TextDataConfig,
    TrainerConfig,
    TrainingConfig,
)
from kd.errors import ConfigError

CONF = Path(__file__).parents[1] / "conf"
SPECIFIED_MODEL = {
    "hidden_size": 512,
    "num_layers": 12,
    "num_heads": 8,
    "num_kv_heads": 2,
    "intermediate_size": 2048,
    "vocab_size": 151936,
    "max_seq_len": 512,
    "rope_theta": 1000000.0,
    "norm_eps": 1e-6,
    "dropout": 0.0,
}
SPECIFIED_TRAINING = {
    "batch_size": 8,
    "learning_rate": 3e-4,
    "weight_decay": 0.01,
    "warmup_steps": 500,
    "num_epochs": 3,
    "gradient_clip": 1.0,
    "alpha": 0.5,
    "temperature": 2.0,
    "checkpoint_dir": "checkpoints/",
    "log_interval": 50,
    "eval_interval": 500,
    "save_interval": 1000,
}
SPECIFIED_DATA = {
    "path": "wikimedia/wikipedia",
    "name": "20231101.zh",
    "tokenizer": "teacher",
    "seq_len": 512,
    "sample_size": 50_000_000,
    "val_ratio": 0.1,
    "test_ratio": 0.0,
    "text_column": "text",
}


def yaml_values(name: str) -> dict[str, Any]:
    """Return the values of a file in conf/, without its defaults list."""
    values = OmegaConf.to_container(OmegaConf.load(CONF / name))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items() if key != "defaults"}


# --- the specified values ---------------------------------------------------------------------------------------


def test_the_model_defaults_are_the_specified_ones() -> None:
    assert asdict(ModelConfig()) == SPECIFIED_MODEL


def test_the_training_defaults_are_the_specified_ones() -> None:
    values = asdict(TrainingConfig())
    assert {key: values[key] for key in SPECIFIED_TRAINING} == SPECIFIED_TRAINING


def test_later_fields_leave_the_specified_behaviour_unchanged() -> None:
    more = {key: value for key, value in asdict(TrainingConfig()).items() if key not in SPECIFIED_TRAINING}
    assert more == {
        "gradient_accumulation_steps": 1,
        "max_steps": None,
        "eval_blocks": None,
        "compile": False,
        "optimizer": "adamw",
        "schedule": "cosine",
        "decay_steps": None,
        "precision": "float32",
        "gradient_checkpointing": False,
        "early_stopping_patience": None,
        "strategy": "ddp",
    }


def test_what_came_later_does_not_rename_earlier_runs() -> None:
    settings = {"alpha", "temperature", "gradient_accumulation_steps", "max_steps", "eval_blocks"}
    settings |= SPECIFIED_TRAINING.keys() - {"checkpoint_dir", "log_interval", "save_interval"}
    assert TrainingConfig().identity().keys() == settings
    assert TrainingConfig(gradient_checkpointing=True, compile=True).identity() == TrainingConfig().identity()
    assert TrainingConfig(strategy="fsdp").identity() == TrainingConfig().identity()
    for name, value in (("precision", "bfloat16"), ("schedule", "wsd"), ("optimizer", "sgd")):
        assert TrainingConfig(**{name: value}).identity() == TrainingConfig().identity() | {name: value}
    assert TrainingConfig(early_stopping_patience=2).identity()["early_stopping_patience"] == 2


def test_the_student_file_says_the_defaults() -> None:
    assert yaml_values("model/student_120m.yaml") == asdict(ModelConfig())


def test_the_distillation_file_says_the_defaults() -> None:
    assert yaml_values("train/distill.yaml") == SPECIFIED_TRAINING


def test_the_wikipedia_file_says_the_specified_values() -> None:
    assert yaml_values("data/wiki_zh.yaml") == SPECIFIED_DATA


def test_the_teacher_file_says_the_specified_values() -> None:
    specified = {"model_id": "Qwen/Qwen2.5-0.5B", "revision": None, "dtype": "float16"}
    assert yaml_values("teacher/qwen2_5_0_5b.yaml") == specified | {"cache": "auto"}


def test_the_embedded_default_uses_other_files_than_the_specified_job() -> None:
    choices = {
        group: option
        for entry in OmegaConf.load(CONF / "config.yaml").defaults
        if not isinstance(entry, str)
        for group, option in entry.items_ex(resolve=False)
    }
    assert {group: choices[group] for group in ("model", "train", "data", "teacher")} == {
        "model": "tiny",
        "train": "quick",
        "data": "stdlib",
        "teacher": "embedded",
    }


def test_the_model_config_cannot_be_changed() -> None:
    config = ModelConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 64  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        del config.dropout


def test_each_trainer_carries_its_own_knobs_only() -> None:
    assert "alpha" not in asdict(PretrainConfig())
    assert issubclass(TrainingConfig, TrainerConfig)
    assert issubclass(PretrainConfig, TrainerConfig)


# --- single values ----------------------------------------------------------------------------------------------

SIZES = (0, -1)
NOT_FINITE = (math.nan, math.inf, -math.inf)
MODEL_REFUSED = {
    "hidden_size": SIZES,
    "num_layers": SIZES,
    "num_heads": SIZES,
    "num_kv_heads": SIZES,
    "intermediate_size": SIZES,
    "vocab_size": SIZES,
    "max_seq_len": SIZES,
    "rope_theta": (0.0, -1.0, *NOT_FINITE),
    "norm_eps": (0.0, -1e-6, *NOT_FINITE),
    "dropout": (-0.1, 1.0, 1.5, *NOT_FINITE),
}
TRAINER_REFUSED = {
    "batch_size": SIZES,
    "learning_rate": (0.0, -1e-3, *NOT_FINITE),
    "weight_decay": (-0.1, *NOT_FINITE),
    "warmup_steps": (-1,),
    "num_epochs": SIZES,
    "gradient_clip": (0.0, -1.0, *NOT_FINITE),
    "checkpoint_dir": ("",),
    "log_interval": SIZES,
    "eval_interval": SIZES,
    "save_interval": SIZES,
    "gradient_accumulation_steps": SIZES,
    "max_steps": SIZES,
    "eval_blocks": SIZES,
    "optimizer": ("", "lion", "AdamW"),
    "schedule": ("", "step"),
    "decay_steps": (5, *SIZES),  # 5: it has no effect without schedule=wsd
    "precision": ("", "fp16", "torch.float16"),
    "early_stopping_patience": SIZES,
    "strategy": ("", "zero", "FSDP"),
}
DISTILLATION_REFUSED = {"alpha": (-0.01, 1.01, *NOT_FINITE), "temperature": (0.0, -1.0, *NOT_FINITE)}
DATA_REFUSED = {
    "tokenizer": ("",),
    "val_ratio": (0.0, 1.0, -0.1, *NOT_FINITE),
    "test_ratio": (-0.1, 1.0, *NOT_FINITE),
    "num_workers": (-1,),
}
CORPUS_REFUSED = {
    **DATA_REFUSED,
    "seq_len": SIZES,
    "sample_size": SIZES,
    "max_train_blocks": SIZES,
    "max_eval_blocks": SIZES,
}
EXAMPLES_REFUSED = {
    **DATA_REFUSED,
    "tokenizer": ("", "bpe", "teacher"),
    "max_train_examples": SIZES,
    "max_eval_examples": SIZES,
}
ROOT_REFUSED = {
    "name": ("", "a b", "a/b", "../a", ".hidden", "-a", "a=b", "\u00e9", "a" * 101, "a\n"),
    "seed": (-1, 2**32),
    "threads": SIZES,
    "device": ("", "gpu", "cuda:", "cuda:x", "cpu:0", "CPU"),
    "tracker": ("", "wandb"),
}
REFUSED: dict[tuple[type, str], dict[str, tuple[Any, ...]]] = {
    (ModelConfig, "model"): MODEL_REFUSED,
    (TrainingConfig, "train"): {**TRAINER_REFUSED, **DISTILLATION_REFUSED},
    (PretrainConfig, "train"): TRAINER_REFUSED,
    (SFTConfig, "train"): TRAINER_REFUSED,
    (DPOConfig, "train"): {
        **TRAINER_REFUSED,
        "compile": (True,),
        "beta": (0.0, -0.1, *NOT_FINITE),
        "label_smoothing": (-0.1, 0.5, *NOT_FINITE),
    },
    (ORPOConfig, "train"): {**TRAINER_REFUSED, "compile": (True,), "beta": (0.0, -0.1, *NOT_FINITE)},
    (GRPOConfig, "train"): {
        **TRAINER_REFUSED,
        "compile": (True,),
        "reward": ("", "bleu"),
        "group_size": (1, 0, -1),
        "clip_range": (0.0, -0.1, *NOT_FINITE),
        "kl_coef": (-0.1, *NOT_FINITE),
        "entropy_coef": (-0.1, *NOT_FINITE),
        "optimization_epochs": SIZES,
        "max_new_tokens": SIZES,
        "sampling_temperature": (0.0, -1.0, *NOT_FINITE),
    },
    (DataConfig, "data"): DATA_REFUSED,
    (CorpusConfig, "data"): CORPUS_REFUSED,
    (StdlibDataConfig, "data"): CORPUS_REFUSED,
    (TextDataConfig, "data"): {**CORPUS_REFUSED, "path": ("",), "document_separator": ("",)},
    (HubDataConfig, "data"): CORPUS_REFUSED,
    (ExampleConfig, "data"): EXAMPLES_REFUSED,
    (InstructionsDataConfig, "data"): {
        **EXAMPLES_REFUSED,
        "max_chars": SIZES,
        "arithmetic_share": (-0.1, 1.1, *NOT_FINITE),
        "digits": SIZES,
    },
    (PreferencesDataConfig, "data"): {**EXAMPLES_REFUSED, "max_chars": SIZES},
    (ArithmeticDataConfig, "data"): {**EXAMPLES_REFUSED, "digits": SIZES, "num_pairs": SIZES},
    (ExampleFilesConfig, "data"): {**EXAMPLES_REFUSED, "path": ("",)},
    (HubTeacherConfig, "teacher"): {"dtype": ("", "fp16", "float64", "torch.float16")},
    (LocalTeacherConfig, "teacher"): {"dtype": ("", "fp16", "float64", "torch.float16")},
    (Config, ""): ROOT_REFUSED,
}
CASES = [
    pytest.param(cls, field, f"{prefix}.{field}".lstrip("."), value, id=f"{cls.__name__}-{field}-{value!r:.20}")
    for (cls, prefix), fields in REFUSED.items()
    for field, values in fields.items()
    for value in values
]


@pytest.mark.parametrize(("cls", "field", "key", "value"), CASES)
def test_a_wrong_value_is_refused_by_its_key(cls: Callable[..., object], field: str, key: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        cls(**{field: value})
    assert str(caught.value).startswith(f"{key}=")
    assert str(value) in str(caught.value) or repr(value) in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("cls", "prefix"),
    [key for key in REFUSED if key[1] in ("model", "train", "data")],
)
def test_every_number_has_a_range(cls: type, prefix: str) -> None:
    numbers = {field.name for field in dataclasses.fields(cls) if field.type in (int, float, int | None)}
    assert numbers <= set(REFUSED[cls, prefix])


EDGES: list[tuple[type, dict[str, Any]]] = [
    (ModelConfig, {"dropout": 0.999}),
    (ModelConfig, {"hidden_size": 2, "num_heads": 1, "num_kv_heads": 1}),
    (TrainingConfig, {"alpha": 0.0}),
    (TrainingConfig, {"alpha": 1.0}),
    (TrainingConfig, {"temperature": 1e-3}),
    (TrainingConfig, {"warmup_steps": 0, "weight_decay": 0.0, "max_steps": 1, "eval_blocks": 1}),
    (TrainingConfig, {"checkpoint_dir": "a/b..c"}),
    (CorpusConfig, {"sample_size": None, "val_ratio": 0.5, "test_ratio": 0.49}),
    (Config, {"seed": 2**32 - 1, "threads": 1, "device": "cuda:3", "name": "a" * 100}),
]


@pytest.mark.parametrize(("cls", "values"), EDGES)
def test_a_value_at_the_edge_is_allowed(cls: Callable[..., object], values: dict[str, Any]) -> None:
    config = cls(**values)
    assert {name: getattr(config, name) for name in values} == values


OUTSIDE = ("/", "/tmp/x", "..", "../x", "x/../../y", "x\\..\\y", ".", "./")


@pytest.mark.parametrize("folder", OUTSIDE)
def test_a_runs_checkpoints_stay_in_its_directory_and_those_of_a_trainer_go_anywhere(folder: str) -> None:
    train, teacher = TrainingConfig(checkpoint_dir=folder), PretrainConfig(checkpoint_dir=folder)
    with pytest.raises(ConfigError, match=rf"^train\.checkpoint_dir={re.escape(folder)}.*inside the run's directory"):
        Config(train=train)
    with pytest.raises(ConfigError, match=r"^teacher\.train\.checkpoint_dir="):
        EmbeddedTeacherConfig(train=teacher)


# --- values that contradict each other ----------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12))
def test_the_shapes_that_fit_are_those_allowed(hidden: int, heads: int, kv_heads: int) -> None:
    fits = hidden % heads == 0 and heads % kv_heads == 0 and (hidden // heads) % 2 == 0
    sizes = {"hidden_size": hidden, "num_heads": heads, "num_kv_heads": kv_heads}
    if fits:
        assert ModelConfig(**sizes).head_dim * heads == hidden
        return
    with pytest.raises(ConfigError, match=r"model\.num_heads="):
        ModelConfig(**sizes)


@pytest.mark.parametrize(
    ("sizes", "keys"),
    [
        ({"hidden_size": 10, "num_heads": 4}, ("model.hidden_size=10", "model.num_heads=4")),
        ({"num_heads": 8, "num_kv_heads": 3}, ("model.num_heads=8", "model.num_kv_heads=3")),
        ({"hidden_size": 12, "num_heads": 4, "num_kv_heads": 4}, ("model.hidden_size=12", "model.num_heads=4", "odd")),
    ],
)
def test_a_shape_that_does_not_fit_names_both_keys(sizes: dict[str, int], keys: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**sizes)
    assert all(key in str(caught.value) for key in keys)


def test_the_parts_must_leave_something_to_train_on() -> None:
    with pytest.raises(ConfigError, match=r"data\.val_ratio=0\.5 and data\.test_ratio=0\.5"):
        DataConfig(val_ratio=0.5, test_ratio=0.5)


EMBEDDED = EmbeddedTeacherConfig(model=ModelConfig(vocab_size=300))
SMALL = ModelConfig(vocab_size=300)
STDLIB = StdlibDataConfig(seq_len=32)


def test_a_consistent_whole_is_allowed() -> None:
    Config(model=SMALL, data=STDLIB, teacher=EMBEDDED)
    Config(data=HubDataConfig(tokenizer="bpe"), teacher=TeacherConfig(), train=TrainingConfig(alpha=0))
    Config(data=HubDataConfig(tokenizer="bpe"), teacher=TeacherConfig(), train=PretrainConfig())
    Config(data=InstructionsDataConfig(), train=SFTConfig(), init_from="outputs/a/b")
    Config(data=PreferencesDataConfig(tokenizer="gpt2"), train=ORPOConfig())
    Config(data=ExampleFilesConfig(path="mine.jsonl"), train=GRPOConfig(max_new_tokens=511), init_from="outputs/a/b")


CONTRADICTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "blocks longer than the student": (
        {"model": ModelConfig(max_seq_len=64), "data": HubDataConfig(seq_len=65)},
        ("data.seq_len=65", "model.max_seq_len=64"),
    ),
    "blocks longer than the embedded teacher": (
        {
            "model": SMALL,
            "data": STDLIB,
            "teacher": EmbeddedTeacherConfig(model=ModelConfig(vocab_size=300, max_seq_len=16)),
        },
        ("data.seq_len=32", "teacher.model.max_seq_len=16"),
    ),
    "distillation without a teacher": (
        {"teacher": TeacherConfig(), "data": HubDataConfig(tokenizer="bpe")},
        ("teacher=none", "train.alpha=0.5"),
    ),
    "the tokenizer of no teacher": (
        {"teacher": TeacherConfig(), "train": PretrainConfig()},
        ("data.tokenizer=teacher", "teacher=none"),
    ),
    "a foreign tokenizer for the embedded teacher": (
        {"model": SMALL, "data": StdlibDataConfig(tokenizer="gpt2"), "teacher": EMBEDDED},
        ("data.tokenizer=gpt2", "teacher=embedded"),
    ),
    "a corpus for fine-tuning": (
        {"train": SFTConfig(), "data": STDLIB},
        ("sft", "StdlibDataConfig", "data=instructions"),
    ),
    "examples for pre-training": (
        {"train": PretrainConfig(), "data": InstructionsDataConfig()},
        ("pretrain", "InstructionsDataConfig", "data=stdlib"),
    ),
    "additions for DPO": (
        {"train": DPOConfig(), "data": ArithmeticDataConfig(), "init_from": "outputs/a/b"},
        ("dpo", "ArithmeticDataConfig", "data=preferences"),
    ),
    "the tokenizer of no earlier run": (
        {"train": SFTConfig(), "data": InstructionsDataConfig()},
        ("data.tokenizer=init_from", "init_from=RUN"),
    ),
    "responses as long as the context": (
        {"train": GRPOConfig(max_new_tokens=512), "data": ArithmeticDataConfig(), "init_from": "outputs/a/b"},
        ("train.max_new_tokens=512", "model.max_seq_len=512"),
    ),
    "a vocabulary too small for bytes": (
        {"model": ModelConfig(vocab_size=256), "data": HubDataConfig(tokenizer="bpe"), "train": PretrainConfig()},
        ("model.vocab_size=256", "model.vocab_size=257"),
    ),
    "another vocabulary than the teacher's": (
        {"model": ModelConfig(vocab_size=301), "data": STDLIB, "teacher": EMBEDDED},
        ("model.vocab_size=301", "teacher.model.vocab_size=300"),
    ),
    "a teacher's vocabulary that is not the tokenizer's": (
        {"model": SMALL, "data": STDLIB, "teacher": EmbeddedTeacherConfig(model=ModelConfig(vocab_size=302))},
        ("teacher.model.vocab_size=302", "model.vocab_size=300"),
    ),
}


@pytest.mark.parametrize(("parts", "keys"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_a_contradiction_names_both_keys(parts: dict[str, Any], keys: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(**parts)
    assert all(key in str(caught.value) for key in keys)


@dataclass
class OwnConfig(SFTConfig):
    trainer: ClassVar[str] = "own"


@dataclass
class StrangeConfig(TrainerConfig):
    trainer: ClassVar[str] = "strange"


def test_a_trainer_of_one_s_own_takes_the_data_of_the_one_it_derives_from() -> None:
    Config(train=OwnConfig(), data=InstructionsDataConfig(), init_from="a run")
    with pytest.raises(ConfigError, match=r"own learns from prompts with responses"):
        Config(train=OwnConfig(), data=HubDataConfig(path="x"))
    with pytest.raises(ConfigError, match=r"strange learns from what no data give"):
        Config(train=StrangeConfig(), data=HubDataConfig(path="x"))
