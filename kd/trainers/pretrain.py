"""Pre-training: cross-entropy on all tokens of packed blocks."""

from kd.config import PretrainConfig
from kd.trainers.language_model import LanguageModelTrainer


class PretrainTrainer(LanguageModelTrainer[PretrainConfig]):
    """Train a language model from text alone."""

    config_class = PretrainConfig
