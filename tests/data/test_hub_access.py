"""Asking for the Hub: bounded in time, and the switch to cache-only is put back."""

import time
from collections.abc import Iterator

import huggingface_hub
import pytest

import kd.data.hub_access
from kd.data.hub_access import hub_is_reachable, one_line, without_network


class _Session:
    """Stands in for the Hub client's HTTP session."""

    def __init__(self, seconds: float, error: Exception | None) -> None:
        self.seconds = seconds
        self.error = error

    def head(self, _url: str, *, timeout: float) -> None:
        assert timeout > 0
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error


@pytest.fixture(autouse=True)
def forgotten_answer() -> Iterator[None]:
    hub_is_reachable.cache_clear()
    yield
    hub_is_reachable.cache_clear()


@pytest.mark.parametrize(
    ("seconds", "error", "expected"),
    [(0.0, None, True), (0.0, OSError("no route"), False), (1.0, None, False)],
    ids=["answers", "refuses", "hangs"],
)
def test_the_hub_is_asked_for_a_bounded_time(
    seconds: float, error: Exception | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: _Session(seconds, error))
    monkeypatch.setattr(kd.data.hub_access, "_PROBE_SECONDS", 0.2)
    start = time.monotonic()
    assert hub_is_reachable() is expected
    assert time.monotonic() - start < 0.8


def test_the_network_is_off_inside_the_block_only() -> None:
    import datasets.config

    before = (datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE)
    with without_network():
        inside = (datasets.config.HF_HUB_OFFLINE, huggingface_hub.is_offline_mode())
    after = (datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE)
    assert inside == (True, True)
    assert after == before


def test_a_message_of_many_lines_becomes_one() -> None:
    assert one_line(ValueError("first.\n  second\n")) == "first. second."
