"""The upsampling stage: against the exact conditional of Gaussian data, and on procedural shapes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.packed import Conditioning, Grid, PackedLatents, pack_conditioning, patchify, unpack
from dit.config.objective import RectifiedFlowConfig, SamplingConfig
from dit.diffusion import (
    RECTIFIED_FLOW,
    Cascade,
    ClassifierFreeGuidance,
    Regression,
    Upsampler,
    build_objective,
    lowered,
    sample,
)

PATCH = (1, 2, 2)
COVARIANCE = 0.3 * torch.eye(4, dtype=torch.float64) + 0.7
MEAN = torch.full((4, 4), 0.25, dtype=torch.float64)


def objective() -> Regression:
    built = build_objective(RectifiedFlowConfig(condition_dropout=0.0), torch.zeros(1, 4), None)
    assert isinstance(built, Regression)
    return built


def pack(latents: list[Tensor], first_key: int, patch: Grid = PATCH) -> PackedLatents:
    """One sample of each of `latents` (C, T, H, W)."""
    grids = [(part.shape[1] // patch[0], part.shape[2] // patch[1], part.shape[3] // patch[2]) for part in latents]
    cond, keys = pack_conditioning(grids, [torch.zeros(1, 4)] * len(grids)), tuple(range(first_key, first_key + len(grids)))
    return PackedLatents(torch.cat([patchify(part, patch) for part in latents]), cond, keys, tuple(map(str, keys)), torch.ones(len(grids)))


def of_one_token(count: int, first_key: int) -> PackedLatents:
    """Squares of 2 x 2 numbers, N(0, COVARIANCE)."""
    x = torch.randn(count, 4, dtype=torch.float64) @ torch.linalg.cholesky(COVARIANCE).T
    return pack(list(x.float().view(count, 1, 1, 2, 2)), first_key)


def posterior(x_t: Tensor, t: Tensor, low: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (n, 4) and precision (n, 4, 4) of the latents given x_t (n, 4) at t (n, 1) and their noised mean `low` (n, 4) at s (n, 1)."""
    one = torch.eye(4, dtype=torch.float64)
    precision = torch.linalg.inv(COVARIANCE) + ((1 - t) / t).square()[..., None] * one + ((1 - s) / s).square()[..., None] * MEAN @ MEAN
    told = (1 - t) / t.square() * x_t + (1 - s) / s.square() * low @ MEAN
    return torch.linalg.solve(precision, told), precision


def exact(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    x_t, low, level = x.double().split(4, dim=1)
    assert (level == level[:, :1]).all()
    t = cond.per_token(t).double()[:, None]
    velocity = (x_t - posterior(x_t, t, low, level[:, :1])[0]) / t
    return torch.cat([velocity, torch.full_like(x[:, 4:], torch.nan)], dim=1).to(x.dtype)  # what it says of the rest does not count


def test_what_is_left_at_a_lower_resolution() -> None:
    sizes = [(3, 1, 8, 4), (3, 2, 4, 12)]
    latents, factor = [torch.randn(size) for size in sizes], 2
    batch = pack(latents, 0)
    for found, whole in zip(unpack(lowered(batch.tokens, batch.cond, PATCH, factor), batch.cond, PATCH), latents, strict=True):
        for frame in range(whole.shape[1]):
            means = whole[:, frame].unfold(1, factor, factor).unfold(2, factor, factor).mean((-1, -2))
            expected = F.interpolate(means[None], scale_factor=factor, mode="bicubic")[0]
            torch.testing.assert_close(found[:, frame], expected)
    flat = pack([torch.full((3, 1, 8, 8), 0.4)], 0)
    torch.testing.assert_close(lowered(flat.tokens, flat.cond, PATCH, 4), flat.tokens)
    with pytest.raises(ValueError, match="8 x 4 are not multiples of 3"):
        lowered(batch.tokens, batch.cond, PATCH, 3)


def test_the_exact_stage_draws_the_conditional_given_a_noised_lower_resolution() -> None:
    count, s = 2000, 0.4
    batch = of_one_token(1, 3)
    low = lowered(batch.tokens, batch.cond, PATCH, 2).double().expand(count, 4)
    cond = pack_conditioning([(1, 1, 1)] * count, [torch.zeros(1, 4)] * count)
    up = Upsampler(exact, RECTIFIED_FLOW, PATCH, low, torch.full((count,), s, dtype=torch.float64), cond, [9] * count)  # one noise
    drawn = sample(up, cond, range(count), 4, SamplingConfig(sampler="heun", steps=20), 1.0).double()
    level, end = torch.full((1, 1), s, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    mean, precision = posterior(torch.zeros(1, 4, dtype=torch.float64), end, up.beside[:1, :4].double(), level)
    covariance = precision.inverse()
    assert (drawn.mean(0) - mean[0]).abs().max() < 4 * (covariance[0].diagonal().max() / count) ** 0.5
    torch.testing.assert_close(drawn.T.cov(), covariance[0], atol=0.09, rtol=0)  # 4 standard errors
    assert covariance[0].diagonal().max() < 0.75  # of 1.0 without what it is told


def test_the_exact_stage_has_the_least_loss_and_draws_do_not_depend_on_the_pack() -> None:
    batch, stage = of_one_token(3000, 0), Cascade(objective(), PATCH, 2, 0.5)

    def told(x: Tensor, low: float = 1.0, level: float = 1.0) -> Tensor:
        return torch.cat([x[:, :4], low * x[:, 4:8], level * x[:, 8:]], dim=1)

    losses = stage(exact, batch, 0.0)
    assert losses.per_sample.shape == (3000,)
    for changed in ({"low": 0.8}, {"low": 1.2}, {"low": -1.0}, {"level": 0.7}, {"level": 1.4}):
        wrong = stage(lambda x, t, cond, c=changed: exact(told(x, **c), t, cond), batch, 0.0)
        assert float(losses.per_sample.mean()) < float(wrong.per_sample.mean())
    alone = stage(exact, pack([unpack(batch.tokens, batch.cond, PATCH)[7]], 7), 0.0)
    torch.testing.assert_close(alone.per_sample, losses.per_sample[7:8])


def test_levels_are_even_up_to_the_most_and_told() -> None:
    seen: list[Tensor] = []
    Cascade(objective(), PATCH, 2, 0.3)(lambda x, t, cond: (seen.append(x), x)[1], of_one_token(2000, 0), 0.0)
    level = seen[0][:, 8]
    assert 0 <= float(level.min()) < 0.01
    assert 0.29 < float(level.max()) <= 0.3
    assert float(level.mean()) == pytest.approx(0.15, abs=0.01)


def test_guidance_asks_an_upsampler_for_both_conditions_at_once() -> None:
    batch, seen = of_one_token(3, 0), []
    up = Upsampler(lambda x, t, cond: (seen.append(x), x)[1], RECTIFIED_FLOW, PATCH, batch.tokens, torch.zeros(3), batch.cond, batch.keys)
    x_t = torch.randn(3, 4)
    guided = ClassifierFreeGuidance(up, torch.zeros(1, 4), 3.0, None)(x_t, torch.rand(3), batch.cond)
    torch.testing.assert_close(guided, x_t)
    torch.testing.assert_close(seen[0][:, 4:8], batch.tokens.repeat(2, 1))
