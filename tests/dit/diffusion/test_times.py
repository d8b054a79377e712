import math

import pytest
import torch
from torch import Tensor

from dit.config.objective import LogitNormalTimes, TokenShift, UniformTimes
from dit.diffusion import times


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
