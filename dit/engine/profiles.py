"""Averages with power-function profiles, and the profile of any width as a combination of those that were kept.

Karras et al. 2023, "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv:2312.02696, section 3 and appendix C.
An average of width gamma at time T weighs the weights of time t by (gamma + 1) t^gamma / T^(gamma + 1), 0 <= t <= T.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np


@cache
def gamma_of(sigma_rel: float) -> float:
    """Exponent of the profile whose standard deviation is `sigma_rel` of the time trained.

    The positive root of sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1. Exists for sigma_rel < 0.289, the width of a plain mean.
    """
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def combination(kept: Sequence[tuple[float, int]], wanted: tuple[float, int]) -> list[float]:
    """Coefficients of the averages `kept` whose sum is nearest, in least squares of the profiles, to the average `wanted`.

    Each is (gamma, time). The coefficients sum to one, so that weights which do not change stay as they are; the paper leaves the
    sum free, which makes a difference only where few averages are kept.
    """
    n = len(kept)
    system = np.ones((n + 1, n + 1))  # the normal equations, and the sum with its multiplier
    system[:n, :n] = [[_overlap(a, b) for b in kept] for a in kept]
    system[n, n] = 0
    right = np.array([*(_overlap(a, wanted) for a in kept), 1.0])
    scale = np.array([*(_overlap(a, a) ** -0.5 for a in kept), 1.0])  # early averages have larger overlaps
    solution = np.linalg.lstsq(scale[:, None] * system * scale, scale * right, rcond=1e-12)[0] * scale
    return [float(x) for x in solution[:n]]


def _overlap(a: tuple[float, int], b: tuple[float, int]) -> float:
    """Integral of the product of two profiles."""
    (gamma_a, time_a), (gamma_b, time_b) = sorted((a, b), key=lambda x: x[1])  # a ends first
    return float((gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (time_a / time_b) ** gamma_b / time_b)
