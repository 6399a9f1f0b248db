"""A document, and the draw that picks and orders the documents of a corpus."""

import hashlib
import heapq
import logging
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import NamedTuple

log = logging.getLogger("kd")


class RawDocument(NamedTuple):
    """A document as a source finds it."""

    id: str
    """Unique in its corpus, and free of absolute paths."""
    group: str
    """What must stay on one side of a split."""
    text: str


@dataclass(frozen=True, slots=True)
class Document:
    """A chosen document without its text."""

    id: str
    group: str
    num_bytes: int
    """Of its text in UTF-8."""
    digest: bytes
    """SHA-256 of its text in UTF-8."""


@dataclass(frozen=True)
class Documents:
    """The chosen documents of a source in the order of the corpus, and how to read their texts."""

    description: str
    """Names the source, for messages."""
    documents: Sequence[Document]
    read: Callable[[Sequence[int]], Iterator[str]]
    """Yields the texts at these positions of `documents`."""


def name_rank(purpose: str, name: str) -> int:
    """Return a pseudo-random rank that depends on nothing but the name and what the rank is for."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{name}".encode()).digest()[:16], "big")


def describe_document(document_id: str, group: str, text: str) -> Document:
    """Return a text's size and digest as a Document."""
    encoded = text.encode()
    return Document(document_id, group, len(encoded), hashlib.sha256(encoded).digest())


def draw_documents(description: str, stream: Iterable[RawDocument], sample_size: int | None) -> Documents:
    """Order a stream of documents by the rank of their ids and keep the first `sample_size` bytes of whole documents.

    Blank documents are dropped, and the log says how many are taken of how many. No more than about `sample_size`
    bytes of text are held at a time, however long the stream.
    """
    kept: list[tuple[int, str, Document, str]] = []
    total = found = blank = 0
    for raw in stream:
        found += 1
        if not raw.text.strip():
            blank += 1
            continue
        document = describe_document(raw.id, raw.group, raw.text)
        # Negated, because heapq pops the smallest and the document of the largest rank is to go first.
        heapq.heappush(kept, (-name_rank("order", raw.id), raw.id, document, raw.text))
        total += document.num_bytes
        while sample_size is not None and total - kept[0][2].num_bytes >= sample_size:
            total -= heapq.heappop(kept)[2].num_bytes
    log_taken(description, len(kept), found, blank, sample_size)
    kept.sort(reverse=True)
    texts = [text for _, _, _, text in kept]

    def read(positions: Sequence[int]) -> Iterator[str]:
        return (texts[position] for position in positions)

    return Documents(description, [document for _, _, document, _ in kept], read)


def log_taken(description: str, taken: int, found: int, blank: int, sample_size: int | None) -> None:
    """Say how many documents of a source are used, if not all, and which key changes that."""
    if blank:
        log.info("%s: %s of %s documents are blank and left out", description, f"{blank:,}", f"{found:,}")
    if taken + blank < found:
        log.info(
            "%s: %s of %s documents are used, drawn at random to about data.sample_size=%s bytes of text "
            "(data.sample_size=null takes all)",
            description,
            f"{taken:,}",
            f"{found:,}",
            sample_size,
        )


def join_documents(sources: Sequence[Documents]) -> Documents:
    """Return the documents of several sources as one, in that order; their ids must differ."""
    starts = [0, *accumulate(len(source.documents) for source in sources)][:-1]

    def read(positions: Sequence[int]) -> Iterator[str]:
        for index, run in groupby(positions, key=lambda position: bisect_right(starts, position) - 1):
            yield from sources[index].read([position - starts[index] for position in run])

    documents = [document for source in sources for document in source.documents]
    return Documents(", ".join(source.description for source in sources), documents, read)
