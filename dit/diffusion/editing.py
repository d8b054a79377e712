"""Edits as sampling: draw what is unknown given what is known, vary what is given, or find the noise that it comes from.

All work on tokens, with any denoiser, guided or not, of any path.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from data_pipelines import randomness
from data_pipelines.packed import Conditioning
from dit.config.objective import SamplingConfig
from dit.diffusion.denoiser import Denoiser
from dit.diffusion.draws import noise_tokens
from dit.diffusion.paths import Path, on_tokens
from dit.diffusion.samplers import euler, follow, heun, rk4
from dit.diffusion.walk import ends_of

_ROUNDS = 3
"""Of the fixed point of inversion's first step. Its slope I - a E'(x) lies in [0, 1], near 0 along the data: few are enough."""


@dataclass(frozen=True)
class Known:
    """What is known of a pack. latents: (L, P), zero where nothing is. mask: (L,) bool, True where a token is known."""

    latents: Tensor
    mask: Tensor


class Pinned:
    """`denoiser` with the latents of the known tokens in place of its prediction of them.

    Whatever sampler asks it carries them from their noise to exactly where they belong: the line of the path in a deterministic one,
    the posterior q(x_s | x_t, latents) in a stochastic one.
    """

    def __init__(self, denoiser: Denoiser, path: Path, known: Known) -> None:
        self.denoiser, self.path, self.known = denoiser, path, known

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        answer = self.denoiser(x_t, t, cond)
        channels = x_t.shape[1]
        velocity = self.path.convert(self.known.latents.to(x_t), "latents", "velocity", x_t, t, cond)
        return torch.cat([torch.where(self.known.mask[:, None], velocity, answer[:, :channels]), answer[:, channels:]], dim=1)


@torch.no_grad()
def complete(
    denoiser: Denoiser,
    known: Known,
    cond: Conditioning,
    keys: Sequence[int],
    times: Tensor,
    sampling: SamplingConfig,
    path: Path,
    repeats: int = 1,
    jump: int = 1,
) -> Tensor:
    """Draw the unknown tokens given the known ones, which come back bit for bit: (L, P).

    A denoiser that is `Told` them draws p(unknown | known). One that is not sees them noised (replacement), which is biased: what it
    chose at high noise it cannot take back. So every `jump` steps are gone `repeats` times, noised again in between (RePaint, Lugmayr
    et al. 2022, arXiv:2201.09865, algorithm 1); the bias falls with repeats and steps.
    """
    noise = noise_tokens(keys, cond.lengths, known.latents.shape[1], "start noise").to(known.latents)
    x = path.interpolate(known.latents, noise, times[:1].expand(len(keys)), cond)
    pinned = Pinned(denoiser, path, known)
    spans = [times] if repeats == 1 else [times[first : first + jump + 1] for first in range(0, len(times) - 1, jump)]
    for span, part in enumerate(spans):
        for again in range(repeats):
            own = tuple(randomness.key(key, "span", span, again) for key in keys)  # samplers count their noise from each start
            if again:
                x = _noise_again(x, part[-1:].expand(len(keys)), part[:1].expand(len(keys)), cond, path, own)
            x = follow(pinned, x, part, cond, own, sampling, path)
    return torch.where(known.mask[:, None], known.latents, x)


def _noise_again(x: Tensor, t: Tensor, s: Tensor, cond: Conditioning, path: Path, keys: Sequence[int]) -> Tensor:
    """Draw q(x_s | x_t), s > t, (n,) each."""
    c, d = path.at(t), path.at(s)
    kept = d.a / c.a
    fresh = noise_tokens(keys, cond.lengths, x.shape[1], "noise again").to(x)
    return on_tokens(kept, cond, x) * x + on_tokens((d.b.square() - (kept * c.b).square()).sqrt(), cond, x) * fresh


@torch.no_grad()
def vary(
    denoiser: Denoiser,
    latents: Tensor,
    cond: Conditioning,
    keys: Sequence[int],
    times: Tensor,
    sampling: SamplingConfig,
    path: Path,
    strength: float,
) -> Tensor:
    """Noise `latents` (L, P) and sample from there (SDEdit, Meng et al. 2022, arXiv:2108.01073, algorithm 1).

    strength: the level on rectified flow; on another path that of the same b / a. 1 forgets the latents, where the path does.
    """
    ratio = torch.tensor(strength, dtype=torch.float64, device=times.device)
    times = torch.cat([path.level_of(ratio / (1 - ratio))[None], times])
    times = torch.cat([times[:1], times[1:][times[1:] < times[0]]])
    noise = noise_tokens(keys, cond.lengths, latents.shape[1], "start noise").to(latents)
    x = path.interpolate(latents, noise, times[:1].expand(len(keys)), cond)
    return follow(denoiser, x, times, cond, keys, sampling, path)


@torch.no_grad()
def invert(
    denoiser: Denoiser, latents: Tensor, cond: Conditioning, times: Tensor, solver: Literal["euler", "heun", "rk4"], path: Path
) -> Tensor:
    """Follow the flow from `latents` (L, P) up the falling `times` to times[0]: the x that leads back to them, to the solver's order.

    Networks are not asked at t = 0, so the first step solves x = a latents + b noise(x) at its end, which is the step of DDIM undone;
    with it rk4 is of second order.
    """
    rising = times.flip(0)
    t = rising[1:2].expand(len(cond.grids))
    x = path.interpolate(latents, torch.zeros_like(latents), t, cond)
    for _ in range(_ROUNDS):
        x = path.interpolate(latents, ends_of(denoiser, path, x, t, cond)[1], t, cond)
    return {"euler": euler, "heun": heun, "rk4": rk4}[solver](denoiser, x, rising[1:], cond)
