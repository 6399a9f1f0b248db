"""One run from its checked configuration to its result. A finished one is skipped without waiting for torch."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kd.config import Config, CorpusConfig
from kd.errors import KDError, ResourceError
from kd.files import is_lack_of_resource
from kd.outcome import objective, sentences
from kd.overwriting import end, needless_because
from kd.plan import check_strategy, make_plan
from kd.runs import Run
from kd.stop import StopSignal, signals_to
from kd.torchrun import find_place, is_first, num_processes, one_voice

log = logging.getLogger("kd")


def do_run(config: Config, files: dict[str, str]) -> float:
    """Do a run, continue it, or skip it if it is done.

    Args:
        config: The whole configuration.
        files: Further files for the run's directory, by relative name.

    Returns:
        The number to be minimised; see `kd.outcome.objective`.

    Raises:
        KDError: of the kind that fits; see `kd.errors` for the exit codes.
    """
    stop = StopSignal()
    with signals_to(stop.request), _resources_named(config), one_voice():
        check_strategy(config.train, alone=find_place() is None)
        plan = make_plan(config)
        run = Run(plan.identity)
        result = _result_of_all(run, config.overwrite)
        if result is None:
            if is_first():  # of the same run; the others would find it held by the first one
                run.refuse_if_held()
            log.info("Run: %s", run.directory)
            from kd.attempt import attempt  # here, because torch takes seconds to import

            result = attempt(plan, run, files, stop)
        else:
            end(run)
            log.info("Already done, nothing to do (overwrite=true does it again)")
        _announce(run, result)
    return objective(result)


def _result_of_all(run: Run, overwrite: bool) -> dict[str, Any] | None:
    """Return a finished run's result. Of several processes the first one looks: what it does, all must do."""
    result = needless_because(run, overwrite=overwrite) if is_first() else None
    if num_processes() == 1:
        return result
    from kd.distributed import told_by_first

    told: dict[str, Any] | None = told_by_first(result)
    return told


def _announce(run: Run, result: dict[str, Any]) -> None:
    for sentence in sentences(result):
        log.info("%s", sentence)
    log.info("Run: %s", run.directory)
    log.info('Try it: python -m kd.generate %s "prompt"', run.directory)


@contextmanager
def _resources_named(config: Config) -> Iterator[None]:
    """Turn what the machine lacks - memory, disk, a permission - into a ResourceError with the way out."""
    try:
        yield
    except MemoryError as error:
        raise ResourceError(_out_of_memory(config, error)) from error
    except KDError:
        raise
    except Exception as error:
        if not is_lack_of_resource(error):
            raise
        raise ResourceError(f"{error}. Free the space or the permission; the same command then continues.") from error


def _out_of_memory(config: Config, error: Exception) -> str:
    return (
        f"Out of memory with train.batch_size={config.train.batch_size} and {_longest(config)} "
        f"({str(error).splitlines()[0] if str(error) else 'no details'}). Lower train.batch_size and raise "
        "train.gradient_accumulation_steps to match: the result is the same."
    )


def _longest(config: Config) -> str:
    if isinstance(config.data, CorpusConfig):
        return f"data.seq_len={config.data.seq_len}"
    return f"model.max_seq_len={config.model.max_seq_len}"
