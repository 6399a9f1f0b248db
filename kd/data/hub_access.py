"""Whether the Hugging Face Hub can be reached, asked once and quickly.

Its client repeats a failed request five times with growing pauses, for each file: without a network, loading one
tokenizer takes three quarters of a minute to fail. So the question comes first, and a "no" means: cache only.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_PROBE_SECONDS = 6.0


@functools.cache
def hub_is_reachable() -> bool:
    """Return whether the Hub answers within six seconds; False in offline mode (HF_HUB_OFFLINE)."""
    answers: list[bool] = []
    # In a thread of its own, because no timeout of the client bounds the look-up of a name.
    thread = threading.Thread(target=_probe, args=(answers,), daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return bool(answers)


def _probe(answers: list[bool]) -> None:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
    except Exception:  # the client's own types change with its HTTP library; each of them means "no"
        return
    answers.append(True)


def one_line(error: Exception) -> str:
    """Return a library's message, which may run over many lines, as one sentence."""
    return " ".join(str(error).split()).rstrip(".") + "."


@contextmanager
def without_network() -> Iterator[None]:
    """Keep `datasets` from asking the Hub within this block: it then looks in its cache alone."""
    import datasets.config
    import huggingface_hub.constants

    # Both libraries read the environment at import only, and load_dataset has no argument for it.
    before = (datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE)
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before
