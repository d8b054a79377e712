"""What an objective hands to the engine."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Losses:
    """Loss of each sample of a pack, before it is averaged over the global step.

    per_sample: (n,) float32, with gradient, zero for a hole. t: (n,) float32, the time that each sample was trained at.
    """

    per_sample: Tensor
    t: Tensor
