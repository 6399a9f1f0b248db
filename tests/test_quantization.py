"""Training for integer weights: the rounding, what it is turned into, its file, and runs."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd.checkpoint_files import MODEL_FILE, QUANTIZED, find_checkpoint
from kd.config import Config, IntegerConfig, ModelConfig, QuantizationConfig
from kd.errors import ConfigError, DataError, IntegrityError, Interrupted
from kd.heads import logits_of
from kd.model import StudentModel
from kd.quantization import fake_quantize, load_quantized, quantize, save_quantized, to_integers
from kd.runs import Fingerprints, run_identity
from kd.student import load_student
from kd.trainers.evaluation import BlockScores

from .commands import TINY, only_run, run, strict_json
from .extras import extra
from .llama import make_llama
from .test_adapters import EVERY_TRAINER, trainer_of
from .test_composition import config_of
from .trainers.examples import dpo, make_pairs
from .trainers.helpers import (
    LENGTH,
    VOCAB,
    history_of,
    make_batches,
    make_student,
    pretrain,
    same_tensors,
    stop_in,
    weights,
)

INT8, INT4 = IntegerConfig(), IntegerConfig(weight_bits=4, group_size=8)
SCHEMES = pytest.mark.parametrize("config", [INT8, INT4], ids=["int8", "int4"])


@pytest.fixture(scope="module")
def torchao() -> Any:
    """The package, or a skip."""
    return extra("torchao", "qat")


needs_torchao = pytest.mark.usefixtures("torchao")


def rounding(config: IntegerConfig, seed: int = 0, **settings: Any) -> StudentModel:
    """Return a student that rounds."""
    model = make_student(seed, **settings)
    fake_quantize(model, config)
    return model


def tokens() -> Tensor:
    """Return token ids (B, L)."""
    return make_batches(1, rows=3)[0]["input_ids"]


def rounded(weight: Tensor, config: IntegerConfig) -> Tensor:
    """Return what is left of a weight (rows, columns) in integers: round(w / s) * s, s from the group's largest."""
    groups = weight.reshape(len(weight), -1, config.group_size or weight.size(1))
    most = 2 ** (config.weight_bits - 1)
    scale = groups.abs().amax(dim=-1, keepdim=True) / (most - 0.5)
    return ((groups / scale).round().clamp(-most, most - 1) * scale).view_as(weight)


# --- configuration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("quantization=int8", "quantization.weight_bits=5"), ["quantization.weight_bits=5", "8 or 4"]),
        (("quantization=int4", "quantization.group_size=0"), ["quantization.group_size=0"]),
        (("quantization=int4", "quantization.group_size=64"), ["group_size=64", "model.hidden_size=96"]),
        (("quantization=int4", "model.intermediate_size=250"), ["group_size=32", "model.intermediate_size=250"]),
        (
            ("quantization=int4", "quantization.group_size=null", "model.intermediate_size=255"),
            ["quantization.weight_bits=4", "model.intermediate_size=255", "odd", "weight_bits=8"],
        ),
        (("quantization=int4", "quantization.group_size=1"), ["quantization.group_size=1", "2 or more"]),
        (("quantization=int8", "model.intermediate_size=1"), ["model.intermediate_size=1", "2 weights or more"]),
        (("quantization=int8", "adapter=lora"), ["adapter=lora", "quantization=int8"]),
        (("quantization=int4", "train.compile=true"), ["train.compile=true", "quantization"]),
        (("quantization=int4", "train.strategy=fsdp"), ["train.strategy=fsdp and quantization=int4", "strategy=ddp"]),
    ],
)
def test_a_bad_setting_is_named(overrides: tuple[str, ...], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(*overrides)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"quantization=int4 needs torchao.*kd-train\[qat\]"):
        fake_quantize(make_student(), INT4)


def test_runs_without_rounding_keep_their_identity() -> None:
    inputs = Fingerprints("corpus", "tokenizer", "teacher")
    settings = (QuantizationConfig(), IntegerConfig(), IntegerConfig(4), IntegerConfig(4, 32), IntegerConfig(4, 64))
    plain, *others = (run_identity(Config(quantization=quantization), inputs) for quantization in settings)
    assert "quantization" not in plain.content
    assert others[0].settings == plain.settings.replace("-seed0", "-int8-seed0")
    assert len({identity.digest for identity in (plain, *others)}) == 5


# --- the model --------------------------------------------------------------------------------------------------


@needs_torchao
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("width", "group"), [(2, None), (25, None), (26, None), (3, 3), (6, 3), (30, 5), (2, 2)])
def test_every_width_that_is_not_refused_can_be_rounded_kept_and_read(
    bits: int, width: int, group: int | None, tmp_path: Path
) -> None:
    config = IntegerConfig(bits, group)
    hidden = 30 if group != 2 else 4
    model = StudentModel(ModelConfig(hidden, 1, 1, 1, width, vocab_size=VOCAB, max_seq_len=LENGTH))
    try:
        config.check_fits(model.config)
    except ConfigError:
        assert bits == 4
        assert width % 2 == 1
        with pytest.raises(ConfigError, match=r"the \d+ inputs of layers.0.ffn.down_proj"):
            fake_quantize(model, config)
        return
    quantize(model, config)
    save_quantized(tmp_path / "q", model, config)
    other = StudentModel(model.config)
    load_quantized(tmp_path / "q", other, config)
    assert torch.equal(other(tokens()), model(tokens()))


@needs_torchao
@SCHEMES
@pytest.mark.parametrize("make", [make_student, make_llama], ids=["student", "llama"])
def test_integer_weights_compute_what_training_rounded_to(make: Callable[..., Any], config: IntegerConfig) -> None:
    model = make() if make is make_student else make(make_student())
    names, head = list(model.state_dict()), model.lm_head
    exact = logits_of(model(tokens()))
    fake_quantize(model, config)
    assert list(model.state_dict()) == names
    assert model.lm_head is head
    expected = logits_of(model(tokens()))
    assert (expected - exact).abs().max() > 1e-3
    to_integers(model, config)
    torch.testing.assert_close(logits_of(model(tokens())), expected, rtol=1e-5, atol=1e-5)
    other = make() if make is make_student else make(make_student())
    quantize(other, config)
    torch.testing.assert_close(logits_of(other(tokens())), expected, rtol=1e-5, atol=1e-5)


@needs_torchao
@SCHEMES
def test_weights_are_rounded_by_the_formula(config: IntegerConfig) -> None:
    model = make_student()
    exact = model.layers[0].ffn.up_proj.weight.detach().clone()
    quantize(model, config)
    found: Any = model.layers[0].ffn.up_proj.weight
    expected = rounded(exact, config)
    largest = exact.view(len(exact), -1, config.group_size or exact.size(1)).abs()
    # The largest of a group lies half-way between two integers, so that the last digit decides.
    clear = (largest < largest.amax(dim=-1, keepdim=True)).view_as(exact)
    assert clear.float().mean() > 0.8
    torch.testing.assert_close(found.dequantize()[clear], expected[clear], rtol=1e-5, atol=1e-6)
    assert found.qdata.dtype == torch.int8
    assert int(found.qdata.max()) == 2 ** (config.weight_bits - 1) - 1


@needs_torchao
def test_gradients_pass_the_rounding() -> None:
    exact, model = make_student(), rounding(INT8)
    batch = make_batches(1)[0]
    for each in (exact, model):
        pretrain(each, [batch]).training_step(batch)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        difference = (parameter.grad - exact.get_parameter(name).grad).norm()
        assert difference < 0.4 * parameter.grad.norm(), name


@needs_torchao
def test_groups_that_do_not_fit_a_foreign_model_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"group_size=16 does not divide the 24 inputs of .*down_proj"):
        fake_quantize(make_llama(make_student()), IntegerConfig(4, 16))


# --- its file ---------------------------------------------------------------------------------------------------


@needs_torchao
@SCHEMES
def test_the_file_gives_the_same_model(tmp_path: Path, config: IntegerConfig) -> None:
    model = rounding(config)
    to_integers(model, config)
    save_quantized(tmp_path / "q", model, config)
    loaded = make_student(seed=5)
    load_quantized(tmp_path / "q", loaded, config)
    assert torch.equal(loaded(tokens()), model(tokens()))
    assert loaded.lm_head.weight is loaded.embedding.weight


@needs_torchao
def test_the_files_are_as_small_as_their_integers(tmp_path: Path) -> None:
    sizes = ModelConfig(128, 2, 4, 2, 256, vocab_size=64, max_seq_len=8)
    count = sum(m.weight.numel() for m in StudentModel(sizes).layers.modules() if isinstance(m, nn.Linear))
    for config, bytes_each in ((INT8, 1.05), (IntegerConfig(4, 32), 0.66)):
        model = StudentModel(sizes)
        quantize(model, config)
        save_quantized(tmp_path / "q", model, config)
        assert (tmp_path / "q" / MODEL_FILE).stat().st_size < bytes_each * count + 4 * 64 * 128 + 12_000


@needs_torchao
def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path) -> None:
    model = rounding(INT8)
    to_integers(model, INT8)
    save_quantized(tmp_path / "q", model, INT8)
    with pytest.raises(IntegrityError, match="another architecture"):
        load_quantized(tmp_path / "q", make_student(vocab_size=20), INT8)
    file = tmp_path / "q" / MODEL_FILE
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(IntegrityError):
        load_quantized(tmp_path / "q", make_student(), INT8)


# --- training ---------------------------------------------------------------------------------------------------


@needs_torchao
@EVERY_TRAINER
def test_every_trainer_trains_and_resumes_with_rounding(name: str, tmp_path: Path) -> None:
    settings = {"num_epochs": 2, "gradient_accumulation_steps": 2, "log_interval": 4}

    def trainer(run_dir: str, seed: int = 0) -> Any:
        random_state = torch.get_rng_state()
        model = rounding(INT4, seed, dropout=0.2)
        torch.set_rng_state(random_state)
        torch.manual_seed(3)
        return trainer_of(name, model, tmp_path / run_dir, **settings)

    unstopped = trainer("a")
    before = weights(unstopped.model)
    unstopped.train()
    stopped = trainer("b")
    stop_in(stopped, 4)
    with pytest.raises(Interrupted):
        stopped.train()
    resumed = trainer("b")
    resumed.load_checkpoint(tmp_path / "b/checkpoints/checkpoint-4")
    resumed.train()
    after = weights(unstopped.model)
    assert all(not torch.equal(after[name], before[name]) for name in after if "proj" in name)
    assert same_tensors(weights(resumed.model), after)
    assert history_of(resumed) == history_of(unstopped)


@needs_torchao
def test_dpo_begins_without_a_margin() -> None:
    terms = dpo(rounding(INT4)).training_step(make_pairs(4))
    assert terms["reward_margin"] == pytest.approx(0, abs=1e-5)


@needs_torchao
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_scores_of_integers_are_those_of_the_end_of_training(precision: str) -> None:
    trainer = pretrain(rounding(INT8), make_batches(4), make_batches(3, seed=1), precision=precision, num_epochs=1)
    trainer.train()
    expected = trainer.final_scores
    to_integers(trainer.model, INT8)
    found = trainer.score()
    assert isinstance(expected, BlockScores)
    assert isinstance(found, BlockScores)
    torch.testing.assert_close(found.nll, expected.nll, rtol=1e-5 if precision == "float32" else 2e-2, atol=1e-4)


# --- from the command line --------------------------------------------------------------------------------------


@needs_torchao
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["int8", "int4"])
def test_a_run_ends_with_integer_weights_that_generate(preset: str) -> None:
    outcome = run(*TINY, f"quantization={preset}", "data.test_ratio=0.1")
    assert outcome.code == 0, outcome.errors
    assert "with integer weights" in outcome.output
    assert not outcome.errors.strip()
    directory = only_run()
    assert f"-{preset}-" in directory.name
    result, history = (strict_json(directory / name) for name in ("result.json", "history.json"))
    for part in ("val", "test"):
        assert result[f"quantized_{part}_loss"] == history[f"quantized_{part}_loss"]
        assert result[f"quantized_{part}_loss"] == pytest.approx(result[f"{part}_loss"], rel=1e-5)
    saved, made = load_student(directory).model, load_student(find_checkpoint(directory)).model
    ids = torch.arange(20).unsqueeze(0)
    assert torch.equal(saved(ids), made(ids))
    assert (directory / QUANTIZED / MODEL_FILE).is_file()
    assert torch.equal(load_student(directory / QUANTIZED).model(ids), made(ids))
    with pytest.raises(DataError, match="cannot train"):
        find_checkpoint(directory / QUANTIZED)
    text = run(str(directory), "def ", "--max-new-tokens", "3", module="kd.generate")
    assert text.code == 0, text.errors
    assert "Already done" in run(*TINY, f"quantization={preset}", "data.test_ratio=0.1").output
    on = run(*TINY, f"init_from={directory}", "name=on", "train.max_steps=2")
    assert on.code == 0, on.errors
    record = json.loads((directory / "environment.json").read_text())
    assert record["identity"]["quantization"]["weight_bits"] == int(preset[3:])
