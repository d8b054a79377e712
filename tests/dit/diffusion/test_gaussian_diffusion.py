"""The chain against numbers that facebookresearch/DiT computes, which are committed beside this file: tables, reverse steps, losses."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dit.config.objective import DDPMConfig, WholeSteps
from dit.config.path import VPPath
from dit.diffusion import DDPM, ancestral, build_objective, build_path, schedule
from dit.diffusion.chain import posterior
from dit.diffusion.ddpm import bound_terms, prior_bits
from dit.diffusion.denoiser import Predicting
from dit.diffusion.draws import noise_tokens
from dit.diffusion.ground_truth import pack_of_points, points
from dit.diffusion.objectives import noised
from dit.diffusion.paths import VariancePreserving

LINES = Path(__file__).with_name("gaussian_diffusion.csv").read_text().splitlines()
THEIRS = {name: torch.tensor([float(v) for v in row], dtype=torch.float64) for name, *row in (s.split(",") for s in LINES if s[0] != "#")}
PLACE = torch.arange(8, dtype=torch.float64).view(4, 2)
LATENTS, NOISE, STEPS = torch.sin(PLACE + 1), torch.cos(2 * PLACE), torch.tensor([1, 2, 501, 1000], dtype=torch.float64)
FIRST = WholeSteps(name="whole", first=True)


def chain(name: str = "linear", steps: int = 1000) -> VariancePreserving:
    path = build_path(VPPath.model_validate({"name": "vp", "schedule": name, "steps": steps}))
    assert isinstance(path, VariancePreserving)
    return path


def network(x: Tensor, t: Tensor, cond: object) -> Tensor:
    return torch.cat([0.7 * x + 0.1 * torch.sin(3 * PLACE), torch.cos(PLACE) / 2], dim=1)


@pytest.mark.parametrize("steps", [1000, 50])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_tables(name: str, steps: int) -> None:
    """Of the whole chain and of one of fewer steps, at five timesteps and in their sum over all."""
    path, t = chain(name), schedule(steps, 1.0, FIRST, chain(name)).flip(0)
    back = posterior(path, t[1:], t[:-1])
    ours = {
        "betas": back.large,
        "alphas_cumprod": path.at(t[1:]).a.square(),
        "posterior_variance": back.small,
        "posterior_log_variance_clipped": torch.cat([back.small[1:2], back.small[1:]]).log(),
        "posterior_mean_coef1": back.of_latents,
        "posterior_mean_coef2": back.of_x,
    }
    for table, values in ours.items():
        found = torch.cat([values[[0, 1, steps // 2, -2, -1]], values.sum()[None]])
        torch.testing.assert_close(found, THEIRS[f"{name}/{steps}/{table}"], atol=1e-10, rtol=1e-13)


@pytest.mark.parametrize("key", [name for name in THEIRS if name.startswith("space")])
def test_steps_of_a_shortened_chain(key: str) -> None:
    steps, count = (int(part) for part in key.split("/")[1:])
    timesteps = (schedule(count, 1.0, FIRST, chain(steps=steps))[:-1] * steps).flip(0) - 1
    assert (timesteps.diff() > 0).all()
    assert float((torch.arange(1, count + 1) * timesteps).sum()) == pytest.approx(float(THEIRS[key]), abs=1e-6)


@pytest.mark.parametrize("variance", ["learned", "large", "small"])
def test_reverse_steps_and_the_terms_of_the_bound(variance: str) -> None:
    """At i = 1 they price bytes of pixels, with the variance of i = 2 for `large`, and we the density of latents: left out."""
    path, batch = chain(), pack_of_points(LATENTS, 0)
    x_t = path.interpolate(LATENTS, NOISE, STEPS / 1000, points(4))
    answer = network(x_t, STEPS, None)[:, : 4 if variance == "learned" else 2]
    bits = bound_terms(path, answer, "noise", variance, batch, x_t, STEPS)  # type: ignore[arg-type]
    torch.testing.assert_close(bits[1:].double(), THEIRS[f"{variance}/vb"][1:], atol=1e-7, rtol=1e-6)  # we mean in float32
    keys, mean = list(range(4)), THEIRS["mean"].view(4, 2)
    log_var = THEIRS[f"{variance}/log_variance"].view(4, -1)
    for place in range(4):
        times = torch.stack([STEPS[place], STEPS[place] - 1]) / 1000
        denoiser = Predicting(network, path, "noise")
        x = ancestral(denoiser, x_t.double(), times, points(4), keys, path, variance)[place]  # type: ignore[arg-type]
        fresh = noise_tokens(keys, [1] * 4, 2, "ancestral noise", 1)[place].double() if place else 0.0  # none at i = 1
        torch.testing.assert_close(x, mean[place] + (log_var[place] / 2).exp() * fresh, atol=1e-9, rtol=0)  # da / dt is steep near 0


def test_latents_losses_and_the_prior() -> None:
    path, batch = chain(), pack_of_points(LATENTS, 0)
    t, cond = STEPS / 1000, batch.cond
    x_t = path.interpolate(LATENTS, NOISE, t, cond)
    answer = network(x_t, STEPS, None)[:, :2]
    found = path.convert(answer, "noise", "latents", x_t, t, cond)
    torch.testing.assert_close(found, THEIRS["pred_xstart"].view(4, 2), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(cond.per_sample((answer - NOISE).square()).double(), THEIRS["mse"], atol=1e-7, rtol=0)
    torch.testing.assert_close(prior_bits(path, LATENTS, cond).double(), THEIRS["prior"], atol=1e-10, rtol=0)


def test_the_objective_adds_the_same_two_terms_at_a_step_it_draws() -> None:
    config = DDPMConfig.model_validate({"name": "ddpm", "variance": "learned", "condition_dropout": 0})  # 1e-3 x 1000 steps = 1
    objective, batch = build_objective(config, torch.zeros(1, 4), None), pack_of_points(LATENTS, 0)
    assert isinstance(objective, DDPM)
    losses = objective(network, batch, 0.0)
    x_t, noise, _ = noised(batch, losses.t, objective.path)
    answer, steps = network(x_t, losses.t, None), (losses.t.double() * 1000).round()
    simple = batch.cond.per_sample((answer[:, :2] - noise).square())
    bits = bound_terms(objective.path, answer, "noise", "learned", batch, x_t, steps)
    torch.testing.assert_close(losses.per_sample, (simple + bits).float(), atol=1e-5, rtol=1e-5)
