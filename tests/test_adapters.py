"""LoRA: adapters alone train and are stored, losses see them, and merged they give the same model."""

import copy
import importlib.util
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.adapters import add_adapters, as_before_adapters, merge_adapters
from kd.checkpoint import holds_adapters
from kd.checkpoint_files import ADAPTER_FILE, MERGED, MODEL_FILE, find_checkpoint
from kd.config import AdapterConfig, Config, LoRAConfig, ModelConfig
from kd.config.adapter import UNSUITABLE, projections
from kd.errors import ConfigError, DataError, Interrupted
from kd.heads import logits_of
from kd.model import StudentModel, num_parameters
from kd.runs import Fingerprints, run_identity
from kd.student import load_student
from kd.trainers.answers import AnswerScorer

from .commands import TINY, only_run, run, strict_json
from .extras import extra
from .llama import make_llama
from .test_composition import config_of
from .test_fine_tuning import MODEL, STAGES, STEPS
from .trainers.examples import cut, dpo, make_answers, make_pairs, make_rollouts, online, orpo, sft
from .trainers.helpers import distill, history_of, make_batches, make_student, pretrain, same_tensors, stop_in, weights

Make = Callable[..., Any]
SETTINGS = LoRAConfig(rank=2, lora_alpha=6)


@pytest.fixture(scope="module")
def peft() -> Any:
    """The package, or a skip."""
    return extra("peft", "lora")


needs_peft = pytest.mark.usefixtures("peft")


def adapted(seed: int = 0, config: LoRAConfig = SETTINGS, **settings: Any) -> StudentModel:
    """Return a student with new adapters."""
    model = make_student(seed, **settings)
    add_adapters(model, config)
    return model


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give adapters weights as if they had been trained; return the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def tokens() -> Tensor:
    """Return token ids (B, L)."""
    return make_batches(1, rows=3)[0]["input_ids"]


# --- configuration ----------------------------------------------------------------------------------------------


def test_the_known_layers_are_those_of_the_model() -> None:
    model = make_student()
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert [*projections(model.config), "lm_head"] == linears
    assert all(model.get_submodule(name) is not None for name in UNSUITABLE)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("adapter.rank=0", ["adapter.rank=0"]),
        ("adapter.lora_alpha=-1", ["adapter.lora_alpha=-1"]),
        ("adapter.dropout=1", ["adapter.dropout=1"]),
        ("adapter.dropout=nan", ["adapter.dropout=nan"]),
        ("adapter.targets=[]", ["adapter.targets=[]"]),
        ("adapter.targets=[q_prj]", ["adapter.targets=q_prj", "q_proj", "down_proj"]),
        ("adapter.targets=[q_proj,layers.9.ffn.up_proj]", ["adapter.targets=layers.9.ffn.up_proj"]),
        ("adapter.targets=[attention_norm]", ["adapter.targets=attention_norm", "known"]),
        ("adapter.targets=[lm_head]", ["adapter.targets=lm_head", "head"]),
        ("adapter.targets=[q_proj,embedding]", ["adapter.targets=embedding", "embedding"]),
        ("adapter.alpha=3", ["adapter.alpha", "lora_alpha"]),
        ("train.strategy=fsdp", ["train.strategy=fsdp and adapter=lora", "train.strategy=ddp"]),
    ],
)
def test_a_bad_setting_is_named(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of("adapter=lora", override)
    assert all(word.lower() in str(caught.value).lower() for word in words), str(caught.value)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"adapter=lora needs peft.*kd-train\[lora\]"):
        add_adapters(make_student(), SETTINGS)


def test_runs_without_adapters_keep_their_identity() -> None:
    inputs = Fingerprints("corpus", "tokenizer", "teacher")
    plain, lora = (run_identity(Config(adapter=adapter), inputs) for adapter in (AdapterConfig(), LoRAConfig()))
    assert "adapter" not in plain.content
    assert lora.settings == plain.settings.replace("-seed0", "-lora8-seed0")
    others = [LoRAConfig(rank=4), LoRAConfig(lora_alpha=8), LoRAConfig(dropout=0.1), LoRAConfig(targets=["q_proj"])]
    digests = [run_identity(Config(adapter=adapter), inputs).digest for adapter in others]
    assert len({plain.digest, lora.digest, *digests}) == 6


# --- the model --------------------------------------------------------------------------------------------------


@needs_peft
def test_new_adapters_change_nothing_and_leave_the_class() -> None:
    model = make_student()
    before = model(tokens())
    add_adapters(model, SETTINGS)
    assert type(model) is StudentModel
    assert torch.equal(model(tokens()), before)
    with pytest.raises(ValueError, match="already"):
        add_adapters(model, SETTINGS)


@needs_peft
@pytest.mark.parametrize("make", [make_student, make_llama], ids=["student", "llama"])
def test_merged_weights_give_the_same_logits(make: Make) -> None:
    model = make() if make is make_student else make(make_student())
    names = list(model.state_dict())
    base = weights(model)
    add_adapters(model, SETTINGS)
    before = logits_of(model(tokens()))
    expected = logits_of(fill(model)(tokens()))
    assert (expected - before).abs().max() > 0.1
    merge_adapters(model)
    torch.testing.assert_close(logits_of(model(tokens())), expected, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == names
    assert not holds_adapters(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    changed = {name for name, value in weights(model).items() if not torch.equal(value, base[name])}
    assert changed == {name for name in names if "proj.weight" in name}
    add_adapters(model, SETTINGS)


@needs_peft
def test_a_merged_weight_is_the_formula() -> None:
    model = adapted()
    layer = fill(model).get_submodule("layers.1.ffn.up_proj")
    a, b = (layer.get_parameter(f"lora_{name}.default.weight") for name in "AB")
    expected = layer.get_parameter("base_layer.weight") + 6 / 2 * b @ a
    merge_adapters(model)
    torch.testing.assert_close(model.layers[1].ffn.up_proj.weight, expected)


@needs_peft
@pytest.mark.parametrize(
    ("targets", "count"), [(["q_proj"], 2), (["ffn.up_proj", "o_proj"], 4), (["layers.0.attention.v_proj"], 1)]
)
def test_targets_choose_the_layers(targets: list[str], count: int) -> None:
    model = adapted(config=LoRAConfig(targets=targets))
    found = {name.partition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert len(found) == count
    assert all(name.endswith(tuple(targets)) for name in found)


@needs_peft
def test_the_head_of_a_foreign_model_is_refused_by_name() -> None:
    llama = make_llama(make_student())
    for name in ("lm_head", "embed_tokens"):
        with pytest.raises(ConfigError, match=f"adapter.targets={name} is the head or the embedding"):
            add_adapters(llama, LoRAConfig(targets=[name]))


@needs_peft
def test_the_model_before_its_adapters_is_one_block_away() -> None:
    model = make_student(dropout=0.3)
    before = model.eval()(tokens())
    add_adapters(model, LoRAConfig(rank=2, dropout=0.3))
    after = fill(model).eval()(tokens())
    model.train()
    with as_before_adapters(model):
        assert torch.equal(model(tokens()), before)
    assert model.training
    assert torch.equal(model.eval()(tokens()), after)
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in model.named_parameters())


# --- training ---------------------------------------------------------------------------------------------------

LOADERS: dict[str, tuple[Make, Callable[[], list[Any]]]] = {
    "pretrain": (pretrain, lambda: make_batches(5)),
    "distillation": (distill, lambda: make_batches(5)),
    "sft": (sft, lambda: cut(make_answers(10), 2)),
    "dpo": (dpo, lambda: cut(make_pairs(10), 2)),
    "orpo": (orpo, lambda: cut(make_pairs(10), 2)),
    "grpo": (online, lambda: [make_rollouts(2, seed, size=4) for seed in range(5)]),
}
EVERY_TRAINER = pytest.mark.parametrize("name", LOADERS)


def trainer_of(name: str, model: nn.Module, run_dir: Path | None = None, **settings: Any) -> Any:
    """Return a trainer of five steps an epoch on made-up batches."""
    make, batches = LOADERS[name]
    return make(model, batches(), run_dir=run_dir, **{"num_epochs": 1, **settings})


@needs_peft
@EVERY_TRAINER
def test_only_adapters_train(name: str, tmp_path: Path) -> None:
    model = adapted()
    before = weights(model)
    trainer = trainer_of(name, model, tmp_path)
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    trainer.train()
    assert trainer.step == 5
    after = weights(model)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in after if ".lora_" in name}


@needs_peft
@EVERY_TRAINER
def test_a_stopped_run_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    settings = {"num_epochs": 2, "gradient_accumulation_steps": 2, "log_interval": 4}

    def trainer(run_dir: str) -> Any:
        model = adapted(config=LoRAConfig(rank=2, dropout=0.2), dropout=0.2)
        return trainer_of(name, model, tmp_path / run_dir, **settings)

    unstopped = trainer("a")
    unstopped.train()
    stopped = trainer("b")
    stop_in(stopped, 4)
    with pytest.raises(Interrupted):
        stopped.train()
    resumed = trainer("b")
    fill(resumed.model)  # all that is not base comes from the checkpoint
    resumed.load_checkpoint(tmp_path / "b/checkpoints/checkpoint-4")
    resumed.train()
    assert unstopped.total_steps == 6
    assert same_tensors(weights(resumed.model), weights(unstopped.model))
    assert history_of(resumed) == history_of(unstopped)


@needs_peft
def test_a_checkpoint_holds_adapters_alone(tmp_path: Path) -> None:
    trainer = pretrain(adapted(vocab_size=2000), make_batches(2), run_dir=tmp_path, num_epochs=1)
    trainer.train()
    checkpoint = tmp_path / "checkpoints/checkpoint-2"
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    assert trained < 0.1 * num_parameters(trainer.model)
    assert not (checkpoint / MODEL_FILE).exists()
    assert (checkpoint / ADAPTER_FILE).stat().st_size < 4 * trained + 10_000
    assert (checkpoint / "state.safetensors").stat().st_size < 8 * trained + 20_000
    for path in (tmp_path, checkpoint):
        with pytest.raises(DataError, match="adapters alone"):
            find_checkpoint(path)


@needs_peft
@pytest.mark.parametrize("make", [pretrain, distill])
def test_a_loss_without_logits_sees_the_adapters(make: Make) -> None:
    model = fill(adapted())
    batch = make_batches(1)[0]
    trainer = make(model, [batch], **({"alpha": 0.0} if make is distill else {}))
    assert trainer.linear_loss is not None
    trainer.training_step(batch)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten()).backward()  # type: ignore[no-untyped-call]
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


@needs_peft
def test_a_foreign_model_with_adapters_trains_without_logits() -> None:
    llama = make_llama(make_student())
    add_adapters(llama, SETTINGS)
    before = weights(llama)
    trainer = pretrain(llama, make_batches(3), num_epochs=1)
    trainer.train()
    assert trainer.linear_loss is not None
    assert {name for name, value in weights(llama).items() if not torch.equal(value, before[name])} == {
        name for name in before if ".lora_" in name
    }


@needs_peft
def test_parts_of_weights_are_refused_to_adapters() -> None:
    with pytest.raises(ConfigError, match=r"train\.strategy=fsdp does not go with adapters.*train\.strategy=ddp"):
        pretrain(adapted(), make_batches(2), strategy="fsdp")


# --- references -------------------------------------------------------------------------------------------------


@needs_peft
def test_dpo_begins_without_a_margin_against_the_weights_beside_the_adapters() -> None:
    terms = dpo(adapted()).training_step(make_pairs(4))
    assert (terms["reward_margin"], terms["reward_accuracy"]) == (0.0, 0.5)
    assert terms["loss"] == pytest.approx(math.log(2))


@needs_peft
@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_the_reference_is_the_model_without_adapters_and_no_copy(name: str) -> None:
    base = make_student()
    model = copy.deepcopy(base)
    add_adapters(model, SETTINGS)
    trainer = trainer_of(name, model)
    trainer.train()
    batch = make_batches(1)[0]
    arguments = batch["input_ids"], batch["labels"]
    with torch.no_grad():
        expected = AnswerScorer(base.eval())(*arguments).logprobs
        assert torch.equal(trainer._reference(*arguments).logprobs, expected)
        assert not torch.allclose(AnswerScorer(model.eval())(*arguments).logprobs, expected, atol=1e-3)
    assert trainer._reference.model is model


# --- from the command line --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny pre-training run."""
    folder, before = tmp_path_factory.mktemp("pretrained"), Path.cwd()
    os.chdir(folder)
    try:
        outcome = run(*TINY, *MODEL, "train=pretrain", *STEPS, KD_CACHE=str(folder / "cache"))
        assert outcome.code == 0, outcome.errors
        return only_run().absolute()
    finally:
        os.chdir(before)


@needs_peft
@pytest.mark.slow
def test_a_run_ends_with_merged_weights_that_others_go_on_from(pretrained: Path) -> None:
    sizes = ("debug=fast_examples", *MODEL, *STEPS, *STAGES["dpo"])
    command = (*sizes, "adapter=lora", "adapter.rank=2", f"init_from={pretrained}", "name=lora")
    outcome = run(*command)
    assert outcome.code == 0, outcome.errors
    assert "of which train" in outcome.output
    assert not outcome.errors.strip()
    directory = only_run("lora")
    assert "-lora2-" in directory.name
    assert strict_json(directory / "history.json")["reward_margin"][0] == 0
    assert {path.name for path in directory.glob("checkpoints/*/*.safetensors")} == {ADAPTER_FILE, "state.safetensors"}
    merged, base = load_student(directory).model, load_student(pretrained).model
    assert find_checkpoint(directory) == directory / MERGED
    different = {name for name, p in merged.named_parameters() if not torch.equal(p, base.get_parameter(name))}
    assert different == {f"{name}.weight" for name in projections(merged.config)}
    assert "Already done" in run(*command).output
    on = run(*sizes, f"init_from={directory}", "name=on")
    assert on.code == 0, on.errors
    text = run(str(directory), "def ", "--max-new-tokens", "3", module="kd.generate")
    assert text.code == 0, text.errors
    record = json.loads((directory / "environment.json").read_text())
    assert record["identity"]["adapter"] == {"rank": 2, "lora_alpha": 16, "dropout": 0.0, "targets": None}


@needs_peft
@pytest.mark.slow
def test_random_weights_beside_adapters_are_warned_of() -> None:
    outcome = run(*TINY, "adapter=lora", "train.max_steps=2")
    assert outcome.code == 0, outcome.errors
    assert "adapter=lora without init_from" in outcome.output


def test_a_target_that_fits_nothing_is_refused_before_anything_is_made() -> None:
    outcome = run(*TINY, "adapter=lora", "adapter.targets=[query]")
    assert outcome.code == 2
    assert "adapter.targets=query" in outcome.errors
    assert "q_proj" in outcome.errors
    assert not Path("outputs").exists()


def test_the_model_config_is_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"layers\.12"):
        Config(model=ModelConfig(num_layers=12), adapter=LoRAConfig(targets=["layers.12.ffn.up_proj"]))
