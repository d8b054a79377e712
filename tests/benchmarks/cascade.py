"""How much an upsampling stage adds to shapes of 8 x 8 pixels, and what noise on what it is told is worth when a first stage drew them.

python tests/benchmarks/cascade.py --steps 3000

Held-out shapes at 32 x 32 pixels. What the first stage draws is near a known picture, for it is drawn from one (SDEdit at 0.3).
"""

import argparse
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipelines import moving_shapes
from data_pipelines.packed import Grid, PackedLatents, pack_conditioning, patchify, unpack
from dit.config import SpatioTemporalDiTConfig
from dit.config.objective import LogitNormalTimes, RectifiedFlowConfig, SamplingConfig
from dit.diffusion import RECTIFIED_FLOW, Cascade, Objective, Regression, Upsampler, build_objective, levels, lowered, sample, vary
from dit.models import SpatioTemporalDiT, build_backbone

WHOLE, PIXEL, FACTOR, HEUN = (1, 4, 4), (1, 1, 1), 4, SamplingConfig(sampler="heun", steps=8)


def pictures(count: int, split: moving_shapes.Split) -> Tensor:
    """First frames of clips, (count, 3, 1, 32, 32) in [-1, 1]."""
    videos = [torch.from_numpy(moving_shapes.draw(1, i, split).video[:1]) for i in range(count)]
    return torch.stack([video.permute(3, 0, 1, 2) / 127.5 - 1 for video in videos])


def pack(data: Tensor, first_key: int, patch: Grid) -> PackedLatents:
    """data: (n, 3, 1, H, W)."""
    cond = pack_conditioning([(1, data.shape[3] // patch[1], data.shape[4] // patch[2])] * len(data), [torch.zeros(1, 4)] * len(data))
    keys = tuple(range(first_key, first_key + len(data)))
    return PackedLatents(torch.cat([patchify(part, patch) for part in data]), cond, keys, tuple(map(str, keys)), torch.ones(len(data)))


def objective() -> Regression:
    """Rectified flow at times of much noise, where what is told counts most."""
    config = RectifiedFlowConfig(condition_dropout=0.0, times=LogitNormalTimes(mean=1.0), stratified=True)
    built = build_objective(config, torch.zeros(1, 4), None)
    assert isinstance(built, Regression)
    return built


def train(stage: Objective, data: Tensor, patch: Grid, channels: int, steps: int) -> SpatioTemporalDiT:
    """A small backbone after `steps` steps of 16 pictures."""
    torch.manual_seed(0)
    config = SpatioTemporalDiTConfig(hidden_size=192, depth=3, num_heads=4, ffn_size=384, patch_size=patch)
    network = build_backbone(config, channels=channels, text_width=4)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50) * (1.02 - step / steps))
    for step in range(steps):
        batch = pack(data[torch.randint(0, len(data), (16,))], 16 * step, patch)
        optimizer.zero_grad()
        stage(network, batch, step / steps).per_sample.mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network.requires_grad_(False)


def psnr(found: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the mean over pictures in [-1, 1]."""
    return float((4 / (found.clamp(-1, 1) - truth).square().flatten(1).mean(1)).log10().mean() * 10)


def raised(network: SpatioTemporalDiT, low: PackedLatents, level: float) -> Tensor:
    """What a stage that is told `low` at `level` draws."""
    rows = torch.full((len(low.keys),), level, dtype=torch.float64)
    told = Upsampler(network, RECTIFIED_FLOW, WHOLE, low.tokens, rows, low.cond, low.keys)
    return torch.stack(unpack(sample(told, low.cond, low.keys, low.tokens.shape[1], HEUN, 1.0), low.cond, WHOLE))


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, required=True, help="of 16 pictures, of each of three networks")
    steps = parser.parse_args().steps
    data, held_out, shrink = pictures(2048, "train"), pictures(64, "held_out"), nn.AvgPool3d((1, FACTOR, FACTOR))
    truth = pack(held_out, 10**7, WHOLE)
    low = replace(truth, tokens=lowered(truth.tokens, truth.cond, WHOLE, FACTOR))

    def show(name: str, found: Tensor, true: Tensor = held_out) -> None:
        print(f"{name}: {psnr(found, true):.2f} dB", flush=True)

    show("bicubic", torch.stack(unpack(low.tokens, low.cond, WHOLE)))
    noised = train(Cascade(objective(), WHOLE, FACTOR, 0.3), data, WHOLE, 7, steps)
    sharp = raised(noised, low, 0.0)
    show("raised", sharp)
    show("raised, shrunk again", shrink(sharp), shrink(held_out))
    plain, small = train(Cascade(objective(), WHOLE, FACTOR, 0.0), data, WHOLE, 7, steps), pack(shrink(held_out), 0, PIXEL)

    def compare(name: str, given: Tensor) -> None:
        """What both stages make of small pictures (n, 3, 1, 8, 8) that are not those of the data."""
        wide = F.interpolate(given[:, :, 0], scale_factor=FACTOR, mode="bicubic")[:, :, None]
        told = replace(low, tokens=pack(wide, 0, WHOLE).tokens)
        show(name, given, shrink(held_out))
        show(f"{name}, bicubic", wide)
        for level in (0.0, 0.1, 0.2):
            show(f"{name}, raised, told at {level}", raised(noised, told, level))
        show(f"{name}, raised by one trained without noise", raised(plain, told, 0.0))

    for length in (steps, steps // 10):
        first = train(objective(), shrink(data), PIXEL, 3, length)
        drawn = vary(first, small.tokens, small.cond, small.keys, levels(HEUN, 1.0), HEUN, RECTIFIED_FLOW, 0.3)
        compare(f"first stage of {length} steps", torch.stack(unpack(drawn, small.cond, PIXEL)))
    noise = torch.randn(shrink(held_out).shape, generator=torch.Generator().manual_seed(0))
    compare("white noise of 0.2", shrink(held_out) + 0.2 * noise)


if __name__ == "__main__":
    main()
