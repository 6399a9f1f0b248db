"""Ragged sequences, pairs and rollouts for the trainers on answers, with small trainers on them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd.config import DPOConfig, GRPOConfig, ORPOConfig, SFTConfig
from kd.generation import TextGenerator
from kd.model import StudentModel
from kd.trainers import DPOTrainer, GRPOTrainer, ORPOTrainer, SFTTrainer
from kd.trainers.state import Batch

from .helpers import VOCAB, make_student

Rows = Sequence[Sequence[int]]
SETTINGS: dict[str, Any] = {"warmup_steps": 0, "learning_rate": 1e-2}


class LetterTokenizer:
    """Lower-case letters as tokens 0 to 12."""

    def __init__(self, eos_token_id: int | None = None) -> None:
        self.eos_token_id = eos_token_id

    def __call__(self, text: str) -> Mapping[str, list[int]]:
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(token + ord("a")) for token in token_ids)


def padded(rows: Rows, side: str = "right", fill: int = 0) -> tuple[Tensor, Tensor]:
    """Return rows as (B, L) token ids and the mask of what is not padding."""
    width = max(len(row) for row in rows)
    tokens, mask = torch.full((len(rows), width), fill), torch.zeros(len(rows), width, dtype=torch.int64)
    for row, content in enumerate(rows):
        start = 0 if side == "right" else width - len(content)
        tokens[row, start : start + len(content)] = torch.tensor(content, dtype=torch.int64)
        mask[row, start : start + len(content)] = 1
    return tokens, mask


def draw(lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Return rows of tokens of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]


def answers_batch(prompts: Rows, answers: Rows, side: str = "right", fill: int = 0) -> Batch:
    """Return a batch for SFT."""
    tokens, mask = padded([[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)], side, fill)
    marks, _ = padded([[0] * len(p) + [1] * len(a) for p, a in zip(prompts, answers, strict=True)], side)
    labels = tokens[:, 1:].masked_fill(marks[:, 1:] == 0, -100)
    return {"input_ids": tokens[:, :-1], "labels": labels, "attention_mask": mask[:, :-1]}


def pairs_batch(prompts: Rows, chosen: Rows, rejected: Rows, sides: tuple[str, str] = ("left", "right")) -> Batch:
    """Return a batch of pairs, prompts padded on one side and answers on the other."""
    parts = {"prompt": (prompts, sides[0]), "chosen": (chosen, sides[1]), "rejected": (rejected, sides[1])}
    batch: Batch = {}
    for name, (rows, side) in parts.items():
        batch[f"{name}_input_ids"], batch[f"{name}_attention_mask"] = padded(rows, side)
    return batch


def make_pairs(count: int, seed: int = 0) -> Batch:
    """Return ragged pairs."""
    return pairs_batch(
        draw([1 + row % 3 for row in range(count)], 3 * seed),
        draw([1 + (row + seed) % 5 for row in range(count)], 3 * seed + 1),
        draw([1 + (3 * row + seed) % 4 for row in range(count)], 3 * seed + 2),
    )


def make_answers(count: int, seed: int = 0) -> Batch:
    """Return ragged prompts with answers; every fifth answer is empty."""
    prompts = draw([1 + row % 3 for row in range(count)], 3 * seed)
    return answers_batch(prompts, draw([(3 * row + seed) % 5 for row in range(count)], 3 * seed + 1))


def make_rollouts(groups: int, seed: int = 0, size: int = 2) -> Batch:
    """Return ragged groups of responses with their rewards and old log-probabilities; rewards of some are equal."""
    prompts = draw([1 + group % 3 for group in range(groups)], 3 * seed)
    answers = draw([1 + (3 * row + seed) % 5 for row in range(groups * size)], 3 * seed + 1)
    generator = torch.Generator().manual_seed(seed)
    prompt_ids, prompt_mask = padded([prompt for prompt in prompts for _ in range(size)], "left")
    responses, mask = padded(answers)
    rewards = torch.rand(groups, size, generator=generator)
    rewards[1::4] = 1.0
    old = -2.5 + torch.rand(responses.shape, generator=generator)
    return {
        "prompts": prompt_ids,
        "prompt_attention_mask": prompt_mask,
        "responses": responses,
        "response_attention_mask": mask,
        "rewards": rewards.view(-1),
        "old_logprobs": old,
    }


def make_prompts(rows: Rows) -> Batch:
    """Return a batch of prompts, padded on the left."""
    prompts, mask = padded(rows, "left")
    return {"prompts": prompts, "prompt_attention_mask": mask}


def cut(batch: Batch, rows: int) -> list[Batch]:
    """Cut a batch into batches of `rows` rows."""
    total = len(next(iter(batch.values())))
    return [{name: value[i : i + rows] for name, value in batch.items()} for i in range(0, total, rows)]


def sft(model: nn.Module, train: Any = None, val: Any = None, **settings: Any) -> SFTTrainer:
    run_dir = settings.pop("run_dir", None)
    return SFTTrainer(model, None, train, val, config=SFTConfig(**{**SETTINGS, **settings}), run_dir=run_dir)


def dpo(model: nn.Module, train: Any = None, val: Any = None, **settings: Any) -> DPOTrainer:
    run_dir, reference = settings.pop("run_dir", None), settings.pop("ref_model", None)
    config = DPOConfig(**{**SETTINGS, **settings})
    return DPOTrainer(model, None, train, val, ref_model=reference, config=config, run_dir=run_dir)


def orpo(model: nn.Module, train: Any = None, val: Any = None, **settings: Any) -> ORPOTrainer:
    run_dir = settings.pop("run_dir", None)
    return ORPOTrainer(model, None, train, val, config=ORPOConfig(**{**SETTINGS, **settings}), run_dir=run_dir)


def grpo(model: nn.Module, train: Any = None, val: Any = None, **settings: Any) -> GRPOTrainer:
    """Return a GRPOTrainer with groups of two; it can sample if the model is a student."""
    run_dir, reference = settings.pop("run_dir", None), settings.pop("ref_model", None)
    reward_fn, end = settings.pop("reward_fn", None), settings.pop("end", None)
    tokenizer: Any = LetterTokenizer(end)
    generator = TextGenerator(model, tokenizer) if isinstance(model, StudentModel) else None
    model.train()
    return GRPOTrainer(
        model,
        None,
        train,
        val,
        ref_model=reference,
        reward_fn=reward_fn,
        generator=generator,
        config=GRPOConfig(**{**SETTINGS, "group_size": 2, **settings}),
        run_dir=run_dir,
    )


PROMPTS = make_prompts(draw([1, 2, 3, 2], 5))


def share_of_a(responses: Sequence[str], _batch: Batch) -> list[float]:
    """Return the share of the letter a in each response."""
    return [response.count("a") / max(len(response), 1) for response in responses]


def online(model: StudentModel | None = None, train: Any = None, val: Any = None, **settings: Any) -> Any:
    """Return a trainer that samples four responses of at most four tokens to each prompt."""
    return grpo(
        make_student() if model is None else model,
        [PROMPTS] if train is None else train,
        val,
        **{"reward_fn": share_of_a, "max_new_tokens": 4, "group_size": 4, **settings},
    )
