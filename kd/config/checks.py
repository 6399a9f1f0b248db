"""Checks that the configurations share; each names the key, the value and what is allowed."""

import math

from kd.errors import ConfigError


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    """Raise a ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key}={value} is not allowed: {allowed}.")


def require_positive(prefix: str, config: object, *names: str) -> None:
    """Raise a ConfigError if one of these numbers is 0 or less; null passes."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value > 0, f"{prefix}.{name}", value, "it must be greater than 0")


def require_finite(prefix: str, config: object, *names: str) -> None:
    """Raise a ConfigError if one of these numbers is NaN or infinite."""
    for name in names:
        value = getattr(config, name)
        require(math.isfinite(value), f"{prefix}.{name}", value, "it must be a finite number")
