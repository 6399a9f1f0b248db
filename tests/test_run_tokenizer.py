"""A run carries its tokenizer: it can be read when all else that it was made with is gone."""

import shutil
from pathlib import Path

import pytest

from kd.cache import cache_root, cached_directory
from kd.data import TokenizerSource, load_tokenizer, tokenizer_object_fingerprint, train_bpe
from kd.errors import DataError, IntegrityError
from kd.files import check_directory
from kd.run_tokenizer import keep_tokenizer, own_tokenizer, require_there

from .small_disk import small_disk

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"


@pytest.fixture
def in_cache() -> TokenizerSource:
    """A tokenizer that is an entry of the cache, as a trained BPE is."""
    made = cached_directory(
        "tokenizers", "key", lambda work: train_bpe(["any text"], 257).save_pretrained(work), "a BPE"
    )
    return TokenizerSource("a BPE", str(made))


@pytest.fixture
def elsewhere(tmp_path: Path) -> TokenizerSource:
    """A tokenizer of a user's, with a chat template."""
    tokenizer = train_bpe(["other text, and more of it"], 260)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "theirs")
    return TokenizerSource("their files", str(tmp_path / "theirs"))


def test_a_run_shares_its_tokenizer_with_the_cache(in_cache: TokenizerSource, tmp_path: Path) -> None:
    assert in_cache.location is not None
    for name in ("first", "second"):
        keep_tokenizer(in_cache, tmp_path / name)
        check_directory(tmp_path / name / "tokenizer", digests=True)
    inodes = {
        (folder / "tokenizer.json").stat().st_ino for folder in (*tmp_path.glob("*/tokenizer"), Path(in_cache.location))
    }
    assert len(inodes) == 1
    assert len(list((cache_root() / "tokenizers").glob("*/"))) == 1


def test_it_is_read_from_there_when_the_original_is_gone(
    in_cache: TokenizerSource, elsewhere: TokenizerSource, tmp_path: Path
) -> None:
    for source in (in_cache, elsewhere):
        before = source.load()
        keep_tokenizer(source, tmp_path / "run")
        shutil.rmtree(cache_root())
        assert source.location is not None
        shutil.rmtree(source.location, ignore_errors=True)
        own = own_tokenizer(source, tmp_path / "run")
        require_there(own, tmp_path / "run")
        after = own.load()
        assert own.fingerprint == source.fingerprint
        assert tokenizer_object_fingerprint(after) == tokenizer_object_fingerprint(before)
        assert after.chat_template == before.chat_template
        shutil.rmtree(tmp_path / "run")


def test_the_cache_on_another_disk_is_copied_from(
    tmp_path: Path, elsewhere: TokenizerSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "disk", "3m") as disk:
        monkeypatch.setenv("KD_CACHE", str(disk / "cache"))
        keep_tokenizer(elsewhere, tmp_path / "run")
    assert load_tokenizer(str(tmp_path / "run" / "tokenizer")).chat_template == TEMPLATE


def test_what_is_there_is_kept_and_what_is_damaged_is_made_again(in_cache: TokenizerSource, tmp_path: Path) -> None:
    keep_tokenizer(in_cache, tmp_path)
    file = tmp_path / "tokenizer" / "tokenizer.json"
    before = (tmp_path / "tokenizer").stat().st_ino
    keep_tokenizer(in_cache, tmp_path)
    assert (tmp_path / "tokenizer").stat().st_ino == before
    file.unlink()
    file.write_text("{")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        own_tokenizer(in_cache, tmp_path)
    keep_tokenizer(in_cache, tmp_path)
    own_tokenizer(in_cache, tmp_path).load()


def test_an_older_run_says_where_its_tokenizer_was(elsewhere: TokenizerSource, tmp_path: Path) -> None:
    assert own_tokenizer(elsewhere, tmp_path) == elsewhere
    require_there(elsewhere, tmp_path)
    require_there(TokenizerSource("of the Hub", "someone/something"), tmp_path)
    assert elsewhere.location is not None
    shutil.rmtree(elsewhere.location)
    with pytest.raises(DataError, match=r"theirs, which is gone.*overwrite=true"):
        require_there(elsewhere, tmp_path)
