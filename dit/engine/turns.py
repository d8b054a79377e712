"""Networks of one module that train in turns, each with an optimizer of its own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dit.config.engine import OptimizerConfig


@dataclass(frozen=True)
class Turns:
    """Which network a step trains; the others do not change at all in it.

    optimizers: of each network, a child of the module by name. The first is what the run is for: it alone is averaged, and it is what
    others read from a checkpoint. of_step(step): the network that step number `step`, from 0, trains: by the number alone, so that all
    ranks and a resumed run agree.
    """

    optimizers: Mapping[str, OptimizerConfig]
    of_step: Callable[[int], str]

    @classmethod
    def none(cls, optimizer: OptimizerConfig) -> "Turns":
        """One network, the whole module."""
        return cls({"": optimizer}, lambda step: "")

    @property
    def first(self) -> str:
        """The network that the run is for."""
        return next(iter(self.optimizers))


def is_of(parameter: str, network: str) -> bool:
    """Whether the parameter of this name is one of `network`."""
    return not network or parameter.startswith(f"{network}.")
