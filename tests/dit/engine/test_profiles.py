"""Power-function averages against their closed forms, and reconstructed widths against averages that were really kept."""

import math

import pytest
import torch

from dit.config.engine import EMAConfig
from dit.engine.optimizer import ema_betas
from dit.engine.profiles import combination, gamma_of

STEPS, EVERY = 4000, 250


def test_exponents_of_the_paper() -> None:
    assert [gamma_of(width) for width in (0.05, 0.1)] == pytest.approx([16.97, 6.94], abs=0.005)  # arXiv:2312.02696, section 3.1


@pytest.mark.parametrize("width", [0.02, 0.1, 0.25])
def test_the_profile_has_the_width_it_is_named_after(width: float) -> None:
    gamma = gamma_of(width)
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)  # moments of (gamma + 1) t^gamma on [0, 1]
    assert math.sqrt(square - mean**2) == pytest.approx(width, rel=1e-9)


def test_the_running_average_has_the_profile() -> None:
    gamma, average = gamma_of(0.1), 7.0  # where it started from is forgotten at once
    for k in range(1, STEPS + 1):
        beta = ema_betas(EMAConfig(sigma_rel=(0.1,)), k)["ema_0.1"]
        average = beta * average + (1 - beta) * k**2
    assert average / STEPS**2 == pytest.approx((gamma + 1) / (gamma + 3), rel=1e-3)  # one step is 1 / 4000 of the time


@pytest.mark.parametrize("width", [0.03, 0.07, 0.15])
def test_any_width_is_reconstructed_from_two(width: float) -> None:
    torch.manual_seed(0)
    path = (torch.randn(STEPS, 64, dtype=torch.float64)).cumsum(0) / STEPS**0.5  # a random walk, as weights are under noise
    kept, averages = [], {name: torch.zeros(64, dtype=torch.float64) for name in ("ema_0.05", "ema_0.1", f"ema_{width:g}")}
    snapshots = []
    for k, weights in enumerate(path, start=1):
        for name, beta in ema_betas(EMAConfig(sigma_rel=(0.05, 0.1, width)), k).items():
            if name in averages:
                averages[name] = beta * averages[name] + (1 - beta) * weights
        if k % EVERY == 0:
            for name in ("ema_0.05", "ema_0.1"):
                kept.append((gamma_of(float(name[4:])), k))
                snapshots.append(averages[name])
    wanted = averages[f"ema_{width:g}"]
    built = sum(x * snapshot for x, snapshot in zip(combination(kept, (gamma_of(width), STEPS)), snapshots, strict=True))
    nearest = min(float((averages[name] - wanted).norm()) for name in ("ema_0.05", "ema_0.1"))
    assert float((built - wanted).norm()) < 0.15 * nearest


def test_a_width_that_was_kept_is_itself() -> None:
    kept = [(gamma_of(width), time) for time in (100, 200) for width in (0.05, 0.1)]
    assert combination(kept, (gamma_of(0.1), 200)) == pytest.approx([0, 0, 0, 1], abs=1e-6)
