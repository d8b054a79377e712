"""How far two sets of feature vectors are apart, and how varied one is. Features (N, D); everything in float64.

Knows nothing of videos, networks or diffusion.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dit.runtime.figures import Figure, clustered_rate, jackknife_figure, mean_figure


def frechet(x: Tensor, y: Tensor) -> float:
    """Fréchet distance of the Gaussians with the moments of x and y (Heusel et al. 2017, arXiv:1706.08500, eq. 6).

    |mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)). With S = R^T R of a QR decomposition the last trace is the nuclear norm of
    R_x R_y^T: exact for singular covariances, without the root of a matrix.
    """
    x, y = x.double(), y.double()
    roots = [torch.linalg.qr(z - z.mean(0), mode="r").R / (len(z) - 1) ** 0.5 for z in (x, y)]  # (min(N, D), D)
    spread = sum(root.square().sum() for root in roots) - 2 * torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + spread)


Distance = Callable[[Sequence[Tensor], Sequence[Tensor]], float]
"""Between two sets of samples, each in the parts that the distance wants."""


def distance_figure(distance: Distance, x: Tensor, y: Tensor, parts: int, repeats: int) -> Figure:
    """`distance` of both sets in so many interleaved parts, with its interval. The parts keep their members when some are left out, else
    every replicate would be of other parts. repeats: successive samples of one caption, which stay together: halves that hold clips of the
    same captions are as far from the truth as the whole."""

    together = repeats if min(len(x), len(y)) // repeats >= 2 * parts else 1  # of few captions each part has some clips

    def of(i: Tensor, j: Tensor) -> float:
        return distance(*([z[kept[kept // together % parts == part]] for part in range(parts)] for z, kept in ((x, i), (y, j))))

    return jackknife_figure(of, torch.arange(len(x)), torch.arange(len(y)), unit=repeats)


def frechet_unbiased(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> float:
    """`frechet` extrapolated to infinitely many samples: its bias falls as 1/N (Chong & Forsyth 2020, arXiv:1911.07023).

    A line in 1/N through all samples and the mean of their two halves; around zero the result may be negative.
    """
    of_halves = sum(frechet(x, y) for x, y in zip(xs, ys, strict=True)) / 2
    return 2 * frechet(torch.cat([*xs]), torch.cat([*ys])) - of_halves


def kernel_distance(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> float:
    """Unbiased squared maximum mean discrepancy, kernel (x.y / D + 1)^3 (KID; Bińkowski et al. 2018, arXiv:1801.01401, eq. 4): the mean
    over disjoint parts of both sets, which bound its memory."""
    return sum(_mmd(x.double(), y.double()) for x, y in zip(xs, ys, strict=True)) / len(xs)


def _mmd(x: Tensor, y: Tensor) -> float:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def of_distinct_pairs(a: Tensor) -> Tensor:
        values = kernel(a, a)
        return (values.sum() - values.diagonal().sum()) / (len(a) * (len(a) - 1))

    return float(of_distinct_pairs(x) + of_distinct_pairs(y) - 2 * kernel(x, y).mean())


def precision_recall(x: Tensor, y: Tensor, k: int, repeats: int = 1) -> tuple[Figure, Figure]:
    """Precision and recall of samples x against the reference y (Kynkäänniemi et al. 2019, arXiv:1904.06991, eqs. 1 to 3).

    The share of x within the distance to its k-th neighbour of some sample of y, and the other way round; each with Wilson's interval
    given the set that it is compared with. repeats: successive samples of x of one caption.
    """
    x, y = x.double(), y.double()
    return clustered_rate(_covered(x, y, k), repeats), clustered_rate(_covered(y, x, k), 1)


def _covered(points: Tensor, centres: Tensor, k: int, chunk: int = 1024) -> Tensor:
    """1 for points within the distance to its k-th neighbour of some centre, else 0 (n,)."""
    assert k < len(centres), (k, len(centres))
    radii = torch.cat([torch.cdist(part, centres).kthvalue(k + 1, dim=1).values for part in centres.split(chunk)])  # itself is the first
    return torch.cat([(torch.cdist(part, centres) <= radii).any(1) for part in points.split(chunk)]).double()


def pairwise(x: Tensor, repeats: int) -> Figure:
    """Mean Euclidean distance of the pairs within each run of `repeats` successive vectors; every run counts once."""
    groups = x.double().view(-1, repeats, x.shape[1])
    return mean_figure(torch.cdist(groups, groups).sum((1, 2)) / (repeats * (repeats - 1)))


def uniformity(u: Tensor) -> tuple[float, float]:
    """Kolmogorov-Smirnov statistic of values (n,) against the uniform distribution on [0, 1], and its p-value.

    The p-value is the asymptotic one with Stephens' correction for small n (1970, https://doi.org/10.1111/j.2517-6161.1970.tb00821.x).
    """
    ordered, n = u.double().clamp(0, 1).sort().values, len(u)
    rank = torch.arange(n + 1, dtype=torch.float64, device=u.device) / n
    statistic = float(torch.maximum(rank[1:] - ordered, ordered - rank[:-1]).max())
    scaled = (n**0.5 + 0.12 + 0.11 / n**0.5) * statistic
    if scaled < 0.2:  # the series needs thousands of terms where its sum is 1 to 12 digits
        return statistic, 1.0
    k = torch.arange(1, 101, dtype=torch.float64)
    return statistic, float((2 * (-1) ** (k - 1) * torch.exp(-2 * (k * scaled) ** 2)).sum().clamp(0, 1))
