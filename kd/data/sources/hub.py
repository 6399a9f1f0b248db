"""Data sets of the Hugging Face Hub, and local directories in the same format."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kd.config import HubDataConfig
from kd.data.hub_access import hub_is_reachable, one_line, without_network
from kd.data.sources.base import Document, Documents, describe_document, log_taken
from kd.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS = 256
_ORDER_SEED = 0


def read_hub(config: HubDataConfig) -> Documents:
    """Draw rows of a data set at random until `data.sample_size` bytes are reached; a document is a row.

    Rows are read where they lie (Arrow files, mapped into memory): the corpus holds their positions only.

    Raises:
        DataError: if the data set is not cached and the Hub is out of reach, or if it has no such
            configuration, revision, split or column.
    """
    rows = _text_rows(_load(config), config)
    # RandomState's stream is frozen for good; that of a Generator may change with numpy.
    order = np.random.RandomState(_ORDER_SEED).permutation(len(rows))
    positions, documents = _draw_rows(rows, order, config)

    def read(chosen: Sequence[int]) -> Iterator[str]:
        for start in range(0, len(chosen), _ROWS):
            yield from _texts(rows, [positions[index] for index in chosen[start : start + _ROWS]])

    return Documents(_describe(config), documents, read)


def _draw_rows(
    rows: "Dataset", order: "np.ndarray[tuple[int], np.dtype[np.int_]]", config: HubDataConfig
) -> tuple[list[int], list[Document]]:
    positions: list[int] = []
    documents: list[Document] = []
    total = blank = 0
    for row, text in _in_order(rows, order):
        if config.sample_size is not None and total >= config.sample_size:
            break
        if not text.strip():
            blank += 1
            continue
        positions.append(row)
        documents.append(describe_document(str(row), str(row), text))
        total += documents[-1].num_bytes
    log_taken(_describe(config), len(documents), len(order), blank, config.sample_size)
    return positions, documents


def _in_order(rows: "Dataset", order: "np.ndarray[tuple[int], np.dtype[np.int_]]") -> Iterator[tuple[int, str]]:
    """Yield rows' positions and texts."""
    for start in range(0, len(order), _ROWS):
        batch = order[start : start + _ROWS].tolist()
        yield from zip(batch, _texts(rows, batch), strict=True)


def _texts(rows: "Dataset", positions: list[int]) -> list[str]:
    (column,) = rows.column_names
    return [text or "" for text in rows[positions][column]]


def _text_rows(dataset: "Dataset", config: HubDataConfig) -> "Dataset":
    """Return the text column alone, so that reading a row decodes nothing else."""
    import datasets

    column = config.text_column
    if column not in dataset.column_names:
        raise DataError(
            f"data.text_column={column} is not in {_describe(config)}, which has: "
            f"{', '.join(dataset.column_names)}. Set data.text_column to one of these."
        )
    feature = dataset.features[column]
    if not isinstance(feature, datasets.Value) or feature.dtype not in ("string", "large_string"):
        raise DataError(
            f"data.text_column={column} of {_describe(config)} is of type {feature}, and text is needed: "
            "name the column that holds text."
        )
    return dataset.select_columns([column])


def _load(config: HubDataConfig) -> "Dataset":
    is_local = Path(config.path).expanduser().is_dir()
    if is_local or hub_is_reachable():
        return _load_dataset(config, way_out="Correct the key that it names.")
    with without_network():
        return _load_dataset(config, way_out=_fetch_hint(config))


def _load_dataset(config: HubDataConfig, way_out: str) -> "Dataset":
    import datasets
    from datasets.exceptions import DatasetsError

    path = str(Path(config.path).expanduser()) if config.path.startswith("~") else config.path
    try:
        loaded = datasets.load_dataset(path, config.name, revision=config.revision, split=config.split)
    except (DatasetsError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise DataError(f"{_describe(config)} cannot be loaded: {one_line(error)} {way_out}") from error
    if not isinstance(loaded, datasets.Dataset):
        raise DataError(f"data.split={config.split} of {_describe(config)} is not one split. Name a single split.")
    return loaded


def _describe(config: HubDataConfig) -> str:
    keys = {"path": config.path, "name": config.name, "revision": config.revision, "split": config.split}
    return " ".join(f"data.{key}={value}" for key, value in keys.items() if value is not None)


def _fetch_hint(config: HubDataConfig) -> str:
    """Say what to do when the data set is not on this machine and cannot be fetched."""
    arguments = [repr(config.path)]
    if config.name is not None:
        arguments.append(repr(config.name))
    if config.revision is not None:
        arguments.append(f"revision={config.revision!r}")
    call = f"load_dataset({', '.join(arguments)})"
    return (
        "It is no local directory and not in the local cache, and the Hugging Face Hub is out of reach (no network, "
        "or HF_HUB_OFFLINE is set). Fetch it where there is a network, with the same HF_HOME: "
        f'python -c "from datasets import load_dataset; {call}". Or use a local corpus: data=text data.path=<folder>.'
    )
