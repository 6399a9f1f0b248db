"""Which tokenizer a run uses, found without making or loading more than its check needs. No torch here."""

from pathlib import Path
from typing import TYPE_CHECKING

from kd.config import Config, EmbeddedTeacherConfig
from kd.data import (
    Corpus,
    ExampleSet,
    TokenizerSource,
    bpe_fingerprint,
    directory_tokenizer_fingerprint,
    lasting_location,
    load_tokenizer,
    tokenizer_object_fingerprint,
    vocabulary_difference,
)
from kd.errors import ConfigError, DataError
from kd.start import Start
from kd.teacher_files import PretrainedTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from kd.data import Example


def find_tokenizer(
    config: Config, data: "Corpus | ExampleSet[Example]", teacher: PretrainedTeacher | None, start: Start | None
) -> TokenizerSource:
    """Return where the tokenizer of `data.tokenizer` comes from.

    Args:
        config: The whole configuration.
        data: What is learned from; a BPE is trained on a corpus.
        teacher: A pretrained teacher, whose vocabulary it must be.
        start: What the student is initialised from, whose vocabulary it must be.

    Raises:
        ConfigError: if it is another than the teacher's, or than that of the run of `init_from`.
        DataError: if it cannot be loaded.
    """
    source = _find(config, data, teacher, start)
    if start is not None and (difference := _difference(start.tokenizer, source)) is not None:
        raise ConfigError(
            f"init_from={config.init_from} was trained with another tokenizer, so its embeddings mean other tokens: "
            f"{difference}use the same data.tokenizer, or data.tokenizer=init_from."
        )
    return source


def _difference(theirs: TokenizerSource, ours: TokenizerSource) -> str | None:
    """What tells two tokenizers apart, as far as is known; None if nothing. One can have several fingerprints: of a
    directory's files, of a Hub's commit, or of what was loaded.
    """
    if theirs.fingerprint == ours.fingerprint:
        return None
    if theirs.location is None or ours.location is None:  # a BPE that is still to be trained, of other text or size
        return ""
    try:
        difference = vocabulary_difference(theirs.load(), ours.load())
    except DataError as error:
        return f"{error} So "
    return None if difference is None else f"{difference} So "


def _find(
    config: Config, data: "Corpus | ExampleSet[Example]", teacher: PretrainedTeacher | None, start: Start | None
) -> TokenizerSource:
    name = config.data.tokenizer
    if name == "bpe" or (name == "teacher" and isinstance(config.teacher, EmbeddedTeacherConfig)):
        assert isinstance(data, Corpus)
        _check_bpe_teacher(teacher)
        return TokenizerSource(bpe_fingerprint(data, config.model.vocab_size))
    if name == "teacher":
        assert teacher is not None
        return _teacher_tokenizer(teacher)
    if name == "init_from":
        assert start is not None
        source = start.tokenizer
    else:
        source = TokenizerSource(tokenizer_object_fingerprint(load_tokenizer(name)), lasting_location(name))
    if teacher is not None:
        _check_same_vocabulary(source.load(), teacher, name)
    return source


def _teacher_tokenizer(teacher: PretrainedTeacher) -> TokenizerSource:
    fingerprint = teacher.commit
    if fingerprint is None:
        fingerprint = directory_tokenizer_fingerprint(Path(teacher.model_id), teacher.gguf_file)
    return TokenizerSource(fingerprint, lasting_location(teacher.model_id), teacher.revision, teacher.gguf_file)


def _check_bpe_teacher(teacher: PretrainedTeacher | None) -> None:
    if teacher is not None:
        raise ConfigError(
            f"data.tokenizer=bpe with the teacher {teacher.model_id}: its logits are over its own vocabulary. "
            "Set data.tokenizer=teacher."
        )


def _check_same_vocabulary(tokenizer: "PreTrainedTokenizerFast", teacher: PretrainedTeacher, name: str) -> None:
    difference = vocabulary_difference(tokenizer, _teacher_tokenizer(teacher).load())
    if difference is not None:
        raise ConfigError(
            f"data.tokenizer={name} is not the vocabulary that the teacher's logits are over: {difference} "
            "Set data.tokenizer=teacher."
        )
