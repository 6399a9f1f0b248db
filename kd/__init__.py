"""Knowledge distillation of causal language models as an experiment framework."""

__version__ = "0.1.0"
