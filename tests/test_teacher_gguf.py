"""A GGUF file, written here, is a teacher: its logits are the model's, and its tokenizer comes with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kd.config import LocalTeacherConfig
from kd.data.tokenizers import load_tokenizer, train_bpe
from kd.errors import DataError
from kd.teacher import check_teacher, load_pretrained, load_teacher_model
from kd.teacher_files import PretrainedTeacher, find_teacher
from tests.tiny_teacher import BATCH, CPU, SIZES, VOCAB

GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers.": "blk.",
}


def find_local(path: Path, **settings: Any) -> PretrainedTeacher:
    return find_teacher(LocalTeacherConfig(path=str(path), **settings))


def to_gguf(name: str, weight: Tensor) -> tuple[str, "np.ndarray[Any, Any]"]:
    """Return a Llama weight under its GGUF name, with the rows of queries and keys interleaved as GGUF has them."""
    array = weight.detach().numpy()
    for ours, theirs in GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    heads = {"attn_q": SIZES["num_attention_heads"], "attn_k": SIZES["num_key_value_heads"]}
    for part, count in heads.items():
        if part in name:
            array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
    return name, np.ascontiguousarray(array)


def nothing(_: Any) -> None:
    """Add nothing."""


def save_gguf(path: Path, model: LlamaForCausalLM, more: Callable[[Any], None] = nothing) -> None:
    """Write a Llama model and a byte-level BPE, and what `more` adds to the writer, as one GGUF file."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    more(writer)
    writer.add_name("tiny")
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_rope_dimension_count(SIZES["hidden_size"] // SIZES["num_attention_heads"])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB)
    rules = json.loads(train_bpe(["abab"], VOCAB).backend_tokenizer.to_str())["model"]
    tokens = sorted(rules["vocab"], key=lambda token: rules["vocab"][token])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (VOCAB - 1))  # a control token, then normal ones
    writer.add_token_merges([" ".join(pair) for pair in rules["merges"]])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    for name, weight in model.named_parameters():  # a tied head is none of its own
        writer.add_tensor(*to_gguf(name, weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_is_a_teacher_with_its_tokenizer(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(0)
    model: LlamaForCausalLM = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    model.eval()  # type: ignore[no-untyped-call]
    save_gguf(tmp_path / "tiny.gguf", model)
    found = find_local(tmp_path, gguf_file="tiny.gguf", dtype="float32")
    assert (found.vocab_size, found.max_seq_len) == (VOCAB, 64)
    live = load_pretrained(found, CPU)
    with torch.no_grad():
        torch.testing.assert_close(live.logits(BATCH), model(BATCH["input_ids"]).logits)
    check_teacher(live, BATCH, VOCAB)
    tokenizer = load_tokenizer(str(tmp_path), None, "tiny.gguf")
    ids = tokenizer("plain text, ab")["input_ids"]
    assert tokenizer.decode(ids) == "plain text, ab"
    assert len(ids) == len("plain text, ab") - 1  # by the merged pair
    assert tokenizer.eos_token_id == 0
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    save_gguf(tmp_path / "tiny.gguf", model)
    assert find_local(tmp_path, gguf_file="tiny.gguf", dtype="float32").fingerprint != found.fingerprint


def scaled(kind: str, factor: float) -> Callable[[Any], None]:
    def add(writer: Any) -> None:
        writer.add_rope_scaling_type(pytest.importorskip("gguf").RopeScalingType(kind))
        writer.add_rope_scaling_factor(factor)

    return add


def frequencies(writer: Any) -> None:
    writer.add_tensor("rope_freqs.weight", np.array([1.0, 8.0], dtype=np.float32))


SCALED: dict[str, tuple[Callable[[Any], None], str]] = {
    "linear": (scaled("linear", 4.0), "type=linear, llama.rope.scaling.factor=4.0"),
    "yarn": (scaled("yarn", 4.0), "type=yarn"),
    "frequencies": (frequencies, "rope_freqs.weight"),
}


@pytest.mark.parametrize(("more", "named"), SCALED.values(), ids=SCALED.keys())
def test_positions_that_transformers_would_not_scale_are_refused_before_weights_load(
    tmp_path: Path, more: Callable[[Any], None], named: str
) -> None:
    model: LlamaForCausalLM = LlamaForCausalLM(LlamaConfig(**SIZES))
    save_gguf(tmp_path / "tiny.gguf", model, more)
    with pytest.raises(DataError, match=r"tiny\.gguf.*scales its rotary positions") as caught:
        find_local(tmp_path, gguf_file="tiny.gguf")
    assert named in str(caught.value)
    with pytest.raises(DataError, match=r"scales its rotary positions"):
        load_teacher_model(str(tmp_path), CPU, dtype=torch.float32, gguf_file="tiny.gguf")


def bias(writer: Any) -> None:
    writer.add_tensor("blk.1.attn_q.bias", np.ones(SIZES["hidden_size"], dtype=np.float32))


def third_layer(writer: Any) -> None:
    writer.add_tensor("blk.2.attn_norm.weight", np.ones(SIZES["hidden_size"], dtype=np.float32))


@pytest.mark.parametrize(("more", "named"), [(bias, "attn_q.bias"), (third_layer, "blk.2.attn_norm.weight")])
def test_tensors_that_the_model_does_not_take_are_named(
    tmp_path: Path, more: Callable[[Any], None], named: str
) -> None:
    save_gguf(tmp_path / "tiny.gguf", LlamaForCausalLM(LlamaConfig(**SIZES)), more)
    with pytest.raises(DataError, match=f"1 weights that LlamaForCausalLM does not take, like .*{named}"):
        load_pretrained(find_local(tmp_path, gguf_file="tiny.gguf", dtype="float32"), CPU)


def test_a_broken_gguf_file_is_a_data_error(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(DataError, match=r"tiny\.gguf"):
        find_local(tmp_path, gguf_file="tiny.gguf")
