"""Packages that come with an extra: tests that need one are skipped without it, unless KD_REQUIRE_EXTRAS=1 is set."""

import importlib
import os
from typing import Any

import pytest


def extra(module: str, name: str) -> Any:
    """Import a module that an extra brings; skip the test where it is not installed, unless it must be."""
    if os.environ.get("KD_REQUIRE_EXTRAS") == "1":
        return importlib.import_module(module)
    return pytest.importorskip(module, reason=f"the extra [{name}] is not installed", exc_type=ImportError)
