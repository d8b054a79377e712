"""Distances between sets against closed forms, invariances, and controls that must come out worse."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dit.evaluation.distances import (
    distance_figure,
    frechet,
    frechet_unbiased,
    kernel_distance,
    pairwise,
    precision_recall,
    uniformity,
)
from dit.runtime.figures import student


def normal(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def extrapolated(x: Tensor, y: Tensor) -> float:
    return frechet_unbiased([x[::2], x[1::2]], [y[::2], y[1::2]])


def kernel(x: Tensor, y: Tensor, parts: int) -> float:
    return kernel_distance([x[i::parts] for i in range(parts)], [y[i::parts] for i in range(parts)])


def with_moments(count: int, mean: Tensor, root: Tensor, seed: int = 0) -> Tensor:
    """Samples whose sample mean and covariance are exactly `mean` and root root^T."""
    x = normal(count, len(mean), seed)
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (count - 1))).T
    return white @ root.T + mean


def test_frechet_of_commuting_gaussians_is_closed_form() -> None:
    mean, stds = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.5, 2.0, 3.0]).double()
    x, y = with_moments(50, torch.zeros(3).double(), torch.eye(3).double(), 1), with_moments(70, mean, torch.diag(stds), 2)
    assert frechet(x, y) == pytest.approx(float(mean.square().sum() + (1 - stds).square().sum()), rel=1e-12)


def test_frechet_of_general_gaussians_has_the_root_of_the_product_of_covariances() -> None:
    roots = [normal(4, 4, seed) for seed in (3, 4)]
    x, y = (with_moments(60, torch.zeros(4).double(), root, seed) for root, seed in zip(roots, (5, 6)))
    s, u = (root @ root.T for root in roots)
    eigenvalues = torch.linalg.eigvals(s @ u)  # of a product of positive matrices: real and positive
    expected = float(s.trace() + u.trace() - 2 * eigenvalues.real.sqrt().sum())
    assert frechet(x, y) == pytest.approx(expected, rel=1e-10)
    assert frechet(y, x) == pytest.approx(expected, rel=1e-10)


def test_frechet_invariances_and_fewer_samples_than_features() -> None:
    x, y = normal(30, 64, 7), normal(20, 64, 8) * 1.5 + 0.3
    rotation = torch.linalg.qr(normal(64, 64, 9)).Q
    value = frechet(x, y)
    assert value == pytest.approx(frechet(x @ rotation + 5, y @ rotation + 5), rel=1e-10)
    assert 4 * value == pytest.approx(frechet(2 * x, 2 * y), rel=1e-10)
    assert frechet(x, x[torch.randperm(30)]) == pytest.approx(0, abs=1e-10)


def test_extrapolation_removes_the_bias_that_falls_as_one_over_n() -> None:
    pairs = [(normal(200, 8, 2 * seed), normal(200, 8, 2 * seed + 1)) for seed in range(60)]
    plain = torch.tensor([frechet(x, y) for x, y in pairs])
    unbiased = torch.tensor([extrapolated(x, y) for x, y in pairs])
    error = float(unbiased.std()) / 60**0.5
    assert float(plain.mean()) > 0.1  # equal distributions
    assert abs(float(unbiased.mean())) < 3 * error + 0.005
    assert abs(float(unbiased.mean())) < 0.1 * float(plain.mean())


def test_kernel_distance_of_gaussians_is_its_expectation() -> None:
    # In one dimension (xy + 1)^3 compares the first three moments: 3 (dm1)^2 + 3 (dm2)^2 + (dm3)^2.
    mean, std = 0.5, 0.8
    moments = (mean, mean**2 + std**2, mean**3 + 3 * mean * std**2)
    expected = 3 * moments[0] ** 2 + 3 * (moments[1] - 1) ** 2 + moments[2] ** 2
    values = torch.tensor([kernel(normal(300, 1, 2 * s), mean + std * normal(200, 1, 2 * s + 1), 3) for s in range(100)])
    assert float(values.mean()) == pytest.approx(expected, abs=3 * float(values.std()) / 10)
    assert float(values.std()) / 10 < 0.1 * expected


def test_kernel_distance_of_equals_is_zero_in_the_mean_at_any_size() -> None:
    for count, parts in ((20, 1), (60, 2)):
        values = torch.tensor([kernel(normal(count, 4, 2 * s), normal(count, 4, 2 * s + 1), parts) for s in range(300)])
        assert abs(float(values.mean())) < 3 * float(values.std()) / 300**0.5
        assert (values < 0).any()


def test_kernel_distance_by_hand() -> None:
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [-1.0]])
    # pairs of x: (2 + 1)^3 = 27; of y: (0 + 1)^3 = 1; between: 1, 0 (1 - 1), 1, (-2 + 1)^3 = -1, mean 1/4
    assert kernel(x, y, 1) == pytest.approx(27 + 1 - 2 * 0.25)


def test_precision_and_recall_of_constructed_sets() -> None:
    ring = torch.tensor([[math.cos(a), math.sin(a)] for a in torch.arange(40) * (2 * math.pi / 40)])  # neighbours 0.157 apart
    half, far = ring[:20] * 1.01, ring[:10] * 3
    samples = torch.cat([half, far])
    precision, recall = precision_recall(samples, ring, 2)
    assert precision.value == pytest.approx(20 / 30)  # the far ones are in no circle of the ring
    assert (precision.count, recall.count) == (30, 40)
    precision, recall = precision_recall(half, ring, 2)
    assert precision.value == 1
    # circles of `half`: 0.159 on the arc, twice that at its two ends, which reach one and two points of the other half
    distances = torch.cdist(ring, half)
    radii = torch.cdist(half, half).sort(1).values[:, 2]
    assert recall.value == float((distances <= radii).any(1).double().mean()) == pytest.approx(24 / 40)
    assert precision.low is not None
    assert precision.low < 1
    same = precision_recall(ring, ring, 1)
    assert (same[0].value, same[1].value) == (1, 1)


def test_every_distance_grows_with_the_noise() -> None:
    reference, clean, noise = normal(300, 6, 1), normal(300, 6, 2), normal(300, 6, 3)
    levels = [clean + level * noise for level in (0.0, 1.0, 2.0, 4.0)]
    for distance in (frechet, extrapolated, lambda a, b: kernel(a, b, 2), lambda a, b: -precision_recall(a, b, 3)[0].value):
        values = [distance(level, reference) for level in levels]
        assert values == sorted(values)
        assert values[-1] > values[0]


def test_the_interval_of_a_frechet_distance_holds_the_truth() -> None:
    # N(0, I) and N(1, I) in 4 dimensions: 4. Extrapolated, over independent draws.
    hits = 0
    for seed in range(40):
        figure = distance_figure(frechet_unbiased, normal(120, 4, 2 * seed), normal(120, 4, 2 * seed + 1) + 1, 2, 1)
        assert figure.low is not None
        assert figure.high is not None
        hits += figure.low <= 4 <= figure.high
    assert hits >= 34  # binomial of 40 at 0.95: 38 +- 1.4


@pytest.mark.parametrize(("distance", "parts"), [(frechet_unbiased, 2), (kernel_distance, 3)])
@pytest.mark.parametrize(("count", "repeats"), [(144, 1), (145, 1), (160, 1), (144, 4)])
def test_the_interval_of_a_distance_in_parts_is_as_wide_as_it_varies(distance: Any, parts: int, count: int, repeats: int) -> None:
    """Whatever the number of samples: parts must keep their members when some are left out, and clips of a caption stay together."""

    def clips(seed: int) -> Tensor:
        own = normal(count // repeats, 6, seed).repeat_interleave(repeats, 0)
        return own if repeats == 1 else 0.9**0.5 * own + 0.1**0.5 * normal(count, 6, seed + 10_000)

    figures = [distance_figure(distance, clips(2 * seed), clips(2 * seed + 1) + 0.5, parts, repeats) for seed in range(60)]
    true = student(min(20, count // repeats) - 1) * float(torch.tensor([figure.value for figure in figures]).std())
    told = float(torch.tensor([(figure.high or 0) - figure.value for figure in figures]).square().mean().sqrt())
    assert 0.75 < told / true < 1.5


def test_halves_of_captions_are_what_extrapolates() -> None:
    """Halves that hold clips of the same captions are as biased as the whole, and nothing would be taken away."""

    def pairs(seed: int) -> Tensor:
        return normal(128, 24, seed).repeat_interleave(2, 0) + 0.05 * normal(256, 24, seed + 500)

    figures = [distance_figure(frechet_unbiased, pairs(2 * seed), pairs(2 * seed + 1), 2, 2) for seed in range(8)]
    plain = sum(frechet(pairs(2 * seed), pairs(2 * seed + 1)) for seed in range(8)) / 8
    assert abs(sum(figure.value for figure in figures) / 8) < 0.15 * plain


def test_pairwise_is_within_captions_only() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [100.0, 0.0], [100.0, 1.0]])
    assert pairwise(x, 2).value == pytest.approx(3)
    assert pairwise(torch.tensor([[0.0], [1.0], [3.0]]), 3).value == pytest.approx(2)  # 1, 2, 3
    assert pairwise(x[[0, 0, 2, 2]], 2).value == 0


def test_the_mean_distance_of_uniform_points_is_that_of_the_unit_square() -> None:
    points = torch.rand(40000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    figure = pairwise(points, 2)
    assert figure.low is not None
    assert figure.high is not None
    assert figure.low < (2 + 2**0.5 + 5 * math.asinh(1)) / 15 < figure.high


def test_uniformity_has_the_published_statistic_and_rejects_what_is_not_uniform() -> None:
    assert uniformity(torch.tensor([0.1, 0.4, 0.7]))[0] == pytest.approx(0.3)  # 1 - 0.7
    uniform = [uniformity(torch.rand(200, generator=torch.Generator().manual_seed(s)))[1] for s in range(200)]
    assert 2 <= sum(p < 0.05 for p in uniform) <= 20  # binomial of 200 at 0.05
    lumped = torch.rand(200, generator=torch.Generator().manual_seed(0)) * 0.8
    assert uniformity(lumped)[1] < 1e-4
    # scaled statistic 1.36 is the 5 % point of Kolmogorov's distribution
    n = 10000
    ks = 1.3581 / (n**0.5 + 0.12 + 0.11 / n**0.5)
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    statistic, p = uniformity(grid * (1 - ks + 0.5 / n))
    assert statistic == pytest.approx(ks, rel=1e-3)
    assert p == pytest.approx(0.05, abs=2e-3)
