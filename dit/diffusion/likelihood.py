"""The likelihood of latents by the probability flow, a continuous normalising flow (Song et al. 2020, arXiv:2011.13456, eq. 39)."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from data_pipelines import randomness
from data_pipelines.packed import Conditioning
from dit.diffusion.denoiser import Denoiser
from dit.diffusion.paths import Path, on_tokens, sample_sums


def log_likelihood(
    denoiser: Denoiser, path: Path, latents: Tensor, times: Tensor, cond: Conditioning, keys: Sequence[int] | None = None
) -> Tensor:
    """log p(latents) of each sample in nats, (n,) float64, by Heun's rule up the flow.

    times: rising from just above 0, where the path still holds data, to 1. keys: None for the exact trace, which costs a backward pass
    for each number of the longest sample; else Hutchinson's estimate with one vector of random signs a sample, drawn from its key.
    Latents are taken to stand at times[0]; at the end the noise is N(0, a^2 + b^2), for data of unit variance.
    """
    assert cond.rows is None
    probes = _unit_probes(latents, cond) if keys is None else [_signs(latents, cond, keys)]
    x, gained = latents, latents.new_zeros(len(cond.grids), dtype=torch.float64)
    rows = times.to(latents)[:, None].expand(-1, len(cond.grids))
    for t, t_next in pairwise(rows):
        length = on_tokens(t_next - t, cond, x)
        first, trace = _slope(denoiser, x, t, cond, probes)
        second, trace_next = _slope(denoiser, x + length * first, t_next, cond, probes)
        x = x + length * (first + second) / 2
        gained = gained + (t_next - t).double() * (trace + trace_next) / 2
    c = path.at(times[-1])
    variance = float(c.a.square() + c.b.square())
    return gained + sample_sums(-x.double().square() / (2 * variance) - math.log(2 * math.pi * variance) / 2, cond)


def bits_per_dimension(log_p: Tensor, cond: Conditioning, channels: int) -> Tensor:
    """-log2 p / dimensions of each sample; channels: P of its tokens."""
    return -log_p / (math.log(2) * channels * torch.tensor(cond.lengths, device=log_p.device, dtype=torch.float64))


def _slope(denoiser: Denoiser, x: Tensor, t: Tensor, cond: Conditioning, probes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The velocity (L, P) and its divergence (n,), the sum over the probes e of e . (dv / dx) e."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        velocity = denoiser(x, t, cond)[:, : x.shape[1]]
        trace = x.new_zeros(len(cond.grids), dtype=torch.float64)
        for probe in probes:
            (product,) = torch.autograd.grad(velocity, x, probe.to(velocity), retain_graph=True)
            trace = trace + sample_sums((product * probe).double(), cond)
    return velocity.detach().to(x.dtype), trace


def _unit_probes(x: Tensor, cond: Conditioning) -> list[Tensor]:
    """A unit vector for each number of the longest sample, for all samples at once, as none depends on another."""
    place = torch.cat([torch.arange(length) for length in cond.lengths]).to(x.device)[:, None] * x.shape[1]
    place = place + torch.arange(x.shape[1], device=x.device)  # (L, P), the place of each number in its sample
    return [(place == number).to(x) for number in range(max(cond.lengths) * x.shape[1])]


def _signs(x: Tensor, cond: Conditioning, keys: Sequence[int]) -> Tensor:
    draws = [randomness.normal((length, x.shape[1]), key, "hutchinson") for key, length in zip(keys, cond.lengths, strict=True)]
    return torch.cat(draws).sign().to(x)
