"""From noise to latents. A sampler is a function of a denoiser, start noise and the levels to visit.

`times` is (steps + 1,), falling; x keeps the dtype of the noise and the network sees t in the same dtype. Must not know
guidance: a guided denoiser is a denoiser.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import assert_never

import torch
from torch import Tensor

from data_pipelines.packed import Conditioning
from dit.config.objective import SamplingConfig
from dit.diffusion.denoiser import Denoiser
from dit.diffusion.draws import noise_tokens
from dit.diffusion.paths import interpolate, latents_of
from dit.diffusion.times import schedule

OnStep = Callable[[int, Tensor], None]
"""Called after each step with the number of steps done and x (L, P)."""


def euler(denoiser: Denoiser, noise: Tensor, times: Tensor, cond: Conditioning, on_step: OnStep | None = None) -> Tensor:
    """Follow the flow from `noise` (L, P) at times[0] to times[-1] by Euler's rule: first order, one call a step."""
    x = noise
    for step, (t, t_next) in enumerate(_intervals(x, times, cond), start=1):
        x = x + _per_token(cond, t_next - t) * euler_slope(denoiser, x, t, t_next, cond)
        if on_step:
            on_step(step, x)
    return x


def heun(denoiser: Denoiser, noise: Tensor, times: Tensor, cond: Conditioning, on_step: OnStep | None = None) -> Tensor:
    """Follow the flow by Heun's rule: second order, two calls a step (Karras et al. 2022, arXiv:2206.00364, algorithm 1).

    A step onto t = 0 is a plain Euler step: networks are hardly trained at t = 0, and one such step keeps the order.
    """
    x = noise
    for step, (t, t_next) in enumerate(_intervals(x, times, cond), start=1):
        slope = euler_slope if times[step] == 0 else heun_slope
        x = x + _per_token(cond, t_next - t) * slope(denoiser, x, t, t_next, cond)
        if on_step:
            on_step(step, x)
    return x


def euler_slope(denoiser: Denoiser, x: Tensor, t: Tensor, t_next: Tensor, cond: Conditioning) -> Tensor:
    """Mean velocity (L, P) between t and t_next (R,) by Euler's rule: that at t."""
    return denoiser(x, t, cond).to(x.dtype)


def heun_slope(denoiser: Denoiser, x: Tensor, t: Tensor, t_next: Tensor, cond: Conditioning) -> Tensor:
    """Mean velocity (L, P) between t and t_next (R,) by Heun's rule: that of both ends."""
    first = denoiser(x, t, cond).to(x.dtype)
    second = denoiser(x + _per_token(cond, t_next - t) * first, t_next, cond).to(x.dtype)
    return (first + second) / 2


def consistency(
    denoiser: Denoiser, noise: Tensor, times: Tensor, cond: Conditioning, keys: Sequence[int], on_step: OnStep | None = None
) -> Tensor:
    """Predict the latents, noise them afresh to the next level, repeat (Song et al. 2023, arXiv:2303.01469, algorithm 1).

    keys: one random key a sample, from which the fresh noise of each step is drawn.
    """
    x = noise
    for step, (t, t_next) in enumerate(_intervals(x, times, cond), start=1):
        latents = latents_of(x, denoiser(x, t, cond).to(x.dtype), _per_token(cond, t))
        fresh = noise_tokens(keys, cond.lengths, x.shape[1], "consistency noise", step).to(x)
        x = interpolate(latents, fresh, _per_token(cond, t_next))
        if on_step:
            on_step(step, x)
    return x


@torch.no_grad()
def sample(
    denoiser: Denoiser, cond: Conditioning, keys: Sequence[int], token_channels: int, sampling: SamplingConfig, default_shift: float
) -> Tensor:
    """Draw latents tokens (L, token_channels) for `cond`, on its device; each sample depends on its own key only.

    denoiser: guided already, where `sampling.guidance` asks for it. default_shift: the shift k where `sampling` has none.
    """
    noise = noise_tokens(keys, cond.lengths, token_channels, "start noise").to(cond.text.device)
    times = schedule(sampling.steps, default_shift if sampling.shift is None else sampling.shift)
    match sampling.sampler:
        case "euler":
            return euler(denoiser, noise, times, cond)
        case "heun":
            return heun(denoiser, noise, times, cond)
        case "consistency":
            return consistency(denoiser, noise, times, cond, keys)
        case _:
            assert_never(sampling.sampler)


def _intervals(x: Tensor, times: Tensor, cond: Conditioning) -> list[tuple[Tensor, Tensor]]:
    rows = len(cond.grids) if cond.rows is None else int(cond.rows.max()) + 1
    levels = times[:, None].expand(-1, rows).to(x)  # (steps + 1, R)
    return list(pairwise(levels))


def _per_token(cond: Conditioning, per_row: Tensor) -> Tensor:
    return cond.per_token(per_row)[:, None]  # (R,) -> (L, 1)
