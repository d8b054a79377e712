"""The upsampling stage: against the exact conditional of Gaussian data, and on procedural shapes."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from data_pipelines import moving_shapes
from data_pipelines.packed import Conditioning, Grid, PackedLatents, pack_conditioning, patchify, unpack
from dit.config.objective import RectifiedFlowConfig, SamplingConfig
from dit.diffusion import (
    RECTIFIED_FLOW,
    Cascade,
    ClassifierFreeGuidance,
    Objective,
    Regression,
    Upsampler,
    build_objective,
    levels,
    lowered,
    sample,
    vary,
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


# --- procedural shapes --------------------------------------------------------------------------------------------

SIDE, FACTOR, HEUN = (1, 4, 4), 4, SamplingConfig(sampler="heun", steps=8)


class Local(nn.Module):
    """A few convolutions over square pictures, told t: seconds instead of the minutes that a transformer needs to find what is near."""

    def __init__(self, channels: int, patch: Grid, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = patch
        spread = (1, 2, 4, 2, 1)
        self.first = nn.Conv2d(channels + 1, width, 3, padding=1)
        self.middle = nn.ModuleList(nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation) for dilation in spread)
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        one = {"ph": self.patch[1], "pw": self.patch[2]}
        square = {"n": len(t), "h": cond.grids[0][1]}
        sizes = [one["ph"] * one["pw"] * channels for channels in (3, 3, 1)] if x.shape[1] > 3 * one["ph"] * one["pw"] else [x.shape[1]]
        planes = [rearrange(part, "(n h w) (ph pw c) -> n c (h ph) (w pw)", **one, **square) for part in x.split(sizes, dim=1)]
        y = torch.cat([*planes, t.view(-1, 1, 1, 1).expand_as(planes[0][:, :1])], dim=1)
        y = F.silu(self.first(y))
        for layer in self.middle:
            y = y + F.silu(layer(y))
        return rearrange(self.last(y), "n c (h ph) (w pw) -> (n h w) (ph pw c)", **one)


def pictures(count: int, split: moving_shapes.Split) -> Tensor:
    """First frames of clips, (count, 3, 1, 32, 32) in [-1, 1]."""
    videos = [torch.from_numpy(moving_shapes.draw(1, i, split).video[:1]) for i in range(count)]
    return torch.stack([video.permute(3, 0, 1, 2) / 127.5 - 1 for video in videos])


def train(stage: Objective, network: Local, data: Tensor, steps: int) -> Local:
    """The network after `steps` steps of 16 pictures."""
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        batch = pack(list(data[torch.randint(0, len(data), (16,))]), 16 * step, network.patch)
        optimizer.zero_grad()
        stage(network, batch, step / steps).per_sample.mean().backward()
        optimizer.step()
        decay.step()
    return network.requires_grad_(False)


def psnr(found: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the mean over pictures in [-1, 1]."""
    return float((4 / (found.clamp(-1, 1) - truth).square().flatten(1).mean(1)).log10().mean() * 10)


def raised(network: Local, low: PackedLatents, level: float) -> Tensor:
    levels = torch.full((len(low.keys),), level, dtype=torch.float64)
    told = Upsampler(network, RECTIFIED_FLOW, SIDE, low.tokens, levels, low.cond, low.keys)
    return torch.stack(unpack(sample(told, low.cond, low.keys, 48, HEUN, 1.0), low.cond, SIDE))


@pytest.mark.slow
def test_a_stage_adds_detail_to_shapes_and_noise_on_what_it_is_told_hides_the_errors_of_the_stage_before() -> None:
    """Held-out shapes, 8 x 8 to 32 x 32. What the first stage draws is near a known picture, for it is drawn from one (SDEdit)."""
    data, held_out = pictures(1024, "train"), pictures(128, "held_out")
    shrink = nn.AvgPool3d((1, FACTOR, FACTOR))
    truth = pack(list(held_out), 10**7, SIDE)
    low = replace(truth, tokens=lowered(truth.tokens, truth.cond, SIDE, FACTOR))
    stages = {most: train(Cascade(objective(), SIDE, FACTOR, most), Local(7, SIDE), data, 1000) for most in (0.3, 0.0)}
    first = train(objective(), Local(3, (1, 1, 1)), shrink(data), 1000)
    small = pack(list(shrink(held_out)), 0, (1, 1, 1))
    drawn = vary(first, small.tokens, small.cond, small.keys, levels(HEUN, 1.0), HEUN, RECTIFIED_FLOW, 0.3)
    generated = torch.stack(unpack(drawn, small.cond, (1, 1, 1)))
    wide = F.interpolate(generated[:, :, 0], scale_factor=FACTOR, mode="bicubic")[:, :, None]
    given = replace(low, tokens=pack(list(wide), 0, SIDE).tokens)
    sharp = raised(stages[0.3], low, 0.0)
    found = {
        "bicubic": psnr(torch.stack(unpack(low.tokens, low.cond, SIDE)), held_out),
        "raised": psnr(sharp, held_out),
        "raised and shrunk": psnr(shrink(sharp), shrink(held_out)),
        "first stage": psnr(generated, shrink(held_out)),
        "first stage, bicubic": psnr(wide, held_out),
        "first stage raised, no noise in training": psnr(raised(stages[0.0], given, 0.0), held_out),
        **{f"first stage raised, told at {level}": psnr(raised(stages[0.3], given, level), held_out) for level in (0.0, 0.1, 0.2)},
    }
    print("\n".join(f"{name}: {value:.2f} dB" for name, value in found.items()))
    assert found["raised and shrunk"] > 30
    assert found["raised"] > found["bicubic"] + 3
    assert found["first stage raised, told at 0.1"] > found["first stage raised, no noise in training"] + 0.3
