"""A corpus: documents from one source, split into parts so that no group of documents is in two of them."""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kd.config import CorpusConfig, HubDataConfig, StdlibDataConfig, TextDataConfig
from kd.data.sources.base import Documents, join_documents, name_rank
from kd.data.sources.stdlib import read_stdlib
from kd.data.sources.text import read_text_files
from kd.errors import ConfigError, DataError

log = logging.getLogger("kd")

TRAIN, VALIDATION, TEST = "train", "validation", "test"
_MUCH_REPEATED = 0.01
"""Of a held-out part's bytes. Below that, it is the line or two that any corpus repeats."""


@dataclass(frozen=True)
class Corpus:
    """Documents in their parts, in a fixed, shuffled order; made by `read_corpus`."""

    source: Documents
    """The chosen documents of all parts."""
    parts: Mapping[str, Sequence[int]]
    """Positions in `source.documents`, by part."""
    fingerprint: str
    """SHA-256 (hex) of the texts, in order, and of the part that each is in; no path or machine enters."""

    @property
    def description(self) -> str:
        """What the corpus is, for messages."""
        return self.source.description

    @property
    def part_names(self) -> tuple[str, ...]:
        """`train`, `validation` and, with a test ratio above 0 or files of its own, `test`."""
        return tuple(self.parts)

    def num_documents(self, part: str) -> int:
        """Return the number of documents of a part."""
        return len(self.parts[part])

    def num_bytes(self, part: str) -> int:
        """Return the bytes of a part's texts in UTF-8."""
        return sum(self.source.documents[index].num_bytes for index in self.parts[part])

    def texts(self, part: str) -> Iterator[str]:
        """Yield the texts of a part; each call starts anew."""
        return self.source.read(self.parts[part])

    def document_ids(self, part: str) -> list[str]:
        """Return the ids of a part's documents, in the order of `texts`: file names or row numbers."""
        return [self.source.documents[index].id for index in self.parts[part]]


def read_corpus(config: CorpusConfig) -> Corpus:
    """Read, draw and split the corpus that a data configuration names.

    Documents are drawn in an order that depends on their ids alone until `sample_size` bytes are reached.
    The parts are filled by whole groups up to their share of the **bytes**: the groups of a source can differ
    in size a thousandfold, and a share of their number would say little about a share of the text. A held-out part with
    files of its own (`data.val_path`, `data.test_path`) is all of these, and its share does not count.

    Raises:
        DataError: if the source cannot be read, holds no text, or has fewer groups than there are parts.
        ConfigError: if the configuration names no source.
    """
    source, separate = _read_sources(config)
    for documents in (source, *separate.values()):
        if not documents.documents:
            raise DataError(f"{documents.description} holds no text: every document is empty. Give another source.")
    sizes: Counter[str] = Counter()
    for document in source.documents:
        sizes[document.group] += document.num_bytes
    ratios = {part: ratio for part, ratio in _held_out_ratios(config).items() if part not in separate}
    part_of = split_groups(sizes, ratios, source.description)
    parts: dict[str, Sequence[int]] = {
        part: [index for index, document in enumerate(source.documents) if part_of[document.group] == part]
        for part in (TRAIN, *ratios)
    }
    start = len(source.documents)
    for part, documents in separate.items():
        parts[part] = range(start, start + len(documents.documents))
        start += len(documents.documents)
    in_order = {part: parts[part] for part in (TRAIN, VALIDATION, TEST) if part in parts}
    whole = join_documents([source, *separate.values()]) if separate else source
    corpus = Corpus(whole, in_order, _fingerprint(whole, in_order))
    _warn_of_repeated(corpus)
    return corpus


def _warn_of_repeated(corpus: Corpus) -> None:
    """Warn if documents of a held-out part also stand in the training part, word for word."""
    documents = corpus.source.documents
    trained = {documents[index].digest for index in corpus.parts[TRAIN]}
    for part in corpus.part_names[1:]:
        repeated = [index for index in corpus.parts[part] if documents[index].digest in trained]
        if sum(documents[index].num_bytes for index in repeated) > _MUCH_REPEATED * corpus.num_bytes(part):
            log.warning(
                "%s: %d of %d %s documents also stand in the training part, word for word, so that this part measures "
                "what is remembered as well. Remove repeated documents",
                corpus.description,
                len(repeated),
                corpus.num_documents(part),
                part,
            )


def split_groups(sizes: Mapping[str, int], ratios: Mapping[str, float], description: str) -> dict[str, str]:
    """Assign each group to `train` or to a held-out part, by groups' names and sizes alone.

    In an order given by a hash of their names, groups go to the first held-out part that has room for the
    whole of them within its share of the bytes, else to `train`. A part that no group fits into takes the
    smallest one of the part with the most groups.

    Args:
        sizes: Bytes by group.
        ratios: Share of all bytes by held-out part, each in (0, 1), their sum below 1; of none, all is `train`.
        description: Of the corpus, for the error.

    Raises:
        DataError: if there are fewer groups than parts.
    """
    parts = (TRAIN, *ratios)
    if len(sizes) < len(parts):
        without_test = "; or do without a test part: data.test_ratio=0" if TEST in ratios else ""
        raise DataError(
            f"{description} has {len(sizes)} separate document(s), and {len(parts)} parts ({', '.join(parts)}) need "
            "at least one each. Give several files, a .jsonl or .parquet file with a document a row, or set "
            "data.document_separator to cut a text file into documents (at blank lines: "
            f"'data.document_separator=\"\\n\\n\"'); or raise data.sample_size{without_test}."
        )
    ranked = sorted(sizes, key=lambda group: name_rank("split", group))
    total = sum(sizes.values())
    room = {part: ratio * total for part, ratio in ratios.items()}
    members: dict[str, list[str]] = {part: [] for part in parts}
    for group in ranked:
        part = next((part for part in room if sizes[group] <= room[part]), TRAIN)
        members[part].append(group)
        if part in room:
            room[part] -= sizes[group]
    _give_each_one(members, sizes)
    return {group: part for part, groups in members.items() for group in groups}


def _give_each_one(members: dict[str, list[str]], sizes: Mapping[str, int]) -> None:
    """Move the smallest group of the part with the most groups to each part that has none."""
    for groups in members.values():
        if groups:
            continue
        donor = max(members.values(), key=len)
        smallest = min(donor, key=lambda group: sizes[group])
        donor.remove(smallest)
        groups.append(smallest)


def _read_sources(config: CorpusConfig) -> tuple[Documents, dict[str, Documents]]:
    """Return the documents to split, and those of held-out parts that have files of their own."""
    if isinstance(config, StdlibDataConfig):
        return read_stdlib(config), {}
    if isinstance(config, TextDataConfig):
        found = read_text_files(config)
        parts = {VALIDATION: "data.val_path", TEST: "data.test_path"}
        return found["data.path"], {part: found[key] for part, key in parts.items() if key in found}
    if isinstance(config, HubDataConfig):
        from kd.data.sources.hub import read_hub  # here, so that the others do not wait for numpy

        return read_hub(config), {}
    raise ConfigError(f"data is a {type(config).__name__}, which names no corpus: use stdlib, text or a Hub data set.")


def _held_out_ratios(config: CorpusConfig) -> dict[str, float]:
    ratios = {VALIDATION: config.val_ratio}
    if config.test_ratio > 0:
        ratios[TEST] = config.test_ratio
    return ratios


def _fingerprint(source: Documents, parts: Mapping[str, Sequence[int]]) -> str:
    digest = hashlib.sha256()
    for part, indexes in parts.items():
        digest.update(f"{part}:{len(indexes)}:".encode())
        for index in indexes:
            digest.update(source.documents[index].digest)
    return digest.hexdigest()
