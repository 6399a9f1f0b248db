"""Corpora, tokenizers, packed blocks, examples of prompts and answers, and their loaders.

Names are imported at their first use, so that reading a corpus does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kd.data.blocks import PackedBlocks, build_blocks, find_blocks
    from kd.data.chat import render_chat
    from kd.data.corpora import Corpus, read_corpus
    from kd.data.embedded.arithmetic import arithmetic_answers, arithmetic_prompts
    from kd.data.embedded.instructions import instruction_examples
    from kd.data.embedded.mixture import mix_answers
    from kd.data.embedded.preferences import preference_examples
    from kd.data.encoding import (
        EncodedAnswers,
        EncodedExamples,
        EncodedPreferences,
        EncodedPrompts,
        encode_answers,
        encode_preferences,
        encode_prompts,
    )
    from kd.data.example_files import read_answers, read_preferences, read_prompts
    from kd.data.example_loaders import example_eval_loader, example_train_loader
    from kd.data.example_sets import answer_set, preference_set, prompt_set
    from kd.data.examples import (
        AnswerExample,
        ChatExample,
        Example,
        ExampleSet,
        Message,
        PreferenceExample,
        PromptExample,
        split_examples,
    )
    from kd.data.loaders import BlockLoader, PositionedLoader, eval_loader, train_loader
    from kd.data.tokenizers import (
        TokenizerSource,
        bpe_content,
        bpe_fingerprint,
        bpe_tokenizer_directory,
        chat_template_fingerprint,
        directory_tokenizer_fingerprint,
        end_of_text_id,
        lasting_location,
        load_tokenizer,
        num_token_ids,
        tokenizer_object_fingerprint,
        train_bpe,
        vocabulary_difference,
    )
    from kd.data.wiki import WikiDataset

_MODULES = {
    "AnswerExample": "examples",
    "BlockLoader": "loaders",
    "ChatExample": "examples",
    "Corpus": "corpora",
    "EncodedAnswers": "encoding",
    "EncodedExamples": "encoding",
    "EncodedPreferences": "encoding",
    "EncodedPrompts": "encoding",
    "Example": "examples",
    "ExampleSet": "examples",
    "Message": "examples",
    "PackedBlocks": "blocks",
    "PositionedLoader": "loaders",
    "PreferenceExample": "examples",
    "PromptExample": "examples",
    "TokenizerSource": "tokenizers",
    "WikiDataset": "wiki",
    "answer_set": "example_sets",
    "arithmetic_answers": "embedded.arithmetic",
    "arithmetic_prompts": "embedded.arithmetic",
    "bpe_content": "tokenizers",
    "bpe_fingerprint": "tokenizers",
    "bpe_tokenizer_directory": "tokenizers",
    "chat_template_fingerprint": "tokenizers",
    "build_blocks": "blocks",
    "directory_tokenizer_fingerprint": "tokenizers",
    "encode_answers": "encoding",
    "encode_preferences": "encoding",
    "encode_prompts": "encoding",
    "end_of_text_id": "tokenizers",
    "eval_loader": "loaders",
    "example_eval_loader": "example_loaders",
    "example_train_loader": "example_loaders",
    "find_blocks": "blocks",
    "instruction_examples": "embedded.instructions",
    "lasting_location": "tokenizers",
    "load_tokenizer": "tokenizers",
    "mix_answers": "embedded.mixture",
    "num_token_ids": "tokenizers",
    "preference_examples": "embedded.preferences",
    "preference_set": "example_sets",
    "prompt_set": "example_sets",
    "read_answers": "example_files",
    "read_corpus": "corpora",
    "read_preferences": "example_files",
    "read_prompts": "example_files",
    "render_chat": "chat",
    "split_examples": "examples",
    "tokenizer_object_fingerprint": "tokenizers",
    "train_bpe": "tokenizers",
    "train_loader": "loaders",
    "vocabulary_difference": "tokenizers",
}

__all__ = [
    "AnswerExample",
    "BlockLoader",
    "ChatExample",
    "Corpus",
    "EncodedAnswers",
    "EncodedExamples",
    "EncodedPreferences",
    "EncodedPrompts",
    "Example",
    "ExampleSet",
    "Message",
    "PackedBlocks",
    "PositionedLoader",
    "PreferenceExample",
    "PromptExample",
    "TokenizerSource",
    "WikiDataset",
    "answer_set",
    "arithmetic_answers",
    "arithmetic_prompts",
    "bpe_content",
    "bpe_fingerprint",
    "bpe_tokenizer_directory",
    "chat_template_fingerprint",
    "build_blocks",
    "directory_tokenizer_fingerprint",
    "encode_answers",
    "encode_preferences",
    "encode_prompts",
    "end_of_text_id",
    "eval_loader",
    "example_eval_loader",
    "example_train_loader",
    "find_blocks",
    "instruction_examples",
    "lasting_location",
    "load_tokenizer",
    "mix_answers",
    "num_token_ids",
    "preference_examples",
    "preference_set",
    "prompt_set",
    "read_answers",
    "read_corpus",
    "read_preferences",
    "read_prompts",
    "render_chat",
    "split_examples",
    "tokenizer_object_fingerprint",
    "train_bpe",
    "train_loader",
    "vocabulary_difference",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
