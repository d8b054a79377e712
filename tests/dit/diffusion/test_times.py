import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from data_pipelines.errors import UserError
from data_pipelines.packed import InStep
from dit.config.objective import (
    ExponentialShift,
    ExponentialSteps,
    KarrasSteps,
    LogitNormalTimes,
    LogNormalTimes,
    ModeTimes,
    SamplingConfig,
    TokenShift,
    TrainedSteps,
    UniformTimes,
    WholeSteps,
)
from dit.config.path import EDMPath, VEPath, VPPath
from dit.diffusion import Path, build_path, sample, times
from dit.diffusion.ground_truth import GaussianMixture, points
from dit.diffusion.learned_schedule import LearnedSchedule


def kolmogorov_smirnov(draws: Tensor, cdf: Tensor) -> float:
    """sqrt(n) times the largest distance between the empirical distribution and the one whose CDF at the draws is `cdf`."""
    n = len(draws)
    cdf = cdf.sort().values
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * float(torch.maximum((steps[1:] - cdf).max(), (cdf - steps[:-1]).max()))


def normal_cdf(z: Tensor) -> Tensor:
    return (1 + torch.erf(z / math.sqrt(2))) / 2


def test_draws_follow_the_logit_normal() -> None:
    t = times.draw(LogitNormalTimes(mean=0.4, std=1.3), None, range(20_000), [1] * 20_000)
    assert t.dtype == torch.float64
    assert kolmogorov_smirnov(t, normal_cdf((torch.logit(t) - 0.4) / 1.3)) < 1.63  # 1 % level
    assert kolmogorov_smirnov(t, normal_cdf((torch.logit(t) - 0.5) / 1.3)) > 1.63  # and the test can tell


def test_draws_are_uniform() -> None:
    t = times.draw(UniformTimes(name="uniform"), None, range(20_000), [1] * 20_000)
    assert kolmogorov_smirnov(t, t) < 1.63


def test_each_sample_is_shifted_by_its_own_length() -> None:
    config = TokenShift(base_tokens=16)
    plain = times.draw(LogitNormalTimes(), None, [7, 8], [16, 144])
    shifted = times.draw(LogitNormalTimes(), config, [7, 8], [16, 144])
    assert times.shift_of(144, config) == 3.0
    assert times.shift_of(144, None) == 1.0
    assert shifted[0] == plain[0]
    assert float(shifted[1]) == pytest.approx(float(3 * plain[1] / (1 + 2 * plain[1])), abs=1e-15)
    assert shifted[1] > plain[1]


def test_shifts_compose_and_keep_the_ends() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(times.shift(times.shift(t, 3.0), 1.7), times.shift(t, 5.1), atol=1e-12, rtol=0)
    torch.testing.assert_close(times.shift(times.shift(t, 3.0), 1 / 3.0), t, atol=1e-12, rtol=0)
    assert times.shift(t, 4.0)[[0, -1]].tolist() == [0.0, 1.0]


def test_schedule_is_the_known_one() -> None:
    assert times.schedule(4, 1.0).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert times.schedule(4, 3.0).tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0], abs=1e-15)  # 1000, 900, 750, 500
    assert times.schedule(7, 3.0).dtype == torch.float64


def test_draws_follow_the_mode_distribution() -> None:
    config = ModeTimes(name="mode", scale=0.9)
    u = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    published = 1 - u - 0.9 * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)  # Esser et al. 2024, eq. 20
    assert bool((published.diff() < 0).all())
    t = times.draw(config, None, range(20_000), [1] * 20_000)
    below = torch.searchsorted(published.flip(0).contiguous(), t).double() / 20_000
    assert kolmogorov_smirnov(t, below) < 1.63
    assert kolmogorov_smirnov(t, t) > 1.63


def test_draws_are_log_normal_in_sigma_on_any_path() -> None:
    for path in (build_path(EDMPath(name="edm")), build_path(VPPath(name="vp")), times.RECTIFIED_FLOW):
        t = times.draw(LogNormalTimes(name="log_normal"), None, range(5000), [1] * 5000, path)
        c = path.at(t)
        assert kolmogorov_smirnov(t, normal_cdf(((c.b / c.a).log() + 1.2) / 1.2)) < 1.63


def test_stratified_draws_put_one_in_each_part_of_the_step_however_it_is_cut() -> None:
    keys = list(range(100, 164))

    def drawn(cuts: list[int]) -> Tensor:
        even = UniformTimes(name="uniform")
        packs = [(keys[start:end], InStep(start, 64, 5)) for start, end in pairwise(cuts)]
        return torch.cat([times.draw(even, None, own, [1] * len(own), place=place) for own, place in packs])

    u = drawn([0, 64])
    assert torch.equal((u * 64).floor().sort().values, torch.arange(64, dtype=torch.float64))
    correlation = torch.corrcoef(torch.stack([u, torch.arange(64, dtype=torch.float64)]))[0, 1]
    assert abs(correlation) < 0.4  # 3 standard errors: samples lie in a step by their length, and t must not
    assert torch.equal(drawn([0, 5, 40, 64]), u)
    assert not torch.equal(times.uniforms(keys, InStep(0, 64, 6)), u)
    of_one = torch.cat([times.uniforms([i], InStep(3, 8, i)) for i in range(2500)])  # each alone is uniform
    assert kolmogorov_smirnov(of_one, of_one) < 1.63


def test_exponential_shift_is_that_of_flux() -> None:
    config = ExponentialShift(name="exponential")
    assert times.shift_of(256, config) == pytest.approx(math.exp(0.5))
    assert times.shift_of(4096, config) == pytest.approx(math.exp(1.15))
    assert times.shift_of(2176, config) == pytest.approx(math.exp(0.825))
    t = torch.tensor(0.3, dtype=torch.float64)
    assert float(times.shift(t, math.exp(0.8))) == pytest.approx(math.exp(0.8) / (math.exp(0.8) + (1 / 0.3 - 1)))


def test_schedules_visit_the_published_levels() -> None:
    edm = build_path(EDMPath(name="edm"))
    karras = 80 * times.schedule(5, 1.0, KarrasSteps(name="karras"), edm)
    expected = [(80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(5)] + [0.0]
    assert karras.tolist() == pytest.approx(expected, abs=1e-9)
    even = ExponentialSteps(name="exponential", sigma_min=0.02, sigma_max=50.0)
    for path in (edm, build_path(VPPath(name="vp"))):
        c = path.at(times.schedule(6, 1.0, even, path))
        assert (c.b / c.a).tolist() == pytest.approx([50 * (0.02 / 50) ** (i / 5) for i in range(6)] + [0.0], rel=1e-9)
    limit = KarrasSteps(name="karras", rho=1e6, sigma_min=0.02, sigma_max=50.0)
    torch.testing.assert_close(times.schedule(6, 1.0, limit, edm), times.schedule(6, 1.0, even, edm), atol=0, rtol=1e-4)
    trained = times.schedule(4, 1.0, TrainedSteps(name="trained"), trained=LogitNormalTimes(mean=0.5))
    assert trained[[0, -1]].tolist() == [1.0, 0.0]
    assert float(trained[2]) == pytest.approx(1 / (1 + math.exp(-0.5)))  # the median
    vp = build_path(VPPath(name="vp"))
    assert (1000 * times.schedule(3, 1.0, WholeSteps(name="whole"), vp)).tolist() == [1000.0, 667.0, 333.0, 0.0]
    assert (1000 * times.schedule(3, 1.0, WholeSteps(name="whole", first=True), vp)).tolist() == [1000.0, 501.0, 1.0, 0.0]
    with pytest.raises(UserError, match="vp path"):
        times.schedule(3, 1.0, WholeSteps(name="whole"))


SHORT_PATHS = {
    "ve to 50": build_path(VEPath(name="ve")),
    "vp to 37": build_path(VPPath(name="vp", schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)),
    "learned, 0.02 to 12": LearnedSchedule((-8.0, 5.0), 8).requires_grad_(False),
}


@pytest.mark.parametrize("config", [KarrasSteps(name="karras"), ExponentialSteps(name="exponential")], ids=lambda config: config.name)
@pytest.mark.parametrize("path", SHORT_PATHS.values(), ids=SHORT_PATHS)
def test_a_path_that_ends_before_the_steps_begin_is_visited_from_its_end(path: Path, config: KarrasSteps | ExponentialSteps) -> None:
    """Levels that repeat would be steps of no length, over which multistep samplers divide."""
    levels = times.schedule(20, 1.0, config, path)
    assert float(levels[0]) == 1
    assert float(levels[-1]) == 0
    assert all(low < high for high, low in pairwise(levels[:-1].tolist()))
    mixture = GaussianMixture(torch.tensor([[0.5]]), torch.tensor([0.5]), torch.tensor([1.0]), path)
    for sampler in ("dpmpp_2m", "dpmpp_2m_sde", "unipc"):
        sampling = SamplingConfig.model_validate({"sampler": sampler, "steps": 20, "schedule": config.model_dump()})
        drawn = sample(mixture, points(500), range(500), 1, sampling, 1.0, path)
        assert float(drawn.mean()) == pytest.approx(0.5, abs=0.1)
        assert float(drawn.std()) == pytest.approx(0.5, abs=0.1)


def test_steps_that_lie_beyond_the_path_are_refused() -> None:
    config = KarrasSteps(name="karras", sigma_min=51.0)
    with pytest.raises(UserError, match=r"sampling.schedule: got karras with sigma_min=51, expected less than 50"):
        times.schedule(20, 1.0, config, SHORT_PATHS["ve to 50"])
