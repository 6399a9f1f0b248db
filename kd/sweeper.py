"""The door by which Hydra enters a sweep (`-m`, or a file of `sweep/`); `kd.sweep` does the work."""

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from kd.composition import SWEEPER
from kd.errors import ConfigError
from kd.torchrun import find_place


class GridSweeper(Sweeper):
    """Does every combination of the values given, each run once."""

    def __init__(self, params: dict[str, str] | None = None) -> None:
        """Args: values by key, from a file of `sweep/`; the command line's come on top."""
        self._params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:  # noqa: ARG002
        """Take over what Hydra gives. Its task function does a run in place, so launchers get another one."""
        self.hydra_context, self.config = hydra_context, config

    def sweep(self, arguments: list[str]) -> list[float]:
        """Do the sweep; return what `kd.sweep.run_sweep` does: of each run the number to be minimised.

        Raises:
            ConfigError: under torchrun, whose every process would do the sweep.
        """
        if (place := find_place()) is not None:
            raise ConfigError(
                f"A sweep cannot run in {place.world_size} processes of torchrun (RANK and WORLD_SIZE are set): start "
                "the sweep without torchrun; with hydra/launcher=submitit or slurm and hydra.launcher.tasks_per_node="
                f"{place.world_size} each of its points is a run of so many processes."
            )
        from kd.sweep import run_sweep  # here, so that single runs and --help do not wait for it

        assert self.hydra_context is not None
        assert self.config is not None
        own = [f"{key}={values}" for key, values in self._params.items()]
        return run_sweep([*own, *arguments], self.hydra_context, self.config)


def register_sweeper() -> None:
    """Make the sweeper known to Hydra under the name that `hydra/sweeper: kd` has."""
    Plugins.instance().class_name_to_class[SWEEPER] = GridSweeper
