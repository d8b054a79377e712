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


def mean_figure(values: Tensor, unit: int = 1) -> Figure:
    """The mean of values (n,) with Student's interval; none for fewer than two independent ones.

    unit: so many successive values are of one caption, and count once: only their means are independent.
    """
    values = values.double()
    means = values.view(-1, unit).mean(1)
    value, independent = float(means.mean()), len(means)
    if independent < 2:
        return Figure(value, None, None, len(values))
    half = student(independent - 1) * float(means.std()) / sqrt(independent)
    return Figure(value, value - half, value + half, len(values))


def rate_figure(rate: float, count: float) -> Figure:
    """A proportion of `count` trials, not always a whole number, with the interval of Wilson (1927, https://doi.org/10.1080/01621459.1927.10502953)."""
    if count < 1:
        raise ValueError(f"got count={count}, expected at least 1")
    scale = 1 + Z**2 / count
    middle = (rate + Z**2 / (2 * count)) / scale
    half = Z / scale * sqrt(rate * (1 - rate) / count + Z**2 / (4 * count**2))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Figure(rate, min(low, rate), max(high, rate), round(count))  # at 0 and 1 the ends are the rate, but for rounding


def clustered_rate(values: Tensor, unit: int) -> Figure:
    """The mean of values (n,) in [0, 1], of which so many successive ones are of one caption, with Wilson's interval.

    Its number of trials is n divided by the design effect (Kish 1965): how much larger the variance of the mean is, by the spread of the
    captions' means, than n independent trials would have; from 1, independent clips, to `unit`, where all of a caption are alike, and which
    is taken where nothing varies.
    """
    values = values.double()
    means, rate, count = values.view(-1, unit).mean(1), float(values.mean()), len(values)
    chance = rate * (1 - rate) / count
    effect = float(means.var()) / len(means) / chance if chance > 0 and len(means) > 1 else float(unit)
    figure = rate_figure(rate, count / min(max(effect, 1.0), unit))
    return Figure(rate, figure.low, figure.high, count)


def jackknife_figure(statistic: Callable[..., float], *sets: Tensor, unit: int = 1) -> Figure:
    """`statistic(*sets)` with the interval of the delete-a-group jackknife (Efron & Tibshirani 1993, ch. 11).

    Every set (n_i, ...) is cut into 20 contiguous groups, or as many as it has captions, and group b is left out of all sets at once: what
    both sets owe to their common captions cancels. The bootstrap would add the bias of repeated samples to a distance between sets.
    unit: so many successive samples are of one caption, and stay together. Raises ValueError below 40 samples.
    """
    count = min(map(len, sets))
    if count < 2 * BLOCKS:
        raise ValueError(f"got {count} samples, expected at least {2 * BLOCKS} for the interval of a distance between sets")
    value, blocks = statistic(*sets), min(BLOCKS, count // unit)
    if blocks < 2:
        return Figure(value, None, None, count)
    groups = [torch.arange(len(whole), device=whole.device) // unit * blocks // -(-len(whole) // unit) for whole in sets]  # (n_i,)
    left = [statistic(*(whole[group != b] for whole, group in zip(sets, groups, strict=True))) for b in range(blocks)]
    half = student(blocks - 1) * sqrt((blocks - 1) * float(torch.tensor(left, dtype=torch.float64).var(correction=0)))
    return Figure(value, value - half, value + half, count)


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: tabulated below 10 degrees of freedom, else Cornish-Fisher (Abramowitz & Stegun 26.7.5)."""
    if freedom < 10:
        return (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)[freedom - 1]
    z, terms = Z, ((Z**3 + Z) / 4, (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96, (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384)
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))
