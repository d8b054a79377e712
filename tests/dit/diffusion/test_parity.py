"""Whole trajectories against diffusers' schedulers, driven by the exact prediction of a mixture and the same noise.

Their tables are float32 and cancel (1 - abar_t / abar_(t-1) keeps four digits), so the peers are given the same table in float64:
formulas are compared, not rounding.
"""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from dit.config.objective import KarrasSteps
from dit.config.path import EDMPath, VPPath
from dit.diffusion import Path, ancestral, build_path, ddim, dpmpp_2m, euler, heun, schedule, unipc
from dit.diffusion.draws import noise_tokens
from dit.diffusion.ground_truth import GaussianMixture, points
from dit.diffusion.walk import ends_of

COUNT, CHAIN, SHORT, KEYS = 40, 1000, 200, list(range(40))
CONFIG = {"num_train_timesteps": CHAIN, "timestep_spacing": "trailing"}
PATHS = {
    "linear": VPPath(name="vp"),
    "scaled_linear": VPPath(name="vp", schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "squaredcos_cap_v2": VPPath(name="vp", schedule="cosine"),
}


def mixture(path: Path) -> GaussianMixture:
    means = torch.tensor([[1.2, 0.3], [-0.8, 0.9], [-0.2, -1.2]])
    return GaussianMixture(means, torch.tensor([0.25, 0.15, 0.3]), torch.tensor([0.3, 0.3, 0.4]), path)


def noise_of(truth: GaussianMixture, x: Tensor, t: float) -> Tensor:
    """The exact prediction of the noise at x (L, P)."""
    level = torch.full((len(x),), t, dtype=torch.float64)
    return ends_of(truth, truth.path, x.double(), level, points(len(x)))[1].to(x)


def levels_of(peer: Any, chain: int = CHAIN) -> Tensor:
    """Their timesteps 0 .. T - 1 as our levels: step i of a chain is t = i / T, i = 1 .. T; the last step ends at 0."""
    return torch.cat([(peer.timesteps.double() + 1) / chain, torch.zeros(1, dtype=torch.float64)])


def their_walk(peer: Any, path: Path, x: Tensor, **fresh: Callable[[int], Tensor]) -> Tensor:
    truth = mixture(path)
    for number, timestep in enumerate(peer.timesteps, start=1):
        given = {name: noise(number) for name, noise in fresh.items()}
        x = peer.step(noise_of(truth, x, (float(timestep) + 1) / CHAIN), timestep, x, **given).prev_sample
    return x


def start() -> Tensor:
    return torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(3)).double()


def exact(peer: Any, path: Path) -> Any:
    """The peer with the table of `path` in float64."""
    steps = len(peer.alphas_cumprod)
    peer.alphas_cumprod = path.at(torch.arange(1, steps + 1, dtype=torch.float64) / steps).a.square()
    return peer


def fresh_noise(purpose: str) -> Callable[[int], Tensor]:
    return lambda step: noise_tokens(KEYS, [1] * COUNT, 2, purpose, step).double()


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs.double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("schedule_name", PATHS)
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim(schedule_name: str, eta: float) -> None:
    config, path = PATHS[schedule_name], build_path(PATHS[schedule_name])
    betas = {"beta_start": config.beta_start, "beta_end": config.beta_end, "beta_schedule": schedule_name}
    peer = diffusers.DDIMScheduler(**CONFIG, **betas, clip_sample=False)
    exact(peer, path).set_timesteps(25)
    noise = fresh_noise("ddim noise")
    theirs = their_walk(peer, path, start(), eta=lambda step: eta, variance_noise=lambda step: noise(step) if eta else None)
    close(ddim(mixture(path), start(), levels_of(peer), points(COUNT), path, eta, KEYS), theirs)


@pytest.mark.parametrize("schedule_name", ["linear", "scaled_linear"])
def test_dpm_solver_and_unipc(schedule_name: str) -> None:
    config, path = PATHS[schedule_name], build_path(PATHS[schedule_name])
    options = {**CONFIG, "beta_start": config.beta_start, "beta_end": config.beta_end, "beta_schedule": schedule_name}
    options |= {"final_sigmas_type": "zero"}
    peer: Any = diffusers.DPMSolverMultistepScheduler(**options)
    exact(peer, path).set_timesteps(20)
    close(dpmpp_2m(mixture(path), start(), levels_of(peer), points(COUNT), path), their_walk(peer, path, start()))
    peer = diffusers.DPMSolverMultistepScheduler(**options, algorithm_type="sde-dpmsolver++")
    exact(peer, path).set_timesteps(20)
    theirs = their_walk(peer, path, start(), variance_noise=fresh_noise("sde noise"))
    close(dpmpp_2m(mixture(path), start(), levels_of(peer), points(COUNT), path, KEYS), theirs)
    for order in (1, 2, 3):
        peer = diffusers.UniPCMultistepScheduler(**options, solver_order=order)
        exact(peer, path).set_timesteps(20)
        close(unipc(mixture(path), start(), levels_of(peer), points(COUNT), path, order), their_walk(peer, path, start()))


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_ddpm(variance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole chain: of a shortened one diffusers adds noise at the last step too, onto t = 0, and we do not."""
    path = build_path(VPPath(name="vp", steps=SHORT))
    kind = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}[variance]
    peer = exact(diffusers.DDPMScheduler(num_train_timesteps=SHORT, variance_type=kind, clip_sample=False), path)
    peer.one = peer.one.double()
    peer.set_timesteps(SHORT)
    truth, between = mixture(path), torch.tensor([[0.4, -0.6]], dtype=torch.float64)
    fresh, step = fresh_noise("ancestral noise"), iter(range(1, SHORT + 1))
    module = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
    monkeypatch.setattr(module, lambda shape, **options: fresh(next(step)).reshape(shape))  # our noise in the place of theirs
    x = start()
    for timestep in peer.timesteps:
        answer = noise_of(truth, x, (float(timestep) + 1) / SHORT)
        if variance == "learned":
            answer = torch.cat([answer, between.expand(COUNT, 2)], dim=1)
        x = peer.step(answer, timestep, x).prev_sample

    def denoiser(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        velocity = truth(x_t, t, cond)
        return torch.cat([velocity, between.expand(COUNT, 2)], dim=1) if variance == "learned" else velocity

    close(ancestral(denoiser, start(), levels_of(peer, SHORT), points(COUNT), KEYS, path, variance), x)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", [euler, heun])
def test_edm(sampler: Callable[..., Tensor]) -> None:
    path = build_path(EDMPath(name="edm", sigma_data=0.5))
    times = schedule(18, 1.0, KarrasSteps(name="karras"), path)
    truth, cond = mixture(path), points(COUNT)
    x = 80 * start()
    if sampler is euler:
        peer: Any = diffusers.EDMEulerScheduler(sigma_data=0.5)
        peer.set_timesteps(18)
        torch.testing.assert_close(peer.sigmas.double(), 80 * times, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(peer.timesteps, path.label(times[:-1]).float(), atol=1e-5, rtol=0)  # c_noise = ln(sigma) / 4
    else:
        peer = diffusers.HeunDiscreteScheduler(use_karras_sigmas=True, beta_schedule="scaled_linear")
        peer.set_timesteps(18)
        times = torch.cat([peer.sigmas[:1], peer.sigmas[1:-1:2], peer.sigmas[-1:]]).double() / 80  # they list inner levels twice
    ours = sampler(truth, x, times, cond)
    for index, timestep in enumerate(peer.timesteps):
        sigma = float(peer.sigmas[index])
        level = torch.full((COUNT,), sigma / 80, dtype=torch.float64)
        noise = noise_of(truth, x, sigma / 80)
        answer = path.convert(noise, "noise", "edm", x, level, cond) if sampler is euler else noise
        peer.is_scale_input_called = True
        x = peer.step(answer, timestep, x).prev_sample
    close(ours, x)


def test_what_docs_say_is_different_there() -> None:
    """docs/decisions/0004: if one of these fails, diffusers has changed and the page must."""
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow.set_timesteps(20)
    least = flow.sigmas[-2]  # of a table from 1 / 1000 up: shifted once it is 0.0030
    assert float(least) == pytest.approx(0.0089, abs=1e-4)
    peer = diffusers.DDPMScheduler(**CONFIG, variance_type="fixed_large", clip_sample=False)
    peer.set_timesteps(50)
    zero, last = torch.zeros(1, 4000), peer.timesteps[-1]
    generator = torch.Generator().manual_seed(0)
    assert int(last) == 19
    assert float(peer.step(zero, last, zero, generator=generator).prev_sample.std()) > 0.05
