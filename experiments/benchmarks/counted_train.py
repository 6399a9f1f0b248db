"""`python -m kd.train`, with a note of each row of tokens that a loaded teacher's body computes.

    KD_SEEN=FILE python experiments/benchmarks/counted_train.py key=value ...

A line of FILE is the digest of a row and its length. Training a teacher is not noted, nor is a student.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import PreTrainedModel

from kd.model import StudentModel
from kd.teacher import LiveTeacher
from kd.teacher_cache import token_digests
from kd.train import main

SEEN_FILE = "KD_SEEN"


def note_rows(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Append what goes into the embedding; a forward pre-hook."""
    input_ids = inputs[0]
    digests = token_digests(input_ids.cpu())
    # One write, so that a kill leaves no half line.
    text = "".join(f"{digest} {input_ids.size(1)}\n" for digest in digests.tolist())
    with open(os.environ[SEEN_FILE], "a", encoding="ascii") as file:
        file.write(text)


def embedding_of(model: nn.Module) -> nn.Module:
    """Return the module that every pass through a body begins with."""
    if isinstance(model, StudentModel):
        return model.embedding
    assert isinstance(model, PreTrainedModel)
    embedding: nn.Module = model.get_input_embeddings()
    return embedding


def watch_teachers() -> None:
    """Hook every teacher that is loaded from now on."""
    make = LiveTeacher.__init__

    def make_watched(self: LiveTeacher, model: nn.Module, device: torch.device) -> None:
        embedding_of(model).register_forward_pre_hook(note_rows)
        make(self, model, device)

    LiveTeacher.__init__ = make_watched  # type: ignore[method-assign]


if __name__ == "__main__":
    watch_teachers()
    main()
