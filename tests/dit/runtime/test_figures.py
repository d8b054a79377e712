"""Intervals against published values, closed forms, and their own promise: 95 of 100 hold the truth."""

import numpy as np
import pytest
import torch

from dit.runtime.figures import Figure, clustered_rate, jackknife_figure, mean_figure, rate_figure, student


def test_wilson_intervals_match_published_values() -> None:
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    for successes, count, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        figure = rate_figure(successes / count, count)
        np.testing.assert_allclose((figure.low, figure.high), (low, high), atol=6e-5)
    with pytest.raises(ValueError):
        rate_figure(0.5, 0)


def test_a_rate_lies_within_its_interval() -> None:
    for count in range(1, 200):
        for rate in (0.0, 1.0):
            figure = rate_figure(rate, count)
            assert figure.low is not None
            assert figure.high is not None
            assert 0 <= figure.low <= rate <= figure.high <= 1


def test_quantiles_of_student_match_the_tables() -> None:
    # Abramowitz & Stegun, table 26.10.
    for freedom, quantile in [(1, 12.706), (5, 2.571), (6, 2.447), (10, 2.228), (19, 2.093), (60, 2.000), (120, 1.980)]:
        assert student(freedom) == pytest.approx(quantile, abs=6e-4)


def test_a_mean_has_its_interval() -> None:
    figure = mean_figure(torch.tensor([1.0, 2.0, 3.0]))
    half = 4.3027 / 3**0.5
    assert (figure.value, figure.low, figure.high, figure.count) == (2.0, pytest.approx(2 - half), pytest.approx(2 + half), 3)
    assert mean_figure(torch.tensor([5.0])) == Figure(5.0, None, None, 1)


def test_values_of_one_caption_count_once() -> None:
    values = torch.tensor([1.0, 1.2, 2.0, 1.8, 3.0, 3.2])
    alone, together = mean_figure(torch.tensor([1.1, 1.9, 3.1])), mean_figure(values, 2)
    assert (together.low, together.high, together.count) == (pytest.approx(alone.low), pytest.approx(alone.high), 6)
    assert mean_figure(values, 6).low is None


def test_a_rate_of_clips_that_are_alike_has_the_interval_of_as_many_captions() -> None:
    right = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1, 1, 0] * 4)
    alike = clustered_rate(right.repeat_interleave(4), 4)
    assert (alike.low, alike.high) == pytest.approx((rate_figure(0.7, 40).low, rate_figure(0.7, 40).high), abs=2e-3)
    assert alike.count == 160
    assert clustered_rate(right, 1) == rate_figure(0.7, 40)
    apart = clustered_rate((torch.rand(4000, generator=torch.Generator().manual_seed(0)) < 0.7).float(), 4)
    assert apart.high is not None
    assert apart.low is not None
    assert apart.high - apart.low == pytest.approx(2 * 1.96 * (0.21 / 4000) ** 0.5, rel=0.1)
    alike = clustered_rate(torch.ones(40), 4)
    assert (alike.low, alike.high, alike.count) == (rate_figure(1.0, 10).low, 1.0, 40)


def test_the_jackknife_leaves_captions_whole() -> None:
    x = torch.randn(60, generator=torch.Generator().manual_seed(0)).double().repeat_interleave(4)
    figure = jackknife_figure(lambda a: float(a.mean()), x, unit=4)
    means = x[::4].view(20, 3).mean(1)
    assert figure.high is not None
    assert figure.high - figure.value == pytest.approx(student(19) * float(means.var() / 20) ** 0.5)
    few = jackknife_figure(lambda a: float(a.mean()), x[:40], unit=8)
    assert few.high is not None
    assert few.high - few.value == pytest.approx(student(4) * float(x[:40].view(5, 8).mean(1).var() / 5) ** 0.5)
    assert jackknife_figure(lambda a: float(a.mean()), x[:40], unit=40).low is None


def test_the_jackknife_of_a_difference_of_means_is_its_standard_error() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(400, generator=generator).double(), 2 * torch.randn(1000, generator=generator).double()
    figure = jackknife_figure(lambda a, b: float(a.mean() - b.mean()), x, y)
    groups = x.view(20, -1).mean(1) - y.view(20, -1).mean(1)  # of equal size: exactly the spread of the groups' differences
    assert figure.value == pytest.approx(float(x.mean() - y.mean()))
    assert figure.high is not None
    assert figure.high - figure.value == pytest.approx(student(19) * float(groups.var() / 20) ** 0.5)


def test_what_two_sets_have_in_common_cancels() -> None:
    common, own = (torch.randn(2, 400, generator=torch.Generator().manual_seed(seed)).double() for seed in (0, 1))
    paired = jackknife_figure(lambda a, b: float(a.mean() - b.mean()), common[0] + 0.01 * own[0], common[0] + 0.01 * own[1])
    apart = jackknife_figure(lambda a, b: float(a.mean() - b.mean()), common[0], common[1])
    assert paired.high is not None
    assert apart.high is not None
    assert paired.high - paired.value < 0.05 * (apart.high - apart.value)


def test_the_jackknife_holds_the_truth_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(200):
        x = torch.randn(100, generator=torch.Generator().manual_seed(seed)).double()
        figure = jackknife_figure(lambda a: float(a.var().log()), x)
        assert figure.low is not None
        assert figure.high is not None
        hits += figure.low <= 0 <= figure.high
    assert 180 <= hits <= 199  # binomial of 200 at 0.95: 190 +- 3.1


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="got 39 samples, expected at least 40"):
        jackknife_figure(lambda a: 0.0, torch.zeros(39))
