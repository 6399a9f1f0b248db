"""Train a model: `python -m kd.train key=value ...`, or the console script `kd-train`.

This door composes and checks the configuration, which needs no torch; `kd.job` does the work.
"""

import logging
import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from kd.composition import CONFIG_NAME, Refusal, conf_dir, explain, register_schemas, to_config
from kd.errors import Interrupted, KDError
from kd.openmp import let_threads_sleep
from kd.sweeper import register_sweeper

FULL_ERRORS = "HYDRA_FULL_ERROR"


def task(values: DictConfig) -> float:
    """Do one run; return what a Hydra sweeper minimises (see `kd.outcome.objective`)."""
    config = to_config(values)
    from kd.job import do_run  # here, so that --help and refusals do not wait for torch

    return do_run(config, hydra_files(values))


def hydra_files(values: DictConfig) -> dict[str, str]:
    """Return the files that Hydra users expect in a run's directory, by relative name."""
    settings = HydraConfig.get()
    return {
        "config.yaml": OmegaConf.to_yaml(values, resolve=True),
        ".hydra/config.yaml": OmegaConf.to_yaml(values),
        ".hydra/overrides.yaml": OmegaConf.to_yaml(settings.overrides.task),
        ".hydra/hydra.yaml": OmegaConf.to_yaml(OmegaConf.create({"hydra": settings})),
    }


def _guarded_task(values: DictConfig) -> float:
    """Like `task`; in a single run an error of the user's leaves here, before Hydra adds words to it."""
    try:
        return task(values)
    except KDError as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        sys.exit(_report(error))


def main() -> None:
    """Run the command line; exit with the code of what went wrong (see `--help`)."""
    logging.captureWarnings(True)
    # Hydra would print composition errors in its own words and exit with 1; so it raises them, and we print.
    debugging = FULL_ERRORS in os.environ
    os.environ.update(let_threads_sleep(os.environ))  # torch has not been imported yet
    os.environ[FULL_ERRORS] = "1"
    try:
        register_schemas()
        register_sweeper()
        hydra.main(version_base="1.3", config_path=conf_dir(), config_name=CONFIG_NAME)(_guarded_task)()
    except Refusal as refusal:
        sys.exit(_report(refusal.error))
    except Exception as error:
        ours = explain(error)
        if debugging or ours is None:
            raise
        sys.exit(_report(ours))


def _report(error: KDError) -> int:
    sys.stdout.flush()
    rank = os.environ.get("RANK", "0")  # torchrun's; not checked yet where its variables are what is wrong
    if rank == "0" or not isinstance(error, Interrupted):
        print(f"kd-train{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    main()
