"""A teacher's sizes as config.json states them, against what transformers makes of the same file."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoConfig,
    BloomConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    LlamaConfig,
    LlavaConfig,
    MptConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from kd.config import LocalTeacherConfig
from kd.errors import DataError
from kd.teacher_files import PretrainedTeacher, find_teacher


def find(folder: Path, config: dict[str, Any] | str) -> PretrainedTeacher:
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text)
    (folder / "model.safetensors").write_bytes(b"not read")
    return find_teacher(LocalTeacherConfig(path=str(folder)))


CONFIGS: list[PreTrainedConfig] = [
    Qwen2Config(vocab_size=1234, max_position_embeddings=77),
    LlamaConfig(),
    GPT2Config(vocab_size=99, n_positions=48),
    GPTBigCodeConfig(vocab_size=99, n_positions=48),
    GPTJConfig(vocab_size=99, n_positions=48),
    MptConfig(vocab_size=99, max_seq_len=48),
    BloomConfig(vocab_size=99),
    LlavaConfig(text_config=Qwen2Config(vocab_size=1234, max_position_embeddings=77)),
    LlavaConfig(text_config=LlamaConfig()),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("is_complete", [True, False])
def test_sizes_are_those_that_the_library_sees(tmp_path: Path, config: PreTrainedConfig, is_complete: bool) -> None:
    found = find(tmp_path, config.to_dict() if is_complete else config.to_diff_dict())
    text = AutoConfig.from_pretrained(tmp_path).get_text_config()
    assert found.vocab_size == text.vocab_size
    assert found.max_seq_len == getattr(text, "max_position_embeddings", getattr(text, "max_seq_len", None))


def test_a_complete_configuration_is_read_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import would fail
    assert find(tmp_path, CONFIGS[0].to_dict()).vocab_size == 1234
    with pytest.raises(DataError):
        find(tmp_path, {"model_type": "qwen2"})


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"text_config": 3}', '{"model_type": "none_such"}', "\x80"])
def test_a_broken_configuration_is_a_data_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"must hold config\.json"):
        find(tmp_path, text)
    assert not (tmp_path / "outputs").exists()
