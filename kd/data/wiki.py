"""The specified corpus as one class: about 50 MB of Chinese Wikipedia, packed into blocks."""

from typing import TYPE_CHECKING

from kd.config import HubDataConfig
from kd.data.blocks import PackedBlocks, build_blocks
from kd.data.corpora import TEST, TRAIN, VALIDATION, read_corpus
from kd.data.tokenizers import tokenizer_object_fingerprint
from kd.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class WikiDataset(PackedBlocks):
    """One part of a sample of a Hub data set, split by article and packed into blocks.

    The first call loads, tokenizes and packs the text; later ones open what is cached.
    """

    def __init__(
        self,
        split: str,
        tokenizer: "PreTrainedTokenizerFast",
        seq_len: int = 512,
        sample_size: int | None = 50_000_000,
        *,
        path: str = "wikimedia/wikipedia",
        name: str | None = "20231101.zh",
        revision: str | None = None,
        val_ratio: float = 0.1,
        test_ratio: float = 0.0,
    ) -> None:
        """Open one part, making it first if needed.

        Args:
            split: `train`, `validation` or `test`.
            tokenizer: A fast tokenizer with an end-of-text token; the teacher's.
            seq_len: Inputs (and targets) per block, in tokens.
            sample_size: Bytes of text to take; None: all.
            path: Hub id, or a local directory in the Hub's format.
            name: Configuration of the data set.
            revision: Branch, tag or commit; None: the default branch.
            val_ratio: Share of the text for validation, in (0, 1).
            test_ratio: Share of the text for the test part, in [0, 1).

        Raises:
            ConfigError: if a value is out of range, or `split` is not one of the parts.
            DataError: if the text cannot be loaded, or a part is shorter than one block.
        """
        parts = (TRAIN, VALIDATION, TEST) if test_ratio > 0 else (TRAIN, VALIDATION)
        if split not in parts:
            raise ConfigError(
                f"split={split} is not one of {', '.join(parts)}; a test part needs a test_ratio above 0."
            )
        config = HubDataConfig(
            path=path,
            name=name,
            revision=revision,
            seq_len=seq_len,
            sample_size=sample_size,
            val_ratio=val_ratio,
            test_ratio=test_ratio,
        )
        corpus = read_corpus(config)
        super().__init__(build_blocks(corpus, tokenizer, tokenizer_object_fingerprint(tokenizer), seq_len), split)
