"""SplitModel: body and head together are the model, for every architecture it accepts."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from kd.heads import NoLinearHeadError, SplitModel, logits_of

from .tiny_teacher import BATCH, SIZES, VOCAB
from .trainers.helpers import make_batch, make_student

GPT2 = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "word_embed_proj_dim": 8,
    "ffn_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen2": SIZES,
    "gemma2": SIZES | {"head_dim": 4},  # soft-capped
    "gemma3_text": SIZES | {"head_dim": 4},
    "cohere": SIZES | {"logit_scale": 0.25, "eos_token_id": 1},  # scaled behind the head
    "granite": SIZES | {"logits_scaling": 3.0},
    "phi": SIZES,  # with a head bias
    "gpt2": GPT2,
    "gptj": GPT2 | {"rotary_dim": 4},  # with a head bias
    "opt": OPT,  # the head is narrower than the body
}


def make_model(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **ARCHITECTURES[name] | changes)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # the usual initialisation gives logits near 0, which hide mistakes
        if parameter.ndim > 1:
            parameter.data.mul_(5)
    bias = model.get_output_embeddings().bias
    if bias is not None:
        bias.data.normal_()
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_body_and_head_give_the_models_logits(name: str, dtype: torch.dtype) -> None:
    model = make_model(name).to(dtype)
    expected = model(**BATCH).logits
    split = SplitModel(model)
    hidden = split.hidden(BATCH["input_ids"])
    assert hidden.dtype == split.head.weight.dtype == dtype
    assert hidden.shape == (*BATCH["input_ids"].shape, split.head.weight.size(1))
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(split.head.logits(hidden), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(model(**BATCH).logits, expected), "the model is left as it was"


def test_soft_capping_and_bias_are_of_the_head() -> None:
    assert SplitModel(make_model("gemma2", final_logit_softcapping=0.5)).head.softcap == 0.5
    assert SplitModel(make_model("phi")).head.bias is not None
    assert SplitModel(make_model("llama")).head.softcap is None


def test_gradients_flow_through_body_and_head() -> None:
    model = make_model("qwen2")
    split = SplitModel(model)
    split.head.logits(split.hidden(BATCH["input_ids"])).square().sum().backward()
    parts = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(**BATCH).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parts[name], parameter.grad)


def test_a_student_is_split_without_a_trial() -> None:
    student, ids = make_student(), make_batch(2)["input_ids"]
    split = SplitModel(student)
    assert torch.equal(split.head.logits(split.hidden(ids)), student(ids))
    student.to(torch.float64)
    assert split.head.weight is student.embedding.weight


def test_the_mode_of_a_model_survives_the_trial() -> None:
    assert SplitModel(make_model("llama").train())._model.training


class Changed(transformers.LlamaForCausalLM):
    """Does something to its logits that nothing tells of."""

    offset: float | Tensor = 1.0

    def forward(self, input_ids: Tensor) -> Any:  # type: ignore[override]
        output = super().forward(input_ids)
        output.logits = output.logits + self.offset
        return output


class InFloat32(transformers.LlamaForCausalLM):
    """Returns logits in float32, whatever it computes in, as many models do."""

    def forward(self, input_ids: Tensor) -> Any:  # type: ignore[override]
        output = super().forward(input_ids)
        output.logits = output.logits.float()
        return output


def test_hidden_states_have_the_heads_dtype() -> None:
    model = InFloat32(transformers.LlamaConfig(**SIZES)).to(torch.bfloat16).eval()
    split = SplitModel(model)
    hidden = split.hidden(BATCH["input_ids"])
    assert hidden.dtype == torch.bfloat16
    torch.testing.assert_close(split.head.logits(hidden).float(), model(**BATCH).logits, rtol=0, atol=0)


class Squared(nn.Linear):
    """A head that is not what it looks like."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden).square()


def test_what_has_no_linear_head_is_refused_with_the_reason() -> None:
    changed = Changed(transformers.LlamaConfig(**SIZES))
    with pytest.raises(NoLinearHeadError, match="something else changes them"):
        SplitModel(changed)
    changed.offset = torch.arange(VOCAB)
    with pytest.raises(NoLinearHeadError, match="does not run without its head"):
        SplitModel(changed)
    model = make_model("llama")
    model.lm_head = Squared(SIZES["hidden_size"], VOCAB)
    with pytest.raises(NoLinearHeadError, match=r"is a Squared, not a plain nn\.Linear"):
        SplitModel(model)
    with pytest.raises(NoLinearHeadError, match="Sequential does not say which module is its head"):
        SplitModel(nn.Sequential(make_student()))


def test_logits_are_found_in_every_form_of_output() -> None:
    logits = torch.zeros(1)
    for output in (logits, {"logits": logits}, transformers.modeling_outputs.CausalLMOutput(logits=logits)):  # type: ignore[arg-type]
        assert logits_of(output) is logits
