"""`python -m tests.counting_train ARGUMENTS`: the training command, with a note of what the teacher's body sees.

With KD_TEST_SECONDS every block is a shard of its own, and takes so long, so that a test can hit the middle of a build.
"""

import os
import sys
import time

from torch import Tensor

import kd.teacher_cache
from kd.teacher import LiveTeacher
from kd.train import main

from .commands import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "experiments" / "benchmarks"))

from counted_train import SEEN_FILE, watch_teachers

SECONDS = "KD_TEST_SECONDS"


def slow_down(seconds: float) -> None:
    """Make each block take a while."""
    hidden = LiveTeacher.hidden

    def slow_hidden(self: LiveTeacher, batch: dict[str, Tensor]) -> Tensor:
        time.sleep(seconds)
        return hidden(self, batch)

    LiveTeacher.hidden = slow_hidden  # type: ignore[method-assign]
    kd.teacher_cache.SHARD_BYTES = kd.teacher_cache.BATCH_TOKENS = 1


if __name__ == "__main__":
    assert SEEN_FILE in os.environ
    if SECONDS in os.environ:
        slow_down(float(os.environ[SECONDS]))
    watch_teachers()
    main()
