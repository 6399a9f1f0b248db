"""The errors a user can cause, each with the exit code that the entry points return for it."""

import signal


class KDError(Exception):
    """A fault with a cause outside the code; its text names the key, the value and the way out."""

    exit_code = 1


class ConfigError(KDError, ValueError):
    """A value in the configuration is wrong, or two values contradict each other."""

    exit_code = 2


class RunHeldError(KDError):
    """Another live process is working on the same run."""

    exit_code = 3


class DataError(KDError):
    """A corpus, a cache or a teacher cannot be read, or does not hold what is needed."""

    exit_code = 4


class NumericError(KDError):
    """Values that must be finite are not."""

    exit_code = 5


class IntegrityError(KDError):
    """A file is not what was written: truncated, altered or missing."""

    exit_code = 6


class ResourceError(KDError):
    """Disk, memory or a permission is missing."""

    exit_code = 7


class Interrupted(KDError):  # noqa: N818 - a state, not a fault
    """The process was asked to stop; what was done so far is saved and can be resumed."""

    def __init__(self, message: str, signum: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
