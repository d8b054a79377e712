"""What an objective hands to the engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Losses:
    """Loss of each sample of a pack, before it is averaged over the global step.

    per_sample: (n,) float32, with gradient, zero for a hole. t: (n,) float32, the time that each sample was trained at.
    figures: (n,) diagnostics by name, the same names in every pack; NaN where a sample has none.
    """

    per_sample: Tensor
    t: Tensor
    figures: Mapping[str, Tensor] = field(default_factory=dict)
