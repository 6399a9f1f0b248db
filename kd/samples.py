"""samples.txt: what a trained student makes of the beginnings of held-out texts, or of held-out prompts."""

from pathlib import Path

import torch
from torch import Tensor

from kd.data import EncodedExamples, PackedBlocks
from kd.files import write_text
from kd.generation import GenerationConfig, TextGenerator

NUM_SAMPLES = 3
PROMPT_TOKENS = 16
"""Of a block."""
SAMPLE_TOKENS = 64


def write_samples(path: Path, generator: TextGenerator, held_out: PackedBlocks | EncodedExamples) -> None:
    """Write continuations of a few held-out texts, the likeliest one and one that is drawn."""
    sections = []
    for index in range(0, len(held_out), max(1, len(held_out) // NUM_SAMPLES))[:NUM_SAMPLES]:
        prompt = _prompt(held_out, index)
        text = generator.decode(prompt.tolist())
        for strategy in ("greedy", "top_p"):
            settings = GenerationConfig(strategy=strategy, max_new_tokens=SAMPLE_TOKENS)
            answer = generator.decode(generator.generate_ids(prompt.unsqueeze(0), settings))
            sections.append(f"=== {strategy}\n{text}>>>{answer}\n")
    write_text(path, "\n".join(sections))


def _prompt(held_out: PackedBlocks | EncodedExamples, index: int) -> Tensor:
    if isinstance(held_out, PackedBlocks):
        return held_out[index]["input_ids"][:PROMPT_TOKENS]
    return torch.from_numpy(held_out.prompt(index))
