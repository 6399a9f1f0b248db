"""One run from its checked configuration to its result. A finished one is skipped without waiting for torch."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kd.cache import RESOURCE_ERRNOS
from kd.config import Config, CorpusConfig
from kd.errors import ResourceError
from kd.plan import make_plan
from kd.runs import Run
from kd.stop import StopSignal, signals_to

log = logging.getLogger("kd")


def do_run(config: Config, files: dict[str, str]) -> float:
    """Do a run, continue it, or skip it if it is done.

    Args:
        config: The whole configuration.
        files: Further files for the run's directory, by relative name.

    Returns:
        The final validation loss (nats per token).

    Raises:
        KDError: of the kind that fits; see `kd.errors` for the exit codes.
    """
    stop = StopSignal()
    with signals_to(stop.request), _resources_named(config):
        plan = make_plan(config)
        run = Run(plan.identity)
        result = None if config.overwrite else run.result()
        if result is None:
            run.refuse_if_held()
            from kd.attempt import attempt  # here, because torch takes seconds to import

            result = attempt(plan, run, files, stop)
        else:
            log.info("Already done, nothing to do (overwrite=true does it again)")
    _announce(run, result)
    return float(result["val_loss"])


def _announce(run: Run, result: dict[str, Any]) -> None:
    for line in (_perplexities(result),) if "val_ppl" in result else _measures(result):
        log.info("%s", line)
    log.info("Run: %s", run.directory)
    log.info('Try it: python -m kd.generate %s "prompt"', run.directory)


def _perplexities(result: dict[str, Any]) -> str:
    teacher, test = result["teacher_val_ppl"], result["test_ppl"]
    text = f"Validation perplexity {result['val_ppl']:.2f}"
    text += "" if test is None else f", test {test:.2f}"
    if "quantized_val_ppl" in result:
        text += f"; with integer weights {result['quantized_val_ppl']:.2f}"
    return text if teacher is None else f"{text} (teacher, validation: {teacher:.2f})"


def _measures(result: dict[str, Any]) -> Iterator[str]:
    for prefix, part in (("val_", "Validation"), ("test_", "Test"), ("quantized_val_", "With integer weights")):
        known = {name: value for name, value in result.items() if name.startswith(prefix) and value is not None}
        values = (f"{name.removeprefix(prefix).replace('_', ' ')} {value:.4f}" for name, value in known.items())
        if known:
            yield f"{part}: {', '.join(values)}"


@contextmanager
def _resources_named(config: Config) -> Iterator[None]:
    """Turn what the machine lacks - memory, disk, a permission - into a ResourceError with the way out."""
    try:
        yield
    except MemoryError as error:
        raise ResourceError(_out_of_memory(config, error)) from error
    except OSError as error:
        if error.errno not in RESOURCE_ERRNOS:
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
