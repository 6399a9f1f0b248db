"""The student against Hugging Face's Llama with the same weights, its cache, its masks and its initialisation."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kd.config import ModelConfig
from kd.losses import causal_lm_loss
from kd.model import (
    KeyValueCache,
    RMSNorm,
    StudentModel,
    TransformerBlock,
    _visible_tokens,
    forward_flops_per_token,
    num_parameters,
)
from tests.llama import llama_name, make_llama

BATCH, LENGTH = 3, 20
CONFIG = ModelConfig(
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    vocab_size=61,
    max_seq_len=24,
    rope_theta=10000.0,
)


def make_student(config: ModelConfig = CONFIG) -> StudentModel:
    """Return a student whose weights are large and whose norms differ from 1, so that every part shows."""
    torch.manual_seed(0)
    student = StudentModel(config).eval()
    with torch.no_grad():
        for weight in student.parameters():
            weight.copy_(torch.randn_like(weight) * 0.15 + (weight.ndim < 2))
    return student


def random_ids(length: int = LENGTH) -> Tensor:
    """Return (BATCH, length) token ids."""
    return torch.randint(0, CONFIG.vocab_size, (BATCH, length), generator=torch.Generator().manual_seed(1))


def padding_mask(side: str) -> Tensor:
    """Return a (BATCH, LENGTH) mask with 0, 5 and 19 padding tokens on a side."""
    slots = torch.arange(LENGTH).expand(BATCH, -1)
    padding = torch.tensor([0, 5, 19]).unsqueeze(1)
    return (slots >= padding if side == "left" else slots < LENGTH - padding).long()


def new_cache(max_len: int = CONFIG.max_seq_len) -> KeyValueCache:
    """Return an empty cache for BATCH sequences."""
    return KeyValueCache(CONFIG, BATCH, max_len, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("theta", [10000.0, 1000000.0])
def test_logits_equal_llama(num_kv_heads: int, theta: float) -> None:
    student = make_student(replace(CONFIG, num_kv_heads=num_kv_heads, rope_theta=theta))
    with torch.no_grad():
        expected = make_llama(student)(random_ids()).logits
        torch.testing.assert_close(student(random_ids()), expected, atol=1e-5, rtol=0)


def test_logits_equal_llama_at_far_positions() -> None:
    student = make_student(replace(CONFIG, num_layers=1, max_seq_len=512))
    with torch.no_grad():
        expected = make_llama(student)(random_ids(512)).logits
        torch.testing.assert_close(student(random_ids(512)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_kv_heads", [4, 1])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_equal_llama_with_padding(side: str, num_kv_heads: int) -> None:
    student = make_student(replace(CONFIG, num_kv_heads=num_kv_heads))
    mask = padding_mask(side)
    with torch.no_grad():
        expected = make_llama(student)(random_ids(), attention_mask=mask).logits
        logits = student(random_ids(), attention_mask=mask)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_token(side: str) -> None:
    student, mask, ids = make_student(), padding_mask(side), random_ids()
    with torch.no_grad():
        padded = student(ids, attention_mask=mask)
        for row in range(BATCH):
            real = mask[row].bool()
            torch.testing.assert_close(padded[row, real], student(ids[row : row + 1, real])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("past", [0, 3])
def test_every_token_sees_something_but_no_padding_nor_future(past: int) -> None:
    mask = padding_mask("left")
    visible = _visible_tokens(mask, past, LENGTH, mask.device)
    assert visible is not None
    seen = visible[:, 0]  # (BATCH, LENGTH - past, LENGTH)
    assert seen.any(dim=-1).all()
    for row, query, key in seen.nonzero().tolist():
        assert key == past + query or (key < past + query and mask[row, key])


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_are_finite_with_padding(side: str) -> None:
    student = make_student().train()
    student(random_ids(), attention_mask=padding_mask(side)).square().mean().backward()
    gradients = [weight.grad for weight in student.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() and gradient.any() for gradient in gradients)


def test_gradients_equal_llama() -> None:
    student = make_student()
    llama = make_llama(student)
    student(random_ids()).square().mean().backward()
    llama(random_ids()).logits.square().mean().backward()
    theirs = dict(llama.named_parameters())
    for name, weight in student.named_parameters():
        torch.testing.assert_close(weight.grad, theirs[llama_name(name)].grad, atol=1e-4, rtol=1e-4, msg=name)


def test_future_tokens_are_not_seen() -> None:
    student, ids = make_student(), random_ids()
    changed = ids.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % CONFIG.vocab_size
    with torch.no_grad():
        before, after = student(ids), student(changed)
    torch.testing.assert_close(after[:, :12], before[:, :12])
    assert not torch.allclose(after[:, 12:], before[:, 12:])


@pytest.mark.parametrize("cuts", [[7, *range(8, LENGTH)], [1, 6, 7, 15], list(range(1, LENGTH)), []])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_cached_forward_equals_uncached(cuts: list[int], side: str) -> None:
    student, ids, cache = make_student(), random_ids(), new_cache()
    mask = None if side == "none" else padding_mask(side)
    bounds = [0, *cuts, LENGTH]
    with torch.no_grad():
        expected = student(ids, attention_mask=mask)
        parts = []
        for start, end in itertools.pairwise(bounds):
            seen = None if mask is None else mask[:, :end]
            parts.append(student(ids[:, start:end], attention_mask=seen, cache=cache))
            assert cache.length == end
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], expected[real], atol=2e-5, rtol=0)


def test_full_cache_is_refused() -> None:
    student, cache = make_student(), new_cache(max_len=8)
    with torch.no_grad():
        student(random_ids(8), cache=cache)
        with pytest.raises(ValueError, match=r"8 of max_len=8"):
            student(random_ids(1), cache=cache)
    assert cache.length == 8


def test_cache_of_another_batch_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"3 sequences, got 1"):
        make_student()(random_ids()[:1], cache=new_cache())


@pytest.mark.parametrize("past", [0, 10])
def test_too_long_sequence_is_refused(past: int) -> None:
    student, cache = make_student(), new_cache()
    with torch.no_grad():
        if past:
            student(random_ids(past), cache=cache)
        with pytest.raises(ValueError, match=r"25 tokens .*max_seq_len=24"):
            student(random_ids(25 - past), cache=cache)


def test_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 19\), expected \(3, 20\)"):
        make_student()(random_ids(), attention_mask=torch.ones(BATCH, LENGTH - 1))


def test_hidden_states_are_what_the_head_sees() -> None:
    student = make_student()
    hidden = student.hidden_states(random_ids())
    assert hidden.shape == (BATCH, LENGTH, CONFIG.hidden_size)
    torch.testing.assert_close(hidden @ student.embedding.weight.T, student(random_ids()))


def test_head_and_embedding_share_one_weight() -> None:
    student = StudentModel(CONFIG)
    assert student.lm_head.weight is student.embedding.weight
    reloaded = StudentModel(CONFIG)
    reloaded.load_state_dict(student.state_dict())
    assert reloaded.lm_head.weight is reloaded.embedding.weight
    torch.testing.assert_close(reloaded.lm_head.weight, student.embedding.weight, atol=0, rtol=0)


def test_loss_at_initialisation_is_that_of_guessing() -> None:
    config = replace(CONFIG, hidden_size=96, intermediate_size=256, vocab_size=4096, max_seq_len=128)
    torch.manual_seed(0)
    student = StudentModel(config)
    ids = torch.randint(0, config.vocab_size, (4, 129))
    with torch.no_grad():
        loss = float(causal_lm_loss(student(ids[:, :-1]), ids[:, 1:]))
    assert loss == pytest.approx(math.log(config.vocab_size), abs=0.1)


def test_initial_spread_of_weights() -> None:
    torch.manual_seed(0)
    student = StudentModel(replace(CONFIG, hidden_size=128, intermediate_size=256, num_layers=8))
    block = student.layers[3].state_dict()
    assert float(block["ffn.gate_proj.weight"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(block["attention.o_proj.weight"].std()) == pytest.approx(0.02 / 4, rel=0.05)
    assert float(block["ffn.down_proj.weight"].std()) == pytest.approx(0.02 / 4, rel=0.05)
    assert (block["attention_norm.weight"] == 1).all()


def test_one_seed_gives_one_model() -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.cat([weight.flatten() for weight in StudentModel(CONFIG).parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize("mask", [None, padding_mask("left")], ids=["no_mask", "mask"])
def test_dropout_acts_in_training_only(mask: Tensor | None) -> None:
    student, dropped = make_student(), make_student(replace(CONFIG, dropout=0.3))
    with torch.no_grad():
        expected = student(random_ids(), mask)
        assert torch.equal(dropped(random_ids(), mask), expected)
        dropped.train()
        assert not torch.allclose(dropped(random_ids(), mask), dropped(random_ids(), mask))
        assert torch.equal(student.train()(random_ids(), mask), expected)


@pytest.mark.parametrize("place", ["attention_branch", "ffn_branch", "probabilities"])
def test_dropout_acts_in_each_place(place: str) -> None:
    student = make_student(replace(CONFIG, num_layers=1, dropout=0.5)).train()
    block = student.layers[0]
    assert isinstance(block, TransformerBlock)
    with torch.no_grad():
        silent = block.attention.o_proj if place == "ffn_branch" else block.ffn.down_proj
        silent.weight.zero_()
        if place == "attention_branch":
            block.attention.dropout = 0.0
        if place == "probabilities":
            block.dropout.p = 0.0
        assert not torch.allclose(student(random_ids()), student(random_ids()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close(dtype: torch.dtype) -> None:
    student = make_student()
    with torch.no_grad():
        expected = student(random_ids()).log_softmax(dim=-1)
        logits = student.to(dtype)(random_ids())
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float().log_softmax(dim=-1), expected, atol=0.25, rtol=0)


def test_autocast_stays_close() -> None:
    student = make_student()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = student(random_ids())
    torch.testing.assert_close(
        logits.float().log_softmax(dim=-1), student(random_ids()).log_softmax(dim=-1), atol=0.25, rtol=0
    )


def test_rms_norm_gives_unit_root_mean_square() -> None:
    x = torch.randn(5, 7, 16) * 30
    norm = RMSNorm(16, eps=1e-6)
    torch.testing.assert_close(norm(x).square().mean(dim=-1), torch.ones(5, 7))
    assert norm(torch.zeros(1, 16)).isfinite().all()


def test_specified_size() -> None:
    config = ModelConfig()
    per_layer = 512 * 512 * 2 + 2 * 512 * 128 + 3 * 512 * 2048 + 2 * 512
    with torch.device("meta"):
        student = StudentModel(config)
    assert num_parameters(student) == 151936 * 512 + 12 * per_layer + 512
    assert 110e6 < num_parameters(student) < 130e6


def test_flops_count_every_matrix_once_and_the_causal_half_of_attention() -> None:
    student = StudentModel(CONFIG)
    matrices = sum(weight.numel() for weight in student.parameters() if weight.ndim == 2)
    seen = sum(position + 1 for position in range(LENGTH)) / LENGTH
    attention = CONFIG.num_layers * 2 * (2 * CONFIG.hidden_size * seen)
    assert forward_flops_per_token(CONFIG, LENGTH) == pytest.approx(2 * matrices + attention)


@pytest.mark.parametrize("length", [1, 5, LENGTH])
def test_flops_are_those_that_torch_counts(length: int) -> None:
    """Token by token with a cache: so each sees its past alone, where torch counts all of a causal mask's square."""
    student = StudentModel(CONFIG).eval()
    cache = KeyValueCache(CONFIG, 1, length, torch.device("cpu"), torch.float32)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # whose products torch counts
        for token in torch.arange(length):
            student(token.view(1, 1), cache=cache)
    assert counter.get_total_flops() == length * forward_flops_per_token(CONFIG, length)
