"""From noise to latents. A sampler is a function of a denoiser, start noise and the levels to visit.

`times` is falling, (steps + 1,), or (steps + 1, R) for levels of each row; x keeps the dtype of the noise and the network sees t in
the same dtype, while coefficients are float64. Must not know guidance: a guided denoiser is a denoiser.
"""

from collections.abc import Callable, Sequence
from typing import assert_never

import torch
from torch import Tensor

from data_pipelines.errors import UserError
from data_pipelines.packed import Conditioning
from dit.config.objective import SamplingConfig, TimesConfig
from dit.diffusion.chain import Variance, log_variance, posterior
from dit.diffusion.denoiser import Denoiser
from dit.diffusion.draws import noise_tokens
from dit.diffusion.multistep import dpmpp_2m, unipc
from dit.diffusion.paths import Path, on_tokens
from dit.diffusion.times import RECTIFIED_FLOW, schedule
from dit.diffusion.walk import OnStep, ends_of, walk


def euler(denoiser: Denoiser, noise: Tensor, times: Tensor, cond: Conditioning, on_step: OnStep | None = None) -> Tensor:
    """Follow the flow from `noise` (L, P) at times[0] to times[-1] by Euler's rule: first order, one call a step."""
    return walk(noise, times, cond, _flow_step(denoiser, euler_slope, cond), on_step)


def heun(denoiser: Denoiser, noise: Tensor, times: Tensor, cond: Conditioning, on_step: OnStep | None = None) -> Tensor:
    """Follow the flow by Heun's rule: second order, two calls a step (Karras et al. 2022, arXiv:2206.00364, algorithm 1).

    A step onto t = 0 is a plain Euler step: networks are hardly trained at t = 0, and one such step keeps the order.
    """
    return walk(noise, times, cond, _flow_step(denoiser, heun_slope, cond), on_step)


def rk4(denoiser: Denoiser, noise: Tensor, times: Tensor, cond: Conditioning, on_step: OnStep | None = None) -> Tensor:
    """Follow the flow by the classical Runge-Kutta rule: fourth order, four calls a step; a step onto t = 0 is a plain Euler step."""
    return walk(noise, times, cond, _flow_step(denoiser, rk4_slope, cond), on_step)


Slope = Callable[[Denoiser, Tensor, Tensor, Tensor, Conditioning], Tensor]


def _flow_step(denoiser: Denoiser, slope: Slope, cond: Conditioning) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
    def step(_: int, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        t, t_next = t.to(x), t_next.to(x)
        rule = euler_slope if not bool(t_next.any()) else slope
        return x + on_tokens(t_next - t, cond, x) * rule(denoiser, x, t, t_next, cond)

    return step


def euler_slope(denoiser: Denoiser, x: Tensor, t: Tensor, t_next: Tensor, cond: Conditioning) -> Tensor:
    """Mean velocity (L, P) between t and t_next (R,) by Euler's rule: that at t, or what a denoiser of jumps knows of it."""
    return denoiser(x, t, cond.over(t - t_next))[:, : x.shape[1]].to(x.dtype)


def heun_slope(denoiser: Denoiser, x: Tensor, t: Tensor, t_next: Tensor, cond: Conditioning) -> Tensor:
    """Mean velocity (L, P) between t and t_next (R,) by Heun's rule: that of both ends."""
    first = euler_slope(denoiser, x, t, t, cond)
    second = euler_slope(denoiser, x + on_tokens(t_next - t, cond, x) * first, t_next, t_next, cond)
    return (first + second) / 2


def rk4_slope(denoiser: Denoiser, x: Tensor, t: Tensor, t_next: Tensor, cond: Conditioning) -> Tensor:
    """Mean velocity (L, P) between t and t_next (R,) by the classical Runge-Kutta rule."""
    length, middle = on_tokens(t_next - t, cond, x), (t + t_next) / 2
    first = euler_slope(denoiser, x, t, t, cond)
    second = euler_slope(denoiser, x + length / 2 * first, middle, middle, cond)
    third = euler_slope(denoiser, x + length / 2 * second, middle, middle, cond)
    fourth = euler_slope(denoiser, x + length * third, t_next, t_next, cond)
    return (first + 2 * second + 2 * third + fourth) / 6


def ddim(
    denoiser: Denoiser,
    noise: Tensor,
    times: Tensor,
    cond: Conditioning,
    path: Path = RECTIFIED_FLOW,
    eta: float = 0.0,
    keys: Sequence[int] = (),
    on_step: OnStep | None = None,
) -> Tensor:
    """Predict both ends, mix them at the next level (Song et al. 2020, arXiv:2010.02502, eq. 12): first order at eta = 0.

    eta: part of the posterior's standard deviation that is fresh noise, drawn from the samples' `keys`. On a student of a
    consistency distillation eta = 0 is its deterministic sampler.
    """

    def step(number: int, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        latents, predicted = ends_of(denoiser, path, x, t, cond)
        d = path.at(t_next)
        fresh = eta * posterior(path, t, t_next).small.clamp(min=0).sqrt()
        x = on_tokens(d.a, cond, x) * latents + on_tokens((d.b.square() - fresh.square()).clamp(min=0).sqrt(), cond, x) * predicted
        return x if eta == 0 else x + on_tokens(fresh, cond, x) * _fresh(keys, cond, x, "ddim noise", number)

    return walk(noise, times, cond, step, on_step)


def ancestral(
    denoiser: Denoiser,
    noise: Tensor,
    times: Tensor,
    cond: Conditioning,
    keys: Sequence[int],
    path: Path = RECTIFIED_FLOW,
    variance: Variance = "small",
    on_step: OnStep | None = None,
) -> Tensor:
    """Step back through the chain at levels `times` (Ho et al. 2020, arXiv:2006.11239, algorithm 2); the step onto t = 0 adds no noise.

    Any times of a chain may be left out: the posterior is that between the levels visited.
    """

    def step(number: int, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        answer, channels = denoiser(x, t.to(x), cond).to(x.dtype), x.shape[1]
        if variance == "learned" and answer.shape[1] == channels:
            raise UserError("sampling.variance=learned, but this model has no learned variance; use small or large")
        latents = path.convert(answer[:, :channels], "velocity", "latents", x, t.to(x), cond)
        back = posterior(path, t, t_next)
        mean = on_tokens(back.of_x, cond, x) * x + on_tokens(back.of_latents, cond, x) * latents
        if not bool(t_next.any()):
            return mean
        on_token = type(back)(*(on_tokens(part, cond, back.small) for part in back))  # (L, 1), float64
        std = (log_variance(on_token, variance, answer[:, channels:] if variance == "learned" else None) / 2).exp().to(x)
        return mean + std * _fresh(keys, cond, x, "ancestral noise", number)

    return walk(noise, times, cond, step, on_step)


def euler_maruyama(
    denoiser: Denoiser,
    noise: Tensor,
    times: Tensor,
    cond: Conditioning,
    keys: Sequence[int],
    path: Path = RECTIFIED_FLOW,
    churn: float | Callable[[Tensor], Tensor] = 1.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Follow dx = (velocity - lambda / 2 score) dt + sqrt(lambda) dw back in time, which keeps p_t for any lambda(t) >= 0.

    churn: lambda(t) of t (R,), or its part of a g^2 = 2 (a b b' - a' b^2), which is finite on all of [0, 1]. lambda = g^2 is the
    reverse SDE (Song et al. 2020, arXiv:2011.13456, eq. 6), lambda = 0 Euler's rule. The step onto t = 0 adds no noise.
    """

    def step(number: int, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        velocity, length = euler_slope(denoiser, x, t.to(x), t.to(x), cond), t_next - t
        if not bool(t_next.any()):
            return x + on_tokens(length, cond, x) * velocity
        c = path.at(t)
        rate = churn(t) if callable(churn) else churn * 2 * (c.a * c.b * c.db - c.da * c.b.square())
        score = path.convert(velocity, "velocity", "score", x, t.to(x), cond)
        drift = velocity - on_tokens(rate / 2, cond, x) * score
        fresh = _fresh(keys, cond, x, "churn noise", number)
        return x + on_tokens(length, cond, x) * drift + on_tokens((rate * -length).sqrt(), cond, x) * fresh

    return walk(noise, times, cond, step, on_step)


def consistency(
    denoiser: Denoiser,
    noise: Tensor,
    times: Tensor,
    cond: Conditioning,
    keys: Sequence[int],
    path: Path = RECTIFIED_FLOW,
    on_step: OnStep | None = None,
) -> Tensor:
    """Predict the latents, noise them afresh to the next level, repeat (Song et al. 2023, arXiv:2303.01469, algorithm 1).

    keys: one random key a sample, from which the fresh noise of each step is drawn.
    """

    def step(number: int, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        latents, _ = ends_of(denoiser, path, x, t, cond.over(t.to(x)))
        return path.interpolate(latents, _fresh(keys, cond, x, "consistency noise", number), t_next.to(x), cond)

    return walk(noise, times, cond, step, on_step)


def _fresh(keys: Sequence[int], cond: Conditioning, x: Tensor, purpose: str, step: int) -> Tensor:
    return noise_tokens(keys, cond.lengths, x.shape[1], purpose, step).to(x)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    cond: Conditioning,
    keys: Sequence[int],
    token_channels: int,
    sampling: SamplingConfig,
    default_shift: float,
    path: Path = RECTIFIED_FLOW,
    trained: TimesConfig | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw latents tokens (L, token_channels) for `cond`, on its device; each sample depends on its own key only.

    denoiser: of `path`, guided already, where `sampling.guidance` asks for it. default_shift, trained: as for `levels`.
    """
    noise = noise_tokens(keys, cond.lengths, token_channels, "start noise").to(cond.text.device)
    times = levels(sampling, default_shift, path, trained).to(noise.device)
    return follow(denoiser, noise * path.at(times[0]).b.to(noise), times, cond, keys, sampling, path, on_step)


def levels(sampling: SamplingConfig, default_shift: float, path: Path = RECTIFIED_FLOW, trained: TimesConfig | None = None) -> Tensor:
    """The levels (steps + 1,) of a config. default_shift: where `sampling` has none. trained: the times, for `schedule: trained`."""
    return schedule(sampling.steps, default_shift if sampling.shift is None else sampling.shift, sampling.schedule, path, trained)


def follow(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    cond: Conditioning,
    keys: Sequence[int],
    sampling: SamplingConfig,
    path: Path = RECTIFIED_FLOW,
    on_step: OnStep | None = None,
) -> Tensor:
    """Take x (L, P) from times[0] down to times[-1] by the sampler of a config."""
    match sampling.sampler:
        case "euler":
            return euler(denoiser, x, times, cond, on_step)
        case "heun":
            return heun(denoiser, x, times, cond, on_step)
        case "rk4":
            return rk4(denoiser, x, times, cond, on_step)
        case "ddim":
            return ddim(denoiser, x, times, cond, path, sampling.eta, keys, on_step)
        case "ancestral":
            return ancestral(denoiser, x, times, cond, keys, path, sampling.variance, on_step)
        case "dpmpp_2m":
            return dpmpp_2m(denoiser, x, times, cond, path, on_step=on_step)
        case "dpmpp_2m_sde":
            return dpmpp_2m(denoiser, x, times, cond, path, keys, on_step)
        case "unipc":
            return unipc(denoiser, x, times, cond, path, sampling.order, on_step)
        case "euler_maruyama":
            return euler_maruyama(denoiser, x, times, cond, keys, path, sampling.churn, on_step)
        case "consistency":
            return consistency(denoiser, x, times, cond, keys, path, on_step)
        case _:
            assert_never(sampling.sampler)
