"""`python -m kd.sweep_child key=value ...`: one run as a child of a sweep, which stops when its parent says or ends.

The parent holds the other end of the standard input. When it closes that, or ends in whatever way, a kill that
reaches nothing else included, this process asks itself to stop: it saves a checkpoint, as at any other SIGTERM.
"""

import os
import signal
import sys
import threading

from kd.train import main


def end_with_parent() -> None:
    """Wait for the end of the standard input, then stop this process."""
    os.read(sys.stdin.fileno(), 1)  # not sys.stdin's own methods: a thread inside those breaks the interpreter's end
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    main()
