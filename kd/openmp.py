"""How the threads of (GNU) OpenMP wait for each other: torch's, on the CPU. To be said before torch is imported."""

from collections.abc import Mapping

WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""What the environment can say about it; read once, when the library is loaded."""
SPIN_COUNT = 1_000
"""Turns of waiting before a thread sleeps: as many as it takes to the next parallel section, so that idle cores lose
little. By default it spins for milliseconds; as soon as another process wants a core, it keeps that from the thread it
waits for, and training takes up to ten times as long. `experiments/benchmarks/neighbour.py` measures both sides."""


def let_threads_sleep(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to add to a process's environment; none if it says itself how threads wait."""
    return {} if any(name in environment for name in WAITING) else {WAITING[0]: str(SPIN_COUNT)}
