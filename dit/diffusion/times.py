"""Noise levels t: how they are drawn for training and spaced for sampling. All in float64; cast once, where a network takes them."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import assert_never

import torch
from torch import Tensor

from data_pipelines import randomness
from data_pipelines.errors import UserError
from data_pipelines.packed import InStep
from dit.config.objective import (
    ExponentialShift,
    ExponentialSteps,
    KarrasSteps,
    LogitNormalTimes,
    LogNormalTimes,
    ModeTimes,
    ShiftConfig,
    ShiftedSteps,
    StepsConfig,
    TimesConfig,
    TokenShift,
    TrainedSteps,
    UniformTimes,
    WholeSteps,
)
from dit.diffusion.paths import Path, RectifiedFlow, VariancePreserving

RECTIFIED_FLOW = RectifiedFlow()
SHIFTED = ShiftedSteps()


def from_uniform(config: TimesConfig, u: Tensor, path: Path = RECTIFIED_FLOW) -> Tensor:
    """Map uniform numbers `u` (float64) to levels t of the configured distribution, by its inverse CDF.

    Logit-normal: t = sigmoid(mean + std n), n normal (Esser et al. 2024, arXiv:2403.03206, eq. 19). Mode: their eq. 20.
    Log-normal: b / a = exp(mean + std n) on `path` (Karras et al. 2022, arXiv:2206.00364, table 1), cut off at t = 1.
    """
    match config:
        case UniformTimes():
            return u
        case LogitNormalTimes():
            return torch.sigmoid(config.mean + config.std * torch.special.ndtri(u))
        case ModeTimes():
            down = 1 - u  # falls with u as published; mirrored, it is the inverse CDF
            return 1 - down - config.scale * (torch.cos(math.pi / 2 * down).square() - 1 + down)
        case LogNormalTimes():
            return path.level_of(torch.exp(config.mean + config.std * torch.special.ndtri(u)))
        case _:
            assert_never(config)


def shift(t: Tensor, k: Tensor | float) -> Tensor:
    """Move t towards the noise, k > 1, or the data, k < 1; 0 and 1 stay (Esser et al. 2024, arXiv:2403.03206, eq. 23)."""
    return k * t / (1 + (k - 1) * t)


def shift_of(tokens: int, config: ShiftConfig | None) -> float:
    """The shift k of a sample of `tokens` tokens."""
    match config:
        case None:
            return 1.0
        case TokenShift():
            return (tokens / config.base_tokens) ** 0.5
        case ExponentialShift():
            part = (tokens - config.low_tokens) / (config.high_tokens - config.low_tokens)
            return math.exp(config.low + (config.high - config.low) * part)
        case _:
            assert_never(config)


def shifts(lengths: Sequence[int], config: ShiftConfig | None) -> Tensor:
    """The shift k of samples of `lengths` tokens, (n,) float64."""
    return torch.tensor([shift_of(length, config) for length in lengths], dtype=torch.float64)


def uniforms(keys: Sequence[int], place: InStep | None, purpose: str = "time") -> Tensor:
    """A number in [0, 1) for each key, (n,) float64; with `place` in one of as many equal parts as the step has samples, each its own."""
    u = torch.tensor([randomness.uniform(key, purpose) for key in keys], dtype=torch.float64)
    return u if not place else (_parts(place.samples, place.key)[place.first : place.first + len(keys)] + u) / place.samples


@lru_cache(maxsize=2)
def _parts(samples: int, key: int) -> Tensor:
    """(samples,) a random order of 0 .. samples - 1, for the samples of a step lie in it by their length."""
    return torch.tensor(sorted(range(samples), key=lambda number: randomness.key(key, "part", number)))


def draw(
    config: TimesConfig,
    shift_config: ShiftConfig | None,
    keys: Sequence[int],
    lengths: Sequence[int],
    path: Path = RECTIFIED_FLOW,
    place: InStep | None = None,
) -> Tensor:
    """One level t for each sample, from its key and its number of tokens, and with `place` stratified: (n,) float64 on the CPU."""
    return shift(from_uniform(config, uniforms(keys, place), path), shifts(lengths, shift_config))


def schedule(
    steps: int, k: float, config: StepsConfig = SHIFTED, path: Path = RECTIFIED_FLOW, trained: TimesConfig | None = None
) -> Tensor:
    """The levels that a sampler visits: (steps + 1,) float64, falling to exactly 0, where `config` does not say else from exactly 1.

    k: of the shift of `shifted`, t_i = shift(1 - i / steps, k), and of `trained`, the quantiles of the times `trained`.
    Raises UserError where the path does not have such steps.
    """
    u = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
    match config:
        case ShiftedSteps():
            return shift(u, k)
        case TrainedSteps():
            inner = from_uniform(trained or UniformTimes(name="uniform"), u[1:-1], path)
            return torch.cat([u[:1], shift(inner, k), u[-1:]])
        case KarrasSteps():
            low, high = (sigma ** (1 / config.rho) for sigma in _sigmas(config, path))
            sigmas = (low + (high - low) * torch.linspace(1, 0, steps, dtype=torch.float64)) ** config.rho
            return torch.cat([path.level_of(sigmas), u[-1:]])
        case ExponentialSteps():
            low, high = (math.log(sigma) for sigma in _sigmas(config, path))
            logs = torch.linspace(high, low, steps, dtype=torch.float64)
            return torch.cat([path.level_of(logs.exp()), u[-1:]])
        case WholeSteps():
            if not isinstance(path, VariancePreserving) or steps > path.steps:
                raise UserError(
                    f"sampling.schedule: whole with sampling.steps={steps} needs a model on a vp path of at least as many steps; "
                    "use schedule shifted, or fewer steps"
                )
            if config.first:
                return torch.cat([1 + torch.linspace(path.steps - 1, 0, steps, dtype=torch.float64).round(), u[-1:]]) / path.steps
            return (u * path.steps).round() / path.steps
        case _:
            assert_never(config)


def _sigmas(config: KarrasSteps | ExponentialSteps, path: Path) -> tuple[float, float]:
    """The least and the largest b / a to visit, of those that the path has: beyond its ends all would be one level."""
    c = path.at(torch.tensor([0.0, 1.0]))
    first, last = (c.b / c.a).tolist()
    low, high = max(config.sigma_min, first), min(config.sigma_max, last)
    if low >= high:
        raise UserError(
            f"sampling.schedule: got {config.name} with sigma_min={config.sigma_min:g}, expected less than {last:.3g}, "
            "the largest b / a on the path of this model: lower sigma_min, or use schedule shifted"
        )
    return low, high
