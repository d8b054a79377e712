from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import Tensor

from data_pipelines.packed import Conditioning, pack_conditioning
from dit.config.objective import SamplingConfig
from dit.config.path import VPPath
from dit.diffusion import ancestral, build_path, consistency, ddim, euler, heun, sample, schedule
from dit.diffusion.chain import posterior
from dit.diffusion.draws import noise_tokens
from dit.diffusion.ground_truth import GaussianMixture, points

MIXTURE = GaussianMixture(
    torch.tensor([[1.2, 0.3], [-0.8, 0.9], [-0.2, -1.2]]), torch.tensor([0.25, 0.15, 0.3]), torch.tensor([0.3, 0.3, 0.4])
)


def trajectory_of(sampler: Callable[..., Tensor], noise: Tensor, times: Tensor) -> list[Tensor]:
    states: list[Tensor] = []
    sampler(MIXTURE, noise, times, points(len(noise)), on_step=lambda step, x: states.append(x))
    return states


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_euler_walks_as_diffusers_given_our_levels(shift: float) -> None:
    noise, times, cond = torch.randn(50, 2), schedule(12, shift), points(50)
    peer = FlowMatchEulerDiscreteScheduler(shift=1.0)
    peer.set_timesteps(sigmas=times[:-1].tolist())
    x, walked = noise, []
    for timestep in peer.timesteps:
        velocity = MIXTURE(x, torch.full((50,), float(timestep) / 1000), cond)
        x = peer.step(velocity, timestep, x).prev_sample
        walked.append(x)
    for ours, theirs in zip(trajectory_of(euler, noise, times), walked, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_heun_walks_as_diffusers_on_their_levels() -> None:
    noise, cond = torch.randn(50, 2), points(50)
    peer = FlowMatchHeunDiscreteScheduler(shift=2.0)
    peer.set_timesteps(10)
    times = torch.cat([peer.sigmas[:1], peer.sigmas[1:-1:2], peer.sigmas[-1:]])  # they list inner levels twice
    x = noise
    for timestep in peer.timesteps:
        x = peer.step(MIXTURE(x, torch.full((50,), float(timestep) / 1000), cond), timestep, x).prev_sample
    torch.testing.assert_close(heun(MIXTURE, noise, times.double(), cond), x, atol=1e-5, rtol=0)


def test_heun_takes_two_calls_a_step_but_one_onto_the_data() -> None:
    levels: list[float] = []

    def record(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        levels.append(float(t[0]))
        return x_t

    heun(record, torch.randn(3, 2), schedule(3, 1.0), points(3))
    assert levels == pytest.approx([1, 2 / 3, 2 / 3, 1 / 3, 1 / 3])


def test_ddim_with_all_its_noise_on_neighbouring_steps_is_the_ancestral_sampler() -> None:
    path = build_path(VPPath(name="vp"))
    truth, x, keys = replace(MIXTURE, path=path), torch.randn(20, 2, dtype=torch.float64), list(range(20))
    for i in (1000, 500, 2):
        times = torch.tensor([i, i - 1], dtype=torch.float64) / 1000
        std = posterior(path, times[:1], times[1:]).small.sqrt()
        drawn = ddim(truth, x, times, points(20), path, 1.0, keys), ancestral(truth, x, times, points(20), keys, path)
        noises = (noise_tokens(keys, [1] * 20, 2, purpose, 1).double() for purpose in ("ddim noise", "ancestral noise"))
        means = [one - std * noise for one, noise in zip(drawn, noises, strict=True)]
        torch.testing.assert_close(means[0], means[1], atol=1e-10, rtol=0)
        assert (drawn[0] - x).abs().max() > 0


def exact_student(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """Velocity of the exact consistency function of data N(0.5, 0.3^2): f = 0.5 + 0.3 (x_t - (1-t) 0.5) / std(x_t)."""
    level = cond.per_token(t)[:, None]
    std = ((1 - level) ** 2 * 0.09 + level**2).sqrt()
    return (x_t - 0.5 - 0.3 * (x_t - (1 - level) * 0.5) / std) / level


def test_one_consistency_step_is_the_flow_map_and_more_keep_the_distribution() -> None:
    count = 4000
    cond, keys = points(count), list(range(count))
    noise = noise_tokens(keys, cond.lengths, 2, "start noise")
    torch.testing.assert_close(consistency(exact_student, noise, schedule(1, 1.0), cond, keys), 0.5 + 0.3 * noise, atol=1e-6, rtol=0)
    latents = consistency(exact_student, noise, schedule(3, 1.0), cond, keys)
    assert float(latents.mean()) == pytest.approx(0.5, abs=4 * 0.3 / (2 * count) ** 0.5)
    assert float(latents.std()) == pytest.approx(0.3, rel=4 / (4 * count) ** 0.5)
    assert abs(float(torch.corrcoef(torch.stack([latents.flatten(), noise.flatten()]))[0, 1])) < 0.9  # noise was fresh


@pytest.mark.parametrize("sampler", ["euler", "heun", "consistency"])
def test_a_sample_depends_on_its_own_key_only(sampler: str) -> None:
    grids, keys = [(1, 2, 1), (1, 1, 1), (2, 2, 1)], [11, 12, 13]
    sampling = SamplingConfig.model_validate({"sampler": sampler, "steps": 3})
    cond = pack_conditioning(grids, [torch.zeros(1, 4)] * 3)
    together = sample(MIXTURE, cond, keys, 2, sampling, 1.0).split(cond.lengths)
    for grid, key, expected in zip(grids, keys, together, strict=True):
        alone = sample(MIXTURE, pack_conditioning([grid], [torch.zeros(1, 4)]), [key], 2, sampling, 1.0)
        torch.testing.assert_close(alone, expected, atol=1e-6, rtol=0)
    assert not torch.equal(sample(MIXTURE, cond, [21, 22, 23], 2, sampling, 1.0), torch.cat(together))


def test_samplers_differ_and_the_shift_of_the_config_wins() -> None:
    cond, keys = points(5), [1, 2, 3, 4, 5]

    def draw(sampler: str, shift: float | None, default_shift: float) -> Tensor:
        sampling = SamplingConfig.model_validate({"sampler": sampler, "steps": 4, "shift": shift})
        return sample(MIXTURE, cond, keys, 2, sampling, default_shift)

    assert torch.equal(draw("euler", 3.0, 1.0), draw("euler", None, 3.0))
    assert torch.equal(draw("euler", 3.0, 1.0), draw("euler", 3.0, 9.0))
    assert not torch.equal(draw("euler", None, 1.0), draw("euler", None, 3.0))
    noise = noise_tokens(keys, cond.lengths, 2, "start noise")
    assert torch.equal(draw("euler", None, 1.0), euler(MIXTURE, noise, schedule(4, 1.0), cond))
    assert torch.equal(draw("heun", None, 1.0), heun(MIXTURE, noise, schedule(4, 1.0), cond))
    assert torch.equal(draw("consistency", None, 1.0), consistency(MIXTURE, noise, schedule(4, 1.0), cond, keys))


def test_every_row_of_a_sample_gets_its_level() -> None:
    cond = replace(points(2), rows=torch.tensor([0, 1]))
    cond = replace(cond, grids=((1, 2, 1),), text=cond.text[:1], text_lengths=(1,))  # one sample of two tokens at two rows
    seen: list[int] = []

    def record(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        seen.append(len(t))
        return cond.per_token(t)[:, None].expand_as(x_t)

    noise = torch.zeros(2, 3)
    torch.testing.assert_close(euler(record, noise, schedule(4, 1.0), cond), noise - 0.625)  # the left Riemann sum of t
    assert seen == [2] * 4
