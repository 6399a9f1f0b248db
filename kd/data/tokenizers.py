"""Tokenizers: a byte-level BPE trained here, or any fast tokenizer of the Hugging Face format."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.cache import cached_directory
from kd.data.corpora import TRAIN, Corpus
from kd.data.hub_access import hub_is_reachable, one_line
from kd.errors import DataError, Interrupted
from kd.files import digest_of, file_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
_BPE_FORMAT = 1
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
_VERSIONED_FILES = "tokenizer.*.json"
"""Of those, older and newer versions of the library read different ones."""
_RULES = ("normalizer", "pre_tokenizer", "model", "added_tokens")
"""What of a tokenizer.json decides how text is cut. A post-processor only adds special tokens, which are never asked
for here, and a decoder only joins tokens."""


@dataclass(frozen=True)
class TokenizerSource:
    """Where a tokenizer comes from. Without a location it is a BPE that is trained on the corpus."""

    fingerprint: str
    location: str | None = None
    """Directory or Hub id."""
    revision: str | None = None
    gguf_file: str | None = None
    content: str | None = None
    """Digest of a BPE that was trained here; its fingerprint is the recipe, which another library can follow to other
    tokens. None for others, whose fingerprint is their content."""

    @property
    def content_fingerprint(self) -> str:
        """What identifies the tokens themselves."""
        return self.fingerprint if self.content is None else self.content

    def load(self) -> "PreTrainedTokenizerFast":
        """Load the tokenizer; it must have a location.

        Raises:
            DataError: if it is not there, cannot be read, or is another BPE than was used.
        """
        assert self.location is not None
        path = Path(self.location)
        if self.content is not None and path.is_dir() and bpe_content(path) != self.content:
            raise DataError(
                f"The BPE in {path} is another than the one that was used with these data: it was trained again since, "
                "by another version of the library. Give back the folder as it was, or begin afresh."
            )
        return load_tokenizer(self.location, self.revision, self.gguf_file)


def train_bpe(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909, over bytes); the same texts give the same one.

    Id 0 is the end-of-text token, ids 1 to 256 are the bytes, so that any text can be encoded.

    Raises:
        DataError: if the texts are too short to give that many tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    reached = backend.get_vocab_size()
    if reached != vocab_size:
        raise DataError(
            f"model.vocab_size={vocab_size}, but the training text gives a BPE of {reached} tokens only. Give more "
            f"text, or set model.vocab_size={reached}."
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)  # type: ignore[no-untyped-call]


def bpe_fingerprint(corpus: Corpus, vocab_size: int) -> str:
    """Return what identifies the BPE of a corpus, without training it (SHA-256, hex)."""
    return digest_of({"bpe_format": _BPE_FORMAT, "corpus": corpus.fingerprint, "vocab_size": vocab_size})


def bpe_tokenizer_directory(corpus: Corpus, vocab_size: int) -> Path:
    """Return the cached directory of a BPE trained on the training part alone, training it at the first call.

    Raises:
        DataError: if the training part is too short for that vocabulary.
    """

    def build(work: Path) -> None:
        train_bpe(corpus.texts(TRAIN), vocab_size).save_pretrained(work)

    description = f"the BPE of {vocab_size} tokens of {corpus.description}"
    return cached_directory("tokenizers", bpe_fingerprint(corpus, vocab_size), build, description)


def bpe_content(directory: Path) -> str:
    """Return the SHA-256 (hex) of a trained BPE, which its recipe alone does not determine.

    Raises:
        DataError: if the directory holds none.
    """
    try:
        return file_digest(directory / _TOKENIZER_FILES[0])
    except FileNotFoundError as error:
        raise DataError(f"{directory} holds no {_TOKENIZER_FILES[0]}. Remove it to have it made again.") from error


def load_tokenizer(
    path_or_id: str, revision: str | None = None, gguf_file: str | None = None
) -> "PreTrainedTokenizerFast":
    """Load a fast tokenizer from a local directory or the Hub; code from its repository is never run.

    Args:
        path_or_id: Local directory or Hub id.
        revision: Branch, tag or commit of a Hub id; None: the default branch.
        gguf_file: Name of a GGUF file in that directory which holds the tokenizer; None: Hugging Face's format.

    Raises:
        DataError: if it is not there, cannot be read, or is not a fast tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    offline = not Path(path_or_id).is_dir() and not hub_is_reachable()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path_or_id,
            revision=revision or "main",
            gguf_file=gguf_file,
            use_fast=True,
            trust_remote_code=False,
            local_files_only=offline,
        )
    except Interrupted:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception on a broken file
        way_out = _way_to(path_or_id, revision, offline=offline)
        raise DataError(f"The tokenizer of {path_or_id} cannot be loaded: {one_line(error)} {way_out}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(
            f"The tokenizer of {path_or_id} is a {type(tokenizer).__name__}, which has no fast form (tokenizer.json). "
            "Give one that has."
        )
    return tokenizer


def _way_to(path_or_id: str, revision: str | None, *, offline: bool) -> str:
    """What to do about a tokenizer that cannot be loaded."""
    give = "Give a directory or Hub id that holds one."
    if Path(path_or_id).is_dir():
        return give
    place = f"a relative path counts from the working directory, {Path.cwd()}"
    if not offline or not _HUB_ID.fullmatch(path_or_id):
        return f"{path_or_id} is no directory ({place}). {give}"
    command = f"hf download {path_or_id}" + (f" --revision {revision}" if revision else "")
    return (
        f"{path_or_id} is no local directory ({place}) and not in the local cache, and the Hugging Face Hub is out of "
        f"reach (no network, or HF_HUB_OFFLINE is set). If it is a Hub id, fetch it where there is a network, with the "
        f"same HF_HOME: {command}"
    )


def lasting_location(path_or_id: str) -> str:
    """Return a directory's absolute path, which means the same from every working directory; a Hub id as it is."""
    return str(Path(path_or_id).absolute()) if Path(path_or_id).is_dir() else path_or_id


def end_of_text_id(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Return the id of the token that goes between documents.

    Raises:
        DataError: if the tokenizer names none.
    """
    token_id = tokenizer.eos_token_id
    if not isinstance(token_id, int):
        raise DataError(
            f"The tokenizer of {tokenizer.name_or_path or 'this vocabulary'} has no end-of-text token, which goes "
            "between documents. Set eos_token in its tokenizer_config.json, or use data.tokenizer=bpe."
        )
    return token_id


def num_token_ids(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Return the largest id plus 1; ids may have gaps, so this can exceed the number of tokens."""
    return max(tokenizer.get_vocab().values()) + 1


def directory_tokenizer_fingerprint(path: Path, gguf_file: str | None = None) -> str:
    """Return the SHA-256 (hex) of a local tokenizer's files by name and content, without loading it.

    Raises:
        DataError: if there are none.
    """
    names = (gguf_file,) if gguf_file else (*_TOKENIZER_FILES, *(file.name for file in path.glob(_VERSIONED_FILES)))
    digests = {name: file_digest(path / name) for name in names if (path / name).is_file()}
    if not digests:
        raise DataError(f"{path} holds no tokenizer: none of {', '.join(names)} is there. Give another directory.")
    return digest_of(digests)


def tokenizer_object_fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return the SHA-256 (hex) of a loaded tokenizer's vocabulary, rules and end-of-text token."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left behind by the last call, not a part of the tokenizer.
    rules["truncation"] = rules["padding"] = None
    text = json.dumps([rules, end_of_text_id(tokenizer)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def chat_template_fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return the SHA-256 (hex) of what renders a loaded tokenizer's chats: its templates, and the tokens they name."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest_of({"template": tokenizer.chat_template, "special_tokens": special})


def vocabulary_difference(a: "PreTrainedTokenizerFast", b: "PreTrainedTokenizerFast") -> str | None:
    """Return None if two tokenizers make the same ids of every text, else one sentence on the first difference."""
    tokens_a = {token_id: token for token, token_id in a.get_vocab().items()}
    tokens_b = {token_id: token for token, token_id in b.get_vocab().items()}
    if len(tokens_a) != len(tokens_b):
        return f"One vocabulary has {len(tokens_a)} tokens, the other {len(tokens_b)}."
    for token_id in sorted(tokens_a.keys() | tokens_b.keys()):
        token_a, token_b = tokens_a.get(token_id), tokens_b.get(token_id)
        if token_a != token_b:
            return f"Both vocabularies have {len(tokens_a)} tokens, but id {token_id} is {token_a!r} and {token_b!r}."
    rules_a, rules_b = _rules(a), _rules(b)
    different = next((name for name in rules_a if rules_a[name] != rules_b[name]), None)
    if different is None:
        return None
    return f"Both vocabularies are the same, but text is cut in another way: they differ in their {different}."


def _rules(tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
    """What decides how text is cut, by name, with the model in its parts; what says nothing is left out."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {name: _without_idle(content[name]) for name in _RULES}
    model = rules.pop("model")
    vocab = model.pop("vocab")
    scores = vocab if isinstance(vocab, list) else None  # of a unigram model; else it is the ids alone
    return rules | {"merges": model.pop("merges", None), "scores": scores, "model": model}


def _without_idle(value: Any) -> Any:
    """Leave out options that are off, which can be written in several ways, and one that moves offsets alone."""
    if isinstance(value, list):
        return [_without_idle(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: _without_idle(item) for key, item in value.items() if item and key != "trim_offsets"}
