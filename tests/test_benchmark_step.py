"""The benchmark of a step compares steps that do the same."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from kd.config import ModelConfig

BENCHMARKS = Path(__file__).parents[1] / "experiments" / "benchmarks"


def test_all_variants_take_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    step = importlib.import_module("step")
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32}
    teacher = LlamaConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True
    )
    student = ModelConfig(16, 1, 2, 1, 32, vocab_size=64, max_seq_len=12)
    job = replace(step.JOBS["smollm2"], teacher_config=teacher, student=student, alpha=0.5, temperature=2.0)
    setting = step.Setting(job, batch_size=2, device=torch.device("cpu"), dtype=torch.float32)
    setting.build_cache()
    losses = {}
    for variant in (step.PLAIN, step.LIVE, step.CACHED):
        repetition = step.prepare(setting, variant)
        losses[variant] = [repetition() for _ in range(3)]
    assert losses[step.LIVE] == pytest.approx(losses[step.PLAIN], rel=1e-4)
    assert losses[step.CACHED] == pytest.approx(losses[step.LIVE], rel=1e-6)
    assert len(set(losses[step.PLAIN])) == 3
