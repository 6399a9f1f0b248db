"""Packages that only some settings need: an extra of this package brings them."""

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from kd.errors import ConfigError

NOISY = ("torchao", "torch.utils._pytree")
"""Loggers that warn, when torchao is imported, of kernels for other machines and of its own use of torch."""


def require_extra(setting: str, extra: tuple[str, str] | None) -> None:
    """Check, without importing it, that a package is installed.

    Args:
        setting: What needs it, as a user writes it.
        extra: The package, and the extra that brings it; None: nothing is needed.

    Raises:
        ConfigError: if it is not.
    """
    if extra is not None and importlib.util.find_spec(extra[0]) is None:
        package, name = extra
        raise ConfigError(f"{setting} needs {package}, which is not installed: pip install 'kd-train[{name}]'.")


@contextmanager
def quiet_import() -> Iterator[None]:
    """Import torchao, or what imports it, without its warnings."""
    loggers = [logging.getLogger(name) for name in NOISY]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
