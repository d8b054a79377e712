"""Samplers that remember: exponential integrators in lambda = ln(a / b) on the predicted latents. One call a step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipelines.packed import Conditioning
from dit.diffusion.denoiser import Denoiser
from dit.diffusion.draws import noise_tokens
from dit.diffusion.paths import Coefficients, Path, on_tokens
from dit.diffusion.times import RECTIFIED_FLOW
from dit.diffusion.walk import OnStep, ends_of, walk

_LEAST_SIGNAL = 1e-5
"""lambda is cut off where a is smaller: it is -infinity at the noise end of rectified flow."""


def _log_ratio(c: Coefficients) -> Tensor:
    return (c.a.clamp(min=_LEAST_SIGNAL) / c.b).log()  # (R,), infinite at the data


def dpmpp_2m(
    denoiser: Denoiser,
    noise: Tensor,
    times: Tensor,
    cond: Conditioning,
    path: Path = RECTIFIED_FLOW,
    keys: Sequence[int] | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DPM-Solver++(2M), second order (Lu et al. 2022, arXiv:2211.01095, algorithm 2); with `keys` its SDE form (their eq. 17).

    keys: of the samples, from which the SDE's fresh noise is drawn. The first step, and one onto t = 0, are of first order.
    """
    history: list[tuple[Tensor, Tensor]] = []

    def step(number: int, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        latents, _ = ends_of(denoiser, path, x, t, cond)
        c, d = path.at(t), path.at(t_next)
        here, there = _log_ratio(c), _log_ratio(d)
        h = there - here
        slope = latents
        if history and bool(t_next.any()):
            before, older = history.pop()
            slope = latents + on_tokens(h / (2 * (here - before)), cond, x) * (latents - older)
        history[:] = [(here, latents)]
        if keys is None:
            return on_tokens(d.b / c.b, cond, x) * x - on_tokens(d.a * torch.expm1(-h), cond, x) * slope
        gained = -torch.expm1(-2 * h)  # 1 - e^(-2 h)
        fresh = noise_tokens(keys, cond.lengths, x.shape[1], "sde noise", number).to(x)
        mean = on_tokens(d.b / c.b * (-h).exp(), cond, x) * x + on_tokens(d.a * gained, cond, x) * slope
        return mean + on_tokens(d.b * gained.sqrt(), cond, x) * fresh

    return walk(noise, times, cond, step, on_step)


def unipc(
    denoiser: Denoiser,
    noise: Tensor,
    times: Tensor,
    cond: Conditioning,
    path: Path = RECTIFIED_FLOW,
    order: int = 2,
    on_step: OnStep | None = None,
) -> Tensor:
    """UniPC-`order` with B(h) = e^h - 1 (Zhao et al. 2023, arXiv:2302.04867, algorithms 7 and 8): predict, then correct for free.

    Accurate to order + 1: each call at a predicted point also corrects the step that led there. Orders rise from 1, and
    fall to 1 towards t = 0.
    """
    history: list[tuple[Coefficients, Tensor]] = []  # of the levels visited, the newest last
    onto_data = not bool(times[-1].any())
    starts: list[tuple[Tensor, int]] = []  # x from which the last step was taken, and its order

    def step(number: int, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        latents, _ = ends_of(denoiser, path, x, t, cond)
        c = path.at(t)
        if starts:
            start, used = starts.pop()
            x = _unipc_update(start, history[-used:], c, latents, cond)
        history.append((c, latents))
        del history[:-order]
        used = min(order, number, len(times) - number if onto_data else order)
        starts.append((x, used))
        return _unipc_update(x, history[-used:], path.at(t_next), None, cond)

    return walk(noise, times, cond, step, on_step)


def _unipc_update(
    x: Tensor, history: list[tuple[Coefficients, Tensor]], d: Coefficients, answer: Tensor | None, cond: Conditioning
) -> Tensor:
    """Step from the newest level of `history` to that of `d`; answer: the latents (L, P) predicted there, to correct with them."""
    c, newest = history[-1]
    here = _log_ratio(c)
    h = _log_ratio(d) - here  # (R,)
    places, others = [(_log_ratio(e) - here) / h for e, _ in history[:-1]], [latents for _, latents in history[:-1]]
    if answer is not None:
        places, others = [*places, torch.ones_like(h)], [*others, answer]
    phi = torch.expm1(-h)
    x = on_tokens(d.b / c.b, cond, x) * x - on_tokens(d.a * phi, cond, x) * newest
    for place, weight, latents in zip(places, _unipc_weights(places, h), others, strict=True):
        x = x - on_tokens(d.a * phi * weight / place, cond, x) * (latents - newest)
    return x


def _unipc_weights(places: list[Tensor], h: Tensor) -> list[Tensor]:
    """The weight (R,) of the difference at each place, which makes the rule exact for polynomials (their eq. 5)."""
    if len(places) < 2:
        return [torch.full_like(h, 0.5) for _ in places]  # as published, of the right order without solving
    powers = torch.stack([torch.stack(places, dim=-1) ** j for j in range(len(places))], dim=-2)  # (R, n, n)
    moments, phi, factorial = [], torch.expm1(-h), 1.0
    part = phi / -h - 1
    for j in range(1, len(places) + 1):
        moments.append(part * factorial / phi)
        factorial *= j + 1
        part = part / -h - 1 / factorial
    return list(torch.linalg.solve(powers, torch.stack(moments, dim=-1)).unbind(-1))
