"""Generated tokens against repeated full forward passes and against Hugging Face's generate."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd.config import ModelConfig
from kd.errors import ConfigError
from kd.generation import GenerationConfig, TextGenerator, keep_top_k, keep_top_p
from kd.model import StudentModel
from tests.llama import make_llama

CONFIG = ModelConfig(
    hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48, vocab_size=26, max_seq_len=16
)
PROMPT = torch.tensor([[3, 14, 15, 9, 2]])


class LetterTokenizer:
    """Lower-case letters as tokens 0 to 25."""

    def __init__(self, eos_token_id: int | None = None) -> None:
        self.eos_token_id = eos_token_id

    def __call__(self, text: str) -> Mapping[str, list[int]]:
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(token + ord("a")) for token in token_ids)


def make_model(seed: int = 0) -> StudentModel:
    """Return a student with weights so large that its choices vary."""
    torch.manual_seed(seed)
    model = StudentModel(CONFIG)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.4 + (weight.ndim < 2))
    return model


def make_generator(eos_token_id: int | None = None, seed: int = 0) -> TextGenerator:
    """Return a generator of letters."""
    return TextGenerator(make_model(seed), LetterTokenizer(eos_token_id))


def greedy_without_cache(model: StudentModel, context: list[int], num_tokens: int) -> list[int]:
    """Return the likeliest tokens, with a full forward pass for each; a full context is halved."""
    window, new_tokens = list(context), []
    for _ in range(num_tokens):
        if len(window) > CONFIG.max_seq_len:
            window = window[-(CONFIG.max_seq_len // 2) :]
        with torch.no_grad():
            token = int(model(torch.tensor([window]))[0, -1].argmax())
        window.append(token)
        new_tokens.append(token)
    return new_tokens


@pytest.mark.parametrize("seed", range(4))
def test_greedy_equals_repeated_full_forward(seed: int) -> None:
    generator = make_generator(seed=seed)
    tokens = generator.generate_ids(PROMPT, GenerationConfig(max_new_tokens=11))
    assert tokens == greedy_without_cache(generator.model, PROMPT[0].tolist(), 11)


@pytest.mark.parametrize("seed", range(3))
def test_generation_goes_on_past_the_context(seed: int) -> None:
    generator = make_generator(seed=seed)
    tokens = generator.generate_ids(PROMPT, GenerationConfig(max_new_tokens=60))
    assert len(tokens) == 60
    assert tokens == greedy_without_cache(generator.model, PROMPT[0].tolist(), 60)


@pytest.mark.parametrize("length", [CONFIG.max_seq_len - 1, CONFIG.max_seq_len, CONFIG.max_seq_len + 9])
def test_prompt_as_long_as_the_context(length: int) -> None:
    generator = make_generator()
    prompt = torch.arange(length).unsqueeze(0) * 7 % CONFIG.vocab_size
    newest = prompt[0, -CONFIG.max_seq_len :].tolist()
    tokens = generator.generate_ids(prompt, GenerationConfig(max_new_tokens=12))
    assert tokens == greedy_without_cache(generator.model, newest, 12)


def test_greedy_equals_hugging_face() -> None:
    generator = make_generator()
    llama: Any = make_llama(generator.model)  # the annotations of generate reject the model itself
    expected = llama.generate(PROMPT, max_new_tokens=11, do_sample=False)
    assert generator.generate_ids(PROMPT, GenerationConfig(max_new_tokens=11)) == expected[0, PROMPT.size(1) :].tolist()


def test_generation_stops_before_the_end_of_text() -> None:
    everything = make_generator().generate_ids(PROMPT, GenerationConfig(max_new_tokens=10))
    end = next(token for token in everything if token != everything[0])
    stopped = make_generator(eos_token_id=end).generate_ids(PROMPT, GenerationConfig(max_new_tokens=10))
    assert stopped == everything[: everything.index(end)]


@pytest.mark.parametrize("config", [GenerationConfig("top_k", top_k=1), GenerationConfig("top_p", top_p=1e-6)])
def test_sampling_from_one_token_is_greedy(config: GenerationConfig) -> None:
    generator = make_generator()
    greedy = generator.generate_ids(PROMPT, GenerationConfig(max_new_tokens=256))
    assert generator.generate_ids(PROMPT, config) == greedy


def test_low_temperature_approaches_greedy() -> None:
    generator = make_generator()
    greedy = generator.generate_ids(PROMPT, GenerationConfig(max_new_tokens=30))
    cold = GenerationConfig("top_k", max_new_tokens=30, temperature=1e-4)
    assert generator.generate_ids(PROMPT, cold) == greedy


@pytest.mark.parametrize("strategy", ["top_k", "top_p"])
def test_a_seed_fixes_the_draws_and_leaves_the_global_ones_alone(strategy: str) -> None:
    generator = make_generator()
    configs = [GenerationConfig(strategy, max_new_tokens=40, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    before = torch.get_rng_state()
    first, again, other = (generator.generate_ids(PROMPT, config) for config in configs)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again
    assert first != other


def test_draws_follow_the_models_probabilities() -> None:
    generator = make_generator()
    with torch.no_grad():
        logits = generator.model(PROMPT)[0, -1] / 3.0
    expected = keep_top_k(logits, 3).softmax(dim=-1)
    counts = torch.zeros(CONFIG.vocab_size)
    for seed in range(600):
        config = GenerationConfig("top_k", max_new_tokens=1, temperature=3.0, top_k=3, seed=seed)
        counts[generator.generate_ids(PROMPT, config)[0]] += 1
    torch.testing.assert_close(counts / 600, expected, atol=0.08, rtol=0)
    assert int((counts > 0).sum()) == 3


def test_text_in_text_out_without_the_prompt() -> None:
    generator = make_generator()
    tokens = generator.generate_ids(torch.tensor([[7, 8]]), GenerationConfig(max_new_tokens=9))
    assert generator.generate("hi", GenerationConfig(max_new_tokens=9)) == LetterTokenizer().decode(tokens)


def test_empty_prompt_starts_from_the_end_of_text() -> None:
    generator = make_generator(eos_token_id=25)
    config = GenerationConfig(max_new_tokens=5)
    assert generator.generate("", config) == generator.generate("z", config)
    with pytest.raises(ConfigError, match="prompt is empty"):
        make_generator().generate("")


def test_model_is_put_in_eval_mode_and_stays_there() -> None:
    generator = make_generator()
    assert not generator.model.training
    generator.model.train()
    generator.generate_ids(PROMPT, GenerationConfig(max_new_tokens=1))
    assert not generator.model.training


@pytest.mark.parametrize("shape", [(2, 3), (1, 0), (3,)])
def test_input_that_is_not_one_sequence_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(1, L\)"):
        make_generator().generate_ids(torch.zeros(shape, dtype=torch.long))


@settings(deadline=None, max_examples=50)
@given(logits=st.lists(st.sampled_from([-2.0, 0.0, 0.0, 1.5, 3.0]), min_size=1, max_size=12), k=st.integers(1, 15))
def test_top_k_keeps_exactly_k_of_the_largest(logits: list[float], k: int) -> None:
    x = torch.tensor(logits)
    kept = keep_top_k(x, k)
    survivors = kept > -math.inf
    assert int(survivors.sum()) == min(k, len(logits))
    assert torch.equal(kept[survivors], x[survivors])
    if (~survivors).any():
        assert x[survivors].min() >= x[~survivors].max()


@settings(deadline=None, max_examples=100)
@given(logits=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12), p=st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits: list[float], p: float) -> None:
    x = torch.tensor(logits)
    survivors = (keep_top_p(x, p) > -math.inf).numpy()
    powers = np.exp(np.array(logits, dtype=np.float64))
    probabilities = np.sort(powers / powers.sum())[::-1]
    count = int(survivors.sum())
    assert probabilities[:count].sum() >= p - 1e-5
    assert probabilities[: count - 1].sum() < p + 1e-5
    if count < len(logits):
        assert x.numpy()[survivors].min() >= x.numpy()[~survivors].max()


def test_filters_take_batches() -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    for rows, batched in ((keep_top_k(x[1, 2], 3), keep_top_k(x, 3)), (keep_top_p(x[1, 2], 0.5), keep_top_p(x, 0.5))):
        assert torch.equal(batched[1, 2], rows)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("strategy", "beam"),
        ("max_new_tokens", 0),
        ("temperature", 0.0),
        ("temperature", math.nan),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("seed", -1),
    ],
)
def test_impossible_settings_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"generation.{key}={value}"):
        GenerationConfig(**{key: value})


def test_defaults() -> None:
    config = GenerationConfig()
    assert (config.strategy, config.max_new_tokens) == ("greedy", 256)


def test_model_in_half_precision() -> None:
    model = make_model().to(torch.bfloat16)
    config = GenerationConfig("top_p", max_new_tokens=20)
    tokens: list[int] = TextGenerator(model, LetterTokenizer()).generate_ids(PROMPT, config)
    assert len(tokens) == 20
    assert all(0 <= token < CONFIG.vocab_size for token in tokens)


def test_parameters_can_still_be_trained_after_generating() -> None:
    generator = make_generator()
    generator.generate_ids(PROMPT, GenerationConfig(max_new_tokens=3))
    logits: Tensor = generator.model.train()(PROMPT)
    logits.sum().backward()  # type: ignore[no-untyped-call]
    assert all(weight.grad is not None for weight in generator.model.parameters())
