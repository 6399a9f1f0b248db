"""Generated tokens against repeated full forward passes and Hugging Face's generate; batches against single rows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd.config import ModelConfig
from kd.errors import ConfigError
from kd.generation import GenerationConfig, Rollout, TextGenerator, choose_tokens, keep_top_k, keep_top_p
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

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, list[int]]:
        assert not add_special_tokens
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


@pytest.mark.parametrize("strategy", ["sample", "top_k", "top_p"])
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


def test_sample_draws_from_the_full_softmax_at_the_sampling_temperature() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, -6.0])
    rows = logits.expand(20_000, 4)
    config = GenerationConfig("sample", temperature=2.0)
    drawn = choose_tokens(rows, config, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=4) / len(rows)
    torch.testing.assert_close(counts, (logits / 2.0).softmax(dim=-1), atol=0.012, rtol=0)
    assert counts[3] > 0


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


@pytest.mark.parametrize(
    ("counts", "p", "kept"),
    [
        ([1, 1], 0.5, 1),
        ([1, 1], 0.5001, 2),
        ([1, 1, 1, 1], 0.25, 1),
        ([1, 1, 1, 1], 0.75, 3),
        ([4, 2, 1, 1], 0.5, 1),
        ([4, 2, 1, 1], 0.75, 2),
        ([4, 2, 1, 1], 0.76, 3),
        ([4, 2, 1, 1], 1.0, 4),
    ],
)
def test_top_p_keeps_no_token_beyond_p(counts: list[int], p: float, kept: int) -> None:
    """Sums that floats hold exactly, so that a set which just reaches p is told from one with a token more."""
    assert int((keep_top_p(torch.tensor(counts).float().log2() * math.log(2), p) > -math.inf).sum()) == kept


def test_each_of_several_ends_ends_a_text() -> None:
    free = make_generator()
    config = GenerationConfig(max_new_tokens=ROOM)
    single, rows = free.generate_ids(PROMPT, config), free.generate_batch_ids(PROMPTS, config)
    ends = {single[3], rows[2][1]}
    generator = make_generator(eos_token_id=25)
    generator.end_ids = frozenset(ends)

    def cut_at_end(row: list[int]) -> list[int]:
        return row[: next((index for index, token in enumerate(row) if token in ends), len(row))]

    assert generator.generate_ids(PROMPT, config) == cut_at_end(single)
    assert generator.generate_batch_ids(PROMPTS, config) == [cut_at_end(row) for row in rows]
    for response in cut(generator.rollout(*padded(), config)):
        assert not ends & set(response[:-1])


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


# --- batches --------------------------------------------------------------------------------------------------------

PROMPTS = ([3, 14, 15, 9, 2], [7], [20, 1, 4], [11, 0, 0, 5, 25, 8, 2])
LONGEST = max(len(prompt) for prompt in PROMPTS)
ROOM = CONFIG.max_seq_len - LONGEST


def padded(prompts: Sequence[Sequence[int]] = PROMPTS, filler: int = 13, extra: int = 0) -> tuple[Tensor, Tensor]:
    """Return prompts padded on the left, to `extra` more than the longest, and the mask."""
    length = max(len(prompt) for prompt in prompts) + extra
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return torch.tensor([[filler] * (length - len(prompt)) + list(prompt) for prompt in prompts]), mask


def cut(rollout: Rollout) -> list[list[int]]:
    """Return the responses as lists, after a check that what the mask leaves out is on the right."""
    assert (rollout.mask[:, 1:] <= rollout.mask[:, :-1]).all()
    return [row[kept].tolist() for row, kept in zip(rollout.responses, rollout.mask, strict=True)]


@pytest.mark.parametrize("seed", range(6))
def test_a_greedy_batch_equals_its_rows_one_by_one(seed: int) -> None:
    free = make_generator(seed=seed)
    config = GenerationConfig(max_new_tokens=ROOM)
    singles = [free.generate_ids(torch.tensor([prompt]), config) for prompt in PROMPTS]
    assert free.generate_batch_ids(PROMPTS, config) == singles
    assert len({tuple(row) for row in singles}) == len(PROMPTS)
    end = singles[0][2]
    stopped = make_generator(eos_token_id=end, seed=seed)
    singles = [row[: row.index(end)] if end in row else row for row in singles]
    assert stopped.generate_batch_ids(PROMPTS, config) == singles


def free_and_stopped(config: GenerationConfig) -> tuple[Rollout, Rollout, TextGenerator]:
    """Return a rollout without end of text, and one in which the second row's third token is the end of text."""
    free = make_generator().rollout(*padded(), config)
    generator = make_generator(eos_token_id=int(free.responses[1, 2]))
    return free, generator.rollout(*padded(), config), generator


@pytest.mark.parametrize("strategy", ["greedy", "sample", "top_k", "top_p"])
def test_what_stands_in_the_padding_does_not_matter(strategy: str) -> None:
    generator, config = make_generator(), GenerationConfig(strategy, max_new_tokens=4, temperature=3.0)
    first, other, wider = (generator.rollout(*padded(filler=f, extra=e), config) for f, e in ((0, 0), (25, 0), (7, 3)))
    assert torch.equal(first.responses, other.responses)
    assert torch.equal(first.responses, wider.responses)
    torch.testing.assert_close(first.logprobs, wider.logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("strategy", "temperature"), [("sample", 1.0), ("sample", 2.5), ("top_p", 3.0), ("greedy", 1.0)]
)
def test_logprobs_are_the_models_at_temperature_one(strategy: str, temperature: float) -> None:
    _, rollout, generator = free_and_stopped(GenerationConfig(strategy, temperature=temperature, seed=3))
    assert not rollout.mask.all()
    assert rollout.logprobs.dtype == torch.float32
    for prompt, response, logprobs in zip(PROMPTS, cut(rollout), rollout.logprobs, strict=True):
        with torch.no_grad():
            logits = generator.model(torch.tensor([[*prompt, *response]]))[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(dim=-1).gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(logprobs[: len(response)], expected, rtol=1e-4, atol=1e-5)
        assert (logprobs[len(response) :] == 0).all()


def test_a_response_ends_with_its_end_of_text_token() -> None:
    _, rollout, generator = free_and_stopped(GenerationConfig("sample", temperature=2.0, seed=5))
    end = generator.tokenizer.eos_token_id
    rows = cut(rollout)
    lengths = [len(row) for row in rows]
    assert rollout.responses.shape == rollout.mask.shape == rollout.logprobs.shape == (len(PROMPTS), max(lengths))
    assert min(lengths) < max(lengths)
    for row in rows:
        assert end not in row[:-1]
        assert row[-1] == end or len(row) == ROOM
    assert len(rows[1]) <= 3
    assert (rollout.responses[~rollout.mask] == end).all()


def test_a_batch_stops_when_all_rows_have_ended() -> None:
    free = make_generator()
    prompts = [PROMPTS[0]] * 3
    first = free.generate_batch_ids(prompts, GenerationConfig(max_new_tokens=3))[0]
    rollout = make_generator(eos_token_id=first[0]).rollout(*padded(prompts), GenerationConfig())
    assert cut(rollout) == [[first[0]]] * 3
    assert make_generator(eos_token_id=first[0]).generate_batch_ids(prompts) == [[], [], []]


def test_a_batch_stops_when_the_context_is_full() -> None:
    generator = make_generator()
    prompts, mask = padded()
    rollout = generator.rollout(prompts, mask, GenerationConfig(max_new_tokens=100))
    assert rollout.mask.all()
    together = torch.cat((prompts, rollout.responses), dim=1)
    assert together.size(1) == CONFIG.max_seq_len
    assert generator.model(together).shape[1] == CONFIG.max_seq_len


def test_draws_differ_between_equal_rows_and_a_seed_fixes_them() -> None:
    generator = make_generator()
    batch = padded([PROMPTS[0]] * 8)
    configs = [GenerationConfig("sample", max_new_tokens=8, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    before = torch.get_rng_state()
    first, again, other = (generator.rollout(*batch, config).responses for config in configs)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(row) for row in first.tolist()}) == 8


@pytest.mark.parametrize("config", [GenerationConfig(max_new_tokens=6), GenerationConfig("sample", 6, 2.0, seed=3)])
def test_several_responses_to_a_prompt_are_those_to_several_equal_prompts(config: GenerationConfig) -> None:
    generator = make_generator()
    prompts, mask = padded()
    repeated = generator.rollout(prompts.repeat_interleave(3, dim=0), mask.repeat_interleave(3, dim=0), config)
    several = generator.rollout(prompts, mask, config, num_responses=3)
    assert torch.equal(several.responses, repeated.responses)
    assert torch.equal(several.mask, repeated.mask)
    torch.testing.assert_close(several.logprobs, repeated.logprobs, rtol=1e-4, atol=1e-5)


def test_a_row_that_ends_does_not_change_the_others() -> None:
    free, stopped, _ = free_and_stopped(GenerationConfig("sample", temperature=2.0, seed=5))
    width = stopped.responses.size(1)
    assert not stopped.mask.all()
    assert torch.equal(stopped.responses[stopped.mask], free.responses[:, :width][stopped.mask])


def test_a_rollout_can_be_trained_on() -> None:
    """Tensors of inference mode would be refused by autograd."""
    generator = make_generator()
    prompts, mask = padded()
    rollout = generator.rollout(prompts, mask, GenerationConfig("sample", max_new_tokens=4))
    together = torch.cat((prompts, rollout.responses), dim=1)[:, :-1]
    visible = torch.cat((mask.bool(), rollout.mask), dim=1)[:, :-1]
    logits = generator.model.train()(together, visible)[:, prompts.size(1) - 1 :]
    found = logits.log_softmax(dim=-1).gather(2, rollout.responses.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(found.detach(), rollout.logprobs, rtol=1e-4, atol=1e-5)
    ((found - rollout.logprobs).exp() * rollout.logprobs).sum().backward()
    assert all(weight.grad is not None for weight in generator.model.parameters())


def test_a_batch_in_half_precision() -> None:
    generator = TextGenerator(make_model().to(torch.bfloat16), LetterTokenizer())
    rollout = generator.rollout(*padded(), GenerationConfig("sample", max_new_tokens=5))
    assert rollout.responses.shape == (len(PROMPTS), 5)
    assert rollout.logprobs.dtype == torch.float32


def test_no_prompts_no_responses() -> None:
    assert make_generator().generate_batch_ids([]) == []


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1, 2], []], "must have a token"),
        ([[], []], "neither of them 0"),
        ([list(range(CONFIG.max_seq_len)), [1]], "Prompts of 16 tokens leave no room .* model.max_seq_len=16"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(prompts: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_generator().generate_batch_ids(prompts)


@pytest.mark.parametrize(
    ("mask", "message"),
    [([[1, 1, 0]], "padded on the left only"), ([[1, 0, 1]], "padded on the left only"), ([[1, 1]], r"must both be")],
)
def test_masks_that_do_not_fit_are_refused(mask: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_generator().rollout(torch.tensor([[1, 2, 3]]), torch.tensor(mask))
