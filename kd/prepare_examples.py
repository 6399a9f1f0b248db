"""From examples to loaders of encoded ones, in the form that the trainer needs."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from kd.config import Config, ExampleConfig, GRPOConfig, PreferencesDataConfig, SFTConfig
from kd.data import (
    EncodedExamples,
    Example,
    ExampleSet,
    PositionedLoader,
    encode_answers,
    encode_preferences,
    encode_prompts,
    example_eval_loader,
    example_train_loader,
)
from kd.data.embedded.preferences import TWINS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from kd.data import PreferenceExample, PromptExample
    from kd.data.examples import SftExample

log = logging.getLogger("kd")

ExampleLoader = PositionedLoader[EncodedExamples]


def open_example_loaders(
    config: Config, examples: ExampleSet[Example], tokenizer: "PreTrainedTokenizerFast"
) -> tuple[ExampleLoader, ExampleLoader, ExampleLoader | None]:
    """Return the loaders of the training, validation and, if there is one, test part.

    Raises:
        DataError: if nothing is left of a part, or less than a batch to train on.
    """
    data, size = config.data, config.train.batch_size
    assert isinstance(data, ExampleConfig)

    def encoded(part: str, limit: int | None) -> EncodedExamples:
        found = _encode(config, examples.part(part)[:limit], tokenizer, examples.first_id(part))
        log.info("%s: %s", part.capitalize(), found.outcome.describe())
        for warning in found.outcome.warnings():
            log.warning("%s: %s", part.capitalize(), warning)
        return found

    training = encoded("train", data.max_train_examples)
    held_out = [encoded(part, data.max_eval_examples) for part in list(examples.parts)[1:]]
    validation, *test = (example_eval_loader(part, size, data.num_workers) for part in held_out)
    unit = TWINS if isinstance(data, PreferencesDataConfig) else 1
    # Prompts of GRPO are short, and padding is cheap beside sampling.
    by_length = not isinstance(config.train, GRPOConfig)
    train = example_train_loader(training, size, config.seed, data.num_workers, unit=unit, by_length=by_length)
    return train, validation, test[0] if test else None


def _encode(
    config: Config, examples: Sequence[Example], tokenizer: "PreTrainedTokenizerFast", first_id: int
) -> EncodedExamples:
    limit = config.model.max_seq_len
    if isinstance(config.train, SFTConfig):
        return encode_answers(cast("Sequence[SftExample]", examples), tokenizer, limit, first_id=first_id)
    if isinstance(config.train, GRPOConfig):
        room = limit - config.train.max_new_tokens
        return encode_prompts(cast("Sequence[PromptExample]", examples), tokenizer, room, first_id=first_id)
    return encode_preferences(cast("Sequence[PreferenceExample]", examples), tokenizer, limit, first_id=first_id)
