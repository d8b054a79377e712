"""A figure and how sure it is: every number that a metric or a diagnostic reports has a 95 % interval."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import sqrt

import torch
from torch import Tensor

Z = 1.959964
BLOCKS = 20
"""Groups of the jackknife."""


@dataclass(frozen=True)
class Figure:
    """A value, the 95 % interval around it (None where it has none), and the number of samples behind it."""

    value: float
    low: float | None
    high: float | None
    count: int

    def as_json(self) -> dict[str, float | int | None]:
        """As it stands in results.json."""
        return asdict(self)


def mean_figure(values: Tensor) -> Figure:
    """The mean of independent values (n,) with Student's interval; none for fewer than two."""
    values = values.double()
    value, count = float(values.mean()), len(values)
    if count < 2:
        return Figure(value, None, None, count)
    half = student(count - 1) * float(values.std()) / sqrt(count)
    return Figure(value, value - half, value + half, count)


def rate_figure(rate: float, count: int) -> Figure:
    """A proportion of `count` trials with the interval of Wilson (1927, https://doi.org/10.1080/01621459.1927.10502953)."""
    if count < 1:
        raise ValueError(f"got count={count}, expected at least 1")
    scale = 1 + Z**2 / count
    middle = (rate + Z**2 / (2 * count)) / scale
    half = Z / scale * sqrt(rate * (1 - rate) / count + Z**2 / (4 * count**2))
    return Figure(rate, max(0.0, middle - half), min(1.0, middle + half), count)


def jackknife_figure(statistic: Callable[..., float], *sets: Tensor) -> Figure:
    """`statistic(*sets)` with the interval of the delete-a-group jackknife (Efron & Tibshirani 1993, ch. 11).

    Every set (n_i, ...) is cut into 20 contiguous groups, and group b is left out of all sets at once: clips of one caption stay together,
    and what both sets owe to their common captions cancels. The bootstrap would add the bias of repeated samples to a distance between
    sets. Raises ValueError below 40 samples.
    """
    count = min(map(len, sets))
    if count < 2 * BLOCKS:
        raise ValueError(f"got {count} samples, expected at least {2 * BLOCKS} for the interval of a distance between sets")
    groups = [torch.arange(len(whole), device=whole.device) * BLOCKS // len(whole) for whole in sets]  # (n_i,)
    left = [statistic(*(whole[group != b] for whole, group in zip(sets, groups, strict=True))) for b in range(BLOCKS)]
    value = statistic(*sets)
    half = student(BLOCKS - 1) * sqrt((BLOCKS - 1) * float(torch.tensor(left, dtype=torch.float64).var(correction=0)))
    return Figure(value, value - half, value + half, count)


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: tabulated below 10 degrees of freedom, else Cornish-Fisher (Abramowitz & Stegun 26.7.5)."""
    if freedom < 10:
        return (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)[freedom - 1]
    z, terms = Z, ((Z**3 + Z) / 4, (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96, (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384)
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))
