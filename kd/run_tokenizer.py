"""A run's own tokenizer: a copy in its directory, which stays when the original is gone. No torch here."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from kd.cache import cache_root, cached_directory
from kd.data import TokenizerSource
from kd.errors import DataError
from kd.files import MANIFEST, check_directory, digest_of, is_whole, publish_directory

FOLDER = "tokenizer"
"""Of a run's directory."""
_KIND = "tokenizers"


def keep_tokenizer(source: TokenizerSource, run_dir: Path) -> None:
    """Put a tokenizer into a run's directory, if it is not there yet: linked to the one in the cache, or copied."""
    if is_whole(run_dir / FOLDER):
        return
    kept = _in_cache(source)
    with publish_directory(run_dir / FOLDER) as work:
        for path in kept.iterdir():
            if path.name != MANIFEST:
                _link(path, work / path.name)


def _in_cache(source: TokenizerSource) -> Path:
    """Return a directory of the cache that holds a tokenizer, in Hugging Face's format."""
    assert source.location is not None
    if Path(source.location).parent == cache_root() / _KIND:
        return Path(source.location)

    def build(work: Path) -> None:
        source.load().save_pretrained(work)

    key = digest_of({"saved": source.fingerprint})
    return cached_directory(_KIND, key, build, f"a copy of the tokenizer of {source.location}")


def _link(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:  # another disk, or one that has no links
        shutil.copyfile(file, target)


def own_tokenizer(source: TokenizerSource, run_dir: Path) -> TokenizerSource:
    """Return where to load a run's tokenizer from: its directory, or for a run from before they were kept, the source.

    Raises:
        IntegrityError: if its copy lacks a file, or one has another size.
    """
    folder = run_dir / FOLDER
    if not folder.is_dir():
        return source
    check_directory(folder)
    return replace(source, location=str(folder.absolute()), revision=None, gguf_file=None)


def require_there(source: TokenizerSource, run_dir: Path) -> None:
    """Raise DataError, with the way out, if a run's tokenizer was in a folder that is gone."""
    assert source.location is not None
    location = Path(source.location)
    if location.is_absolute() and not location.is_dir():
        raise DataError(
            f"The tokenizer of {run_dir} was in {location}, which is gone, and the run has none of its own. Put that "
            "folder back, or do the run again: the command that began it, with overwrite=true."
        )
