"""Teachers from local files: found, identified by content, loaded frozen and without pickle, and checked."""

import inspect
import json
import logging
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import kd.teacher_files
from kd.config import HubTeacherConfig, LocalTeacherConfig, ModelConfig
from kd.data.tokenizers import load_tokenizer
from kd.errors import ConfigError, DataError, Interrupted, NumericError
from kd.model import StudentModel
from kd.teacher import (
    LiveTeacher,
    check_teacher,
    choose_dtype,
    freeze,
    load_pretrained,
    load_teacher_model,
    logits_of,
)
from kd.teacher_files import PretrainedTeacher, check_vocabulary, find_teacher
from tests.tiny_teacher import BATCH, CPU, SIZES, VOCAB


def make_qwen() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    model: Qwen2ForCausalLM = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))
    model.eval()  # type: ignore[no-untyped-call]
    return model


@pytest.fixture(scope="session")
def saved_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "qwen"
    make_qwen().save_pretrained(folder)
    return folder


@pytest.fixture
def qwen(saved_qwen: Path, tmp_path: Path) -> Path:
    """A copy of its own for each test."""
    return Path(shutil.copytree(saved_qwen, tmp_path / "qwen"))


def change_weights(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def change_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def find_local(path: Path, **settings: Any) -> PretrainedTeacher:
    return find_teacher(LocalTeacherConfig(path=str(path), **settings))


def find_hub(model_id: str, revision: str | None = None) -> PretrainedTeacher:
    return find_teacher(HubTeacherConfig(model_id=model_id, revision=revision))


# --- loading ----------------------------------------------------------------------------------------------------


def test_the_signature_is_the_specified_one() -> None:
    parameters = inspect.signature(load_teacher_model).parameters
    assert list(parameters)[:2] == ["model_id", "device"]
    assert parameters["model_id"].default == "Qwen/Qwen2.5-0.5B"
    assert parameters["device"].default == torch.device("cuda")
    assert parameters["dtype"].default == torch.float16
    assert parameters["dtype"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_teacher_is_loaded_frozen_in_eval_mode_and_its_dtype(qwen: Path, dtype: torch.dtype) -> None:
    model = load_teacher_model(str(qwen), CPU, dtype=dtype)
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_its_logits_are_those_of_the_saved_model(qwen: Path) -> None:
    teacher = LiveTeacher(load_teacher_model(str(qwen), CPU, dtype=torch.float32), CPU)
    with torch.no_grad():
        expected = make_qwen()(BATCH["input_ids"]).logits
    torch.testing.assert_close(teacher.logits(BATCH), expected)
    assert not teacher.logits(BATCH).requires_grad


def test_a_found_teacher_loads_as_it_was_described(qwen: Path) -> None:
    found = find_local(qwen, dtype="bfloat16")
    assert (found.vocab_size, found.max_seq_len) == (VOCAB, 64)
    live = load_pretrained(found, CPU)
    assert live.logits(BATCH).shape == (2, 12, VOCAB)
    assert live.logits(BATCH).dtype == torch.bfloat16
    assert "Qwen2ForCausalLM" in live.description
    by_path = find_hub(str(qwen))
    assert by_path.vocab_size == VOCAB


def test_auto_is_float32_on_the_cpu() -> None:
    assert choose_dtype("auto", CPU) == torch.float32
    assert choose_dtype("float16", CPU) == torch.float16


class Bomb:
    """Leaves a file behind if it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return _explode, ("exploded",)


def _explode(name: str) -> None:
    Path(name).touch()


def test_a_pickled_model_is_refused_and_not_opened(qwen: Path) -> None:
    (qwen / "model.safetensors").unlink()
    (qwen / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Bomb()}))
    with pytest.raises(DataError, match=r"\*\.safetensors") as caught:
        find_local(qwen)
    assert caught.value.exit_code == 4
    with pytest.raises(DataError, match=r"\*\.safetensors"):
        load_teacher_model(str(qwen), CPU)
    assert not Path("exploded").exists()


def test_code_in_a_models_directory_is_not_run(qwen: Path) -> None:
    (qwen / "evil.py").write_text("from pathlib import Path\nPath('exploded').touch()\nclass Evil: ...\n")
    code = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    change_config(qwen, model_type="evil", auto_map=code)
    with pytest.raises(DataError):
        find_local(qwen)
    with pytest.raises(DataError):
        load_teacher_model(str(qwen), CPU)
    assert not Path("exploded").exists()


def drop_a_layer(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        del tensors[name]


def truncate_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def break_config(directory: Path) -> None:
    (directory / "config.json").write_text("{")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated weights": truncate_weights,
    "weights of another width": lambda path: change_config(path, hidden_size=32),
    "a layer's weights missing": lambda path: change_weights(path, drop_a_layer),
    "no model type": lambda path: change_config(path, model_type="none_such"),
    "broken configuration": break_config,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_model_is_a_data_error_that_names_it(qwen: Path, damage: Callable[[Path], None]) -> None:
    damage(qwen)
    with pytest.raises(DataError) as caught:
        load_teacher_model(str(qwen), CPU, dtype=torch.float32)
    assert str(qwen) in str(caught.value)
    assert "\n" not in str(caught.value)


def one_layer(directory: Path) -> None:
    layer_types = json.loads((directory / "config.json").read_text())["layer_types"]
    change_config(directory, num_hidden_layers=1, layer_types=layer_types[:1])


def add_a_score(directory: Path) -> None:
    """What a reward model has in place of a head; the head itself may be the embedding."""
    change_weights(directory, lambda tensors: tensors.update({"score.weight": torch.ones(1, SIZES["hidden_size"])}))


@pytest.mark.parametrize(("change", "named"), [(one_layer, r"12 .*layers\.1\."), (add_a_score, r"1 .*score\.weight")])
def test_weights_that_the_model_does_not_take_are_named(qwen: Path, change: Callable[[Path], None], named: str) -> None:
    change(qwen)
    with pytest.raises(DataError, match=f"qwen has {named}.*config.json"):
        load_pretrained(find_local(qwen), CPU)


def test_constants_that_older_files_hold_are_no_weights(qwen: Path) -> None:
    constants = {f"model.layers.0.self_attn.{name}": torch.ones(2) for name in ("masked_bias", "rotary_emb.inv_freq")}
    change_weights(qwen, lambda tensors: tensors.update(constants))
    assert load_pretrained(find_local(qwen), CPU).logits(BATCH).shape == (2, 12, VOCAB)


def test_an_adapter_beside_whole_weights_is_refused(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (qwen / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for find in (find_local, lambda path: find_hub(str(path)), lambda path: load_teacher_model(str(path), CPU)):
        with pytest.raises(DataError, match=r"holds an adapter \(adapter_config\.json\).*merge_and_unload"):
            find(qwen)
    use_hub_cache(monkeypatch, tmp_path / "hub")
    put_into_cache(tmp_path / "hub", qwen, "a" * 40)
    for reachable in (True, False):
        reach_hub(monkeypatch, reachable, "a" * 40, ["config.json", "adapter_config.json"])
        with pytest.raises(DataError, match=r"holds an adapter"):
            find_hub("org/tiny")


@pytest.mark.parametrize("load", [load_teacher_model, load_tokenizer])
def test_a_stop_while_it_loads_is_no_fault_of_the_files(
    qwen: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[[str], object]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise Interrupted("stopped")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", stop)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", stop)
    with pytest.raises(Interrupted):
        load(str(qwen))


# --- what is not there ------------------------------------------------------------------------------------------


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"teacher\.path=.*nowhere is not a directory"):
        find_local(tmp_path / "nowhere")


def test_a_directory_without_a_model_says_what_it_must_hold(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config\.json and \*\.safetensors.*gguf_file"):
        find_local(tmp_path)


def test_a_missing_gguf_file_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    for there in ((), ("b.gguf", "a.gguf")):
        for name in there:
            (tmp_path / name).touch()
        with pytest.raises(DataError, match=rf"teacher\.gguf_file=c\.gguf.*: {', '.join(sorted(there)) or 'none'}\."):
            find_local(tmp_path, gguf_file="c.gguf")


def use_hub_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))


def reach_hub(monkeypatch: pytest.MonkeyPatch, answer: bool, commit: str = "", files: Sequence[str] = ()) -> None:
    """Let the Hub be in reach or not, and answer with a commit and the names of its files."""
    info = SimpleNamespace(sha=commit, siblings=[SimpleNamespace(rfilename=name) for name in files])
    monkeypatch.setattr(kd.teacher_files, "hub_is_reachable", lambda: answer)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: info)


def test_a_model_that_is_not_cached_names_the_command_that_fetches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub_cache(monkeypatch, tmp_path / "hub")
    reach_hub(monkeypatch, False)
    with pytest.raises(
        DataError, match=r"teacher\.model_id=org/tiny .*hf download org/tiny --revision v1.*teacher=local"
    ):
        find_hub("org/tiny", "v1")
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("reachable", [False, True])
@pytest.mark.parametrize("model_id", ["/no/such/directory", "a b/c", "a..b", "???"])
def test_what_is_neither_a_directory_nor_an_id_is_said(
    monkeypatch: pytest.MonkeyPatch, reachable: bool, model_id: str
) -> None:
    reach_hub(monkeypatch, reachable)
    with pytest.raises(DataError) as caught:
        find_hub(model_id)
    assert f"teacher.model_id={model_id} is neither a directory nor a Hub id" in str(caught.value)


def put_into_cache(folder: Path, model: Path, commit: str) -> None:
    """Lay a model out as the Hub's client caches it."""
    repository = folder / "models--org--tiny"
    shutil.copytree(model, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)


def test_a_cached_model_is_used_where_the_hub_is_out_of_reach(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_hub_cache(monkeypatch, tmp_path / "hub")
    reach_hub(monkeypatch, False)
    put_into_cache(tmp_path / "hub", qwen, "a" * 40)
    with caplog.at_level(logging.INFO, "kd"):
        found = find_hub("org/tiny")
    assert "cached copy of org/tiny" in caplog.text
    assert (found.vocab_size, found.revision) == (VOCAB, "a" * 40)
    assert load_pretrained(found, CPU).logits(BATCH).shape == (2, 12, VOCAB)
    put_into_cache(tmp_path / "hub", qwen, "b" * 40)
    assert find_hub("org/tiny").fingerprint != found.fingerprint
    assert find_hub("org/tiny", "a" * 40).fingerprint == found.fingerprint


def test_a_stop_while_the_hub_is_asked_is_a_stop(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise Interrupted("stopped")

    use_hub_cache(monkeypatch, tmp_path / "hub")
    put_into_cache(tmp_path / "hub", qwen, "a" * 40)
    reach_hub(monkeypatch, True)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", stop)
    with pytest.raises(Interrupted):
        find_hub("org/tiny")


# --- identity by content ----------------------------------------------------------------------------------------


def test_a_fingerprint_follows_the_content_and_not_the_place(qwen: Path, tmp_path: Path) -> None:
    fingerprint = find_local(qwen).fingerprint
    (qwen / "README.md").write_text("words")
    moved = qwen.rename(tmp_path / "moved")
    assert find_local(moved).fingerprint == fingerprint
    assert find_local(moved, dtype="bfloat16").fingerprint != fingerprint

    def nudge(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"][3] += 1e-3

    change_weights(moved, nudge)
    nudged = find_local(moved).fingerprint
    assert nudged != fingerprint
    change_config(moved, rms_norm_eps=0.1)
    assert find_local(moved).fingerprint not in (fingerprint, nudged)


def test_shards_in_folders_are_a_part_of_a_model(qwen: Path) -> None:
    (qwen / "part").mkdir()
    (qwen / "model.safetensors").rename(qwen / "part" / "one.safetensors")
    tensors = load_file(qwen / "part" / "one.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "part/one.safetensors")}
    (qwen / "model.safetensors.index.json").write_text(json.dumps(index))
    before = find_local(qwen).fingerprint
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, qwen / "part" / "one.safetensors", metadata={"format": "pt"})
    assert find_local(qwen).fingerprint != before
    (qwen / "part" / "one.safetensors").unlink()
    with pytest.raises(DataError, match=r"lacks one\.safetensors, which its model\.safetensors\.index\.json names"):
        find_local(qwen)


# --- checks -----------------------------------------------------------------------------------------------------


def test_vocabularies_must_agree() -> None:
    check_vocabulary(VOCAB, VOCAB)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=300.*257 columns.*set model\.vocab_size=257"):
        check_vocabulary(257, 300)


def test_a_teacher_of_another_width_is_refused(qwen: Path) -> None:
    teacher = load_pretrained(find_local(qwen), CPU)
    check_teacher(teacher, BATCH, VOCAB)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=256"):
        check_teacher(teacher, BATCH, 256)


def make_wide(tensors: dict[str, Tensor]) -> None:
    """Let one layer's activations reach 10^6, which float16 does not hold."""
    tensors["model.layers.0.mlp.down_proj.weight"].mul_(3e5)
    tensors["model.layers.0.mlp.up_proj.weight"].mul_(30.0)
    tensors["model.layers.0.mlp.gate_proj.weight"].mul_(30.0)


def test_activations_that_overflow_in_float16_stop_with_the_way_out(qwen: Path) -> None:
    change_weights(qwen, make_wide)
    with pytest.raises(
        NumericError, match=r"not finite at \d+ of 24 positions.*float16.*teacher\.dtype=bfloat16"
    ) as caught:
        check_teacher(load_pretrained(find_local(qwen, dtype="float16"), CPU), BATCH, VOCAB)
    assert caught.value.exit_code == 5
    for dtype in ("bfloat16", "float32"):
        check_teacher(load_pretrained(find_local(qwen, dtype=dtype), CPU), BATCH, VOCAB)


class Giving(nn.Module):
    """Gives fixed logits in a form."""

    def __init__(self, logits: Tensor, form: Callable[[Tensor], Any] = lambda logits: logits) -> None:
        super().__init__()
        self.fixed, self.form = logits, form

    def forward(self, input_ids: Tensor) -> Any:  # noqa: ARG002
        return self.form(self.fixed)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_logit_is_enough(value: float) -> None:
    logits = torch.zeros(2, 12, VOCAB)
    check_teacher(LiveTeacher(Giving(logits), CPU), BATCH, VOCAB)
    logits[1, 5, 3] = value
    with pytest.raises(NumericError, match="at 1 of 24 positions"):
        check_teacher(LiveTeacher(Giving(logits), CPU), BATCH, VOCAB)


# --- the live teacher -------------------------------------------------------------------------------------------


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize("form", [lambda x: x, lambda x: {"logits": x}, Output])
def test_logits_come_in_three_forms(form: Callable[[Tensor], Any]) -> None:
    logits = torch.randn(2, 12, VOCAB)
    assert logits_of(form(logits)) is logits
    assert LiveTeacher(Giving(logits, form), CPU).logits(BATCH) is logits


def test_freezing_is_complete() -> None:
    model = freeze(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train())
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())


def test_the_flops_of_a_student_model_are_counted_exactly_and_of_others_by_their_size() -> None:
    config = ModelConfig(
        hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=24, vocab_size=VOCAB
    )
    ours = LiveTeacher(StudentModel(config), CPU)
    # The embedding is looked up, not multiplied, but its weight is the head's too: more than 2 per parameter.
    assert ours.flops_per_token > 2 * sum(p.numel() for p in ours.model.parameters()) * 0.9
    other = LiveTeacher(nn.Linear(3, 5), CPU)
    assert other.flops_per_token == 2 * (3 * 5 + 5)
