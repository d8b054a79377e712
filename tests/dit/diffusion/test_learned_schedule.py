import math

import torch
from torch import Tensor, nn

from dit.diffusion import euler, schedule
from dit.diffusion.ground_truth import GaussianMixture, pack_of_points, points
from dit.diffusion.learned_schedule import LearnedSchedule, VariationalDiffusion, schedule_of

STD = 0.5


class Exact(nn.Module):
    """The best prediction of the noise for data N(0, STD^2), at the gamma that it is told."""

    def forward(self, x_t: Tensor, come: Tensor, cond: object) -> Tensor:
        first, last = schedule_of(self).ends
        gamma = (first + (last - first) * come)[:, None]
        a, b = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        return b * x_t / (a**2 * STD**2 + b**2)


def learned(ends: tuple[float, float] = (-13.3, 5.0), pieces: int = 32) -> LearnedSchedule:
    return LearnedSchedule(ends, pieces)


def data(count: int, seed: int) -> Tensor:
    return GaussianMixture(torch.zeros(1, 8), torch.tensor([STD]), torch.ones(1)).draw(count, seed)


def losses(path: LearnedSchedule, count: int, seed: int) -> Tensor:
    network = Exact()
    network.schedule = path
    return VariationalDiffusion(torch.zeros(1, 4), None, 0.0)(network, pack_of_points(data(count, seed), 10**6 * seed), 0.0).per_sample


def test_gamma_rises_between_its_ends_and_its_slope_is_right() -> None:
    path = learned((-8.0, 4.0), 8)
    torch.nn.init.normal_(path.logits)
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    c = path.at(t)
    gamma = (c.b / c.a).square().log()
    assert bool((gamma.diff() > 0).all())
    torch.testing.assert_close(gamma[[0, -1]], torch.tensor([-8.0, 4.0]).double(), atol=1e-6, rtol=0)
    inner = torch.rand(50, dtype=torch.float64) * 0.1 + 0.01  # within one piece
    for value, slope in (("a", "da"), ("b", "db")):
        numeric = (getattr(path.at(inner + 1e-6), value) - getattr(path.at(inner - 1e-6), value)) / 2e-6
        torch.testing.assert_close(getattr(path.at(inner), slope), numeric, atol=1e-7, rtol=1e-5)


def test_bound_of_the_exact_model_is_the_entropy_whatever_lies_between() -> None:
    entropy = math.log(STD * math.sqrt(2 * math.pi * math.e))
    even, bent = learned(), learned()
    torch.nn.init.normal_(bent.logits, std=0.7, generator=torch.Generator().manual_seed(0))
    for path in (even, bent):
        found = losses(path, 20_000, 1).double().detach()
        assert abs(float(found.mean()) - entropy) < 4 * float(found.std()) / 20_000**0.5 + 2e-3


def test_what_lies_between_learns_less_variance_and_leaves_the_bound() -> None:
    path = learned()
    path.ends.requires_grad_(False)
    before = losses(path, 20_000, 9).double().detach()
    optimizer = torch.optim.Adam([path.logits], 0.05)
    for step in range(150):
        optimizer.zero_grad()
        losses(path, 256, 100 + step).mean().backward()
        optimizer.step()
    after = losses(path, 20_000, 9).double().detach()
    assert float(after.var()) < 0.8 * float(before.var())
    assert abs(float(after.mean() - before.mean())) < float((after.var() + before.var()).sqrt()) / 20_000**0.5  # one standard error


def test_ends_receive_the_gradient_of_the_bound_and_the_inside_that_of_its_square() -> None:
    path = learned((-4.0, 3.0), 4)
    torch.nn.init.normal_(path.logits, generator=torch.Generator().manual_seed(3))
    losses(path, 500, 2).mean().backward()
    for parameter, power in ((path.ends, 1), (path.logits, 2)):
        assert parameter.grad is not None
        for index in range(len(parameter)):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter[index] += sign * 1e-2
                    values.append(float((losses(path, 500, 2).double() ** power).mean()))
                    parameter[index] -= sign * 1e-2
            numeric = (values[0] - values[1]) / 2e-2
            assert abs(float(parameter.grad[index]) - numeric) < 2e-2 * abs(numeric) + 2e-3


def test_the_gradient_of_the_bound_by_the_inside_has_mean_zero() -> None:
    path, step = learned((-4.0, 3.0), 4), 1e-3
    torch.nn.init.normal_(path.logits)
    for index in range(len(path.logits)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                path.logits[index] += sign * step
                values.append(losses(path, 4000, 2).double())
                path.logits[index] -= sign * step
        slopes = (values[0] - values[1]) / (2 * step)
        error = float(slopes.std()) / 4000**0.5
        assert error > 1e-4  # each sample has one
        assert abs(float(slopes.mean())) < 4 * error


def test_a_learned_schedule_is_a_path_like_any_other() -> None:
    path = learned((-10.0, 8.0))
    mixture = GaussianMixture(torch.zeros(1, 2), torch.tensor([STD]), torch.ones(1), path)
    with torch.no_grad():
        drawn = euler(mixture, torch.randn(2000, 2), schedule(200, 1.0), points(2000))
    assert abs(float(drawn.std()) - STD) < 0.05
