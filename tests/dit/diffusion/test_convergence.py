"""Orders of convergence against the exact flow map of a mixture in eight dimensions, and the marginals of stochastic samplers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipelines.packed import pack_conditioning
from dit.config.objective import KarrasSteps
from dit.config.path import EDMPath, TrigFlowPath, VEPath, VPPath
from dit.diffusion import (
    RECTIFIED_FLOW,
    Denoiser,
    Path,
    ancestral,
    build_path,
    ddim,
    dpmpp_2m,
    euler,
    euler_maruyama,
    heun,
    rk4,
    schedule,
    unipc,
)
from dit.diffusion.ground_truth import ProductMixture, points

VP = build_path(VPPath(name="vp"))
TRIGFLOW = build_path(TrigFlowPath(name="trigflow"))
EDM = build_path(EDMPath(name="edm"))
VE = build_path(VEPath(name="ve", sigma_max=20.0))
Sampler = Callable[..., Tensor]


def start(path: Path, times: Tensor, count: int) -> Tensor:
    noise = torch.randn(count, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return noise * path.at(times[0]).b


def error(sampler: Sampler, path: Path, times: Tensor, count: int = 200) -> float:
    """Median over samples of the distance to where the flow ends."""
    mixture, x = ProductMixture.standard(path), start(path, times, count)
    truth = mixture.flow_map(x, float(times[0]), float(times[-1]))
    return float((sampler(mixture, x, times, points(count)) - truth).norm(dim=1).median())


def orders(sampler: Sampler, path: Path, grid: Callable[[int], Tensor], first: int) -> list[float]:
    errors = torch.tensor([error(sampler, path, grid(steps)) for steps in (first, 2 * first, 4 * first)])
    return errors.log2().diff().neg().tolist()


def even_in_log_sigma(path: Path, low: float, high: float, steps: int) -> Tensor:
    ends = path.at(torch.tensor([high, low], dtype=torch.float64))
    first, last = (ends.b / ends.a).log()
    return path.level_of(torch.linspace(float(first), float(last), steps + 1, dtype=torch.float64).exp())


@pytest.mark.parametrize(("sampler", "order", "tolerance", "last"), [(euler, 1, 0.15, 0.0), (heun, 2, 0.15, 0.0), (rk4, 4, 0.4, 0.02)])
def test_order_of_the_flow_samplers(sampler: Sampler, order: int, tolerance: float, last: float) -> None:
    def grid(steps: int) -> Tensor:
        return torch.linspace(1, last, steps + 1, dtype=torch.float64)

    assert orders(sampler, RECTIFIED_FLOW, grid, 20) == pytest.approx([order] * 2, abs=tolerance)


@pytest.mark.parametrize("path", [VP, TRIGFLOW], ids=["vp", "trigflow"])
@pytest.mark.parametrize(
    ("sampler", "order", "tolerance"),
    [(ddim, 1, 0.05), (dpmpp_2m, 2, 0.1), (partial(unipc, order=1), 2, 0.15), (partial(unipc, order=2), 3, 0.2)],
    ids=["ddim", "dpmpp_2m", "unipc1", "unipc2"],
)
def test_published_order_of_the_exponential_samplers(sampler: Sampler, order: int, tolerance: float, path: Path) -> None:
    found = orders(partial(sampler, path=path), path, partial(even_in_log_sigma, path, 0.02, 0.98), 40)
    assert found == pytest.approx([order] * 2, abs=tolerance)


def test_unipc_of_order_three_is_of_the_fourth_order_once_steps_are_short() -> None:
    found = orders(partial(unipc, path=TRIGFLOW, order=3), TRIGFLOW, partial(even_in_log_sigma, TRIGFLOW, 0.02, 0.98), 160)
    assert found == pytest.approx([4.0] * 2, abs=0.25)


def test_dpm_solver_gains_two_orders_on_the_karras_grid() -> None:
    def grid(steps: int) -> Tensor:
        return schedule(steps, 1.0, KarrasSteps(name="karras"), EDM)

    assert min(orders(partial(dpmpp_2m, path=EDM), EDM, grid, 20)) > 1.9
    assert min(orders(heun, EDM, grid, 20)) > 1.9


def test_flow_samplers_follow_every_path() -> None:
    for path, last in ((VP, 0.01), (TRIGFLOW, 0.01), (VE, 0.1)):
        times = torch.linspace(1, last, 161, dtype=torch.float64)
        assert error(heun, path, times, 50) < 0.02 * float(path.at(times[0]).b)


@pytest.mark.parametrize(
    ("sampler", "path", "steps", "most"),
    [(partial(ddim, path=VP), VP, 50, 0.035), (heun, TRIGFLOW, 20, 0.010), (heun, TRIGFLOW, 50, 0.002)],
    ids=["ddim-50", "heun-20", "heun-50"],
)
def test_errors_at_few_steps_are_small(sampler: Sampler, path: Path, steps: int, most: float) -> None:
    """Root mean square over coordinates, from the noise to the data in even steps of t, as measured when the bench was designed."""
    mixture, x = ProductMixture.standard(path), torch.randn(2000, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    truth = mixture.flow_map(x * path.at(torch.tensor(1.0)).b, 1.0, 0.0)
    assert float((sampler(mixture, x, chain(steps), points(2000)) - truth).square().mean().sqrt()) < most


# --- marginals --------------------------------------------------------------------------------------------------

COUNT = 4000


@pytest.fixture(scope="module")
def floor() -> float:
    """The mean distance of as many real samples."""
    mixture = ProductMixture.standard()
    return sum(mixture.distance(mixture.draw(COUNT, seed)) for seed in range(8)) / 8


def reached(sampler: Sampler, path: Path, times: Tensor) -> float:
    mixture = ProductMixture.standard(path)
    cond = pack_conditioning([(1, COUNT, 1)], [torch.zeros(1, 4)])  # all tokens of one sample: one draw of noise a step
    return mixture.distance(sampler(mixture, start(path, times, COUNT).float(), times, cond, keys=[5], path=path))


def chain(steps: int) -> Tensor:
    return 1 - torch.arange(steps + 1, dtype=torch.float64) / steps


def _halfway(denoiser: Denoiser, *args: Any, **options: Any) -> Tensor:
    """Ancestral sampling where the network says that the variance lies in the middle of small and large."""
    return ancestral(lambda x, t, cond: torch.cat([denoiser(x, t, cond), torch.zeros_like(x)], dim=1), *args, **options)


@pytest.mark.parametrize(
    ("sampler", "path", "steps"),
    [
        (ancestral, VP, 1000),
        (partial(ancestral, variance="large"), VP, 250),
        (partial(_halfway, variance="learned"), VP, 250),
        (partial(ddim, eta=1.0), VP, 250),
        (dpmpp_2m, VP, 200),
        (euler_maruyama, RECTIFIED_FLOW, 300),
        (partial(euler_maruyama, churn=lambda t: 2 * t * (1 - t)), RECTIFIED_FLOW, 300),
        (euler_maruyama, TRIGFLOW, 300),
    ],
    ids=["ddpm-small", "ddpm-large", "ddpm-learned", "ddim-eta", "dpmpp-sde", "churn-rf", "churn-function", "churn-trigflow"],
)
def test_stochastic_samplers_reach_the_data(sampler: Sampler, path: Path, steps: int, floor: float) -> None:
    assert reached(sampler, path, chain(steps)) < 1.5 * floor


def test_wrong_reverse_formulas_fail() -> None:
    """Inverting the one-step kernel with the cumulative noise, as some tutorials do, and leaving the noise out, both miss the data."""
    mixture, count, steps = ProductMixture.standard(VP), 500, 1000
    betas = 1 - (VP.at(chain(steps)).a.square() / VP.at((chain(steps) - 1 / steps).clamp(min=0)).a.square())
    wrong = mean_only = torch.randn(count, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t, beta in zip(chain(steps)[:-1], betas[:-1], strict=True):
        level, b = t[None], VP.at(t).b
        wrong = (wrong + beta.sqrt() * b * _score(mixture, wrong, level)) / (1 - beta).sqrt()
        mean_only = (mean_only + beta * _score(mixture, mean_only, level)) / (1 - beta).sqrt()
    assert mixture.distance(wrong) > 1.0
    assert mixture.distance(mean_only) > 1.0


def _score(mixture: ProductMixture, x: Tensor, t: Tensor) -> Tensor:
    cond = pack_conditioning([(1, len(x), 1)], [torch.zeros(1, 4)])
    return VP.convert(mixture(x, t, cond), "velocity", "score", x, t, cond)


def test_the_grid_of_steps_is_that_of_the_states() -> None:
    """t_i = 1 - i / steps labels state i; linspace(1, 0, steps) with steps of 1 / steps, as some tutorials have it, labels others."""
    labels: list[float] = []

    def record(x: Tensor, t: Tensor, cond: object) -> Tensor:
        labels.append(float(t[0]))
        return torch.ones_like(x)

    left = euler(record, torch.ones(1, 1, dtype=torch.float64), schedule(10, 1.0), points(1))
    assert labels == pytest.approx([1 - i / 10 for i in range(10)])
    assert float(left) == pytest.approx(0.0, abs=1e-12)
    assert labels != pytest.approx(torch.linspace(1, 0, 10).tolist())
