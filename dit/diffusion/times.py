"""Noise levels t: how they are drawn for training and spaced for sampling. All in float64; cast once, where a network takes them."""

from collections.abc import Sequence
from typing import assert_never

import torch
from torch import Tensor

from data_pipelines import randomness
from dit.config.objective import LogitNormalTimes, TokenShift, UniformTimes

TimesConfig = UniformTimes | LogitNormalTimes


def from_uniform(config: TimesConfig, u: Tensor) -> Tensor:
    """Map uniform numbers `u` (float64) to levels t of the configured distribution, by its inverse CDF.

    Logit-normal: t = sigmoid(mean + std n), n normal (Esser et al. 2024, arXiv:2403.03206, eq. 19).
    """
    match config:
        case UniformTimes():
            return u
        case LogitNormalTimes():
            return torch.sigmoid(config.mean + config.std * torch.special.ndtri(u))
        case _:
            assert_never(config)


def shift(t: Tensor, k: Tensor | float) -> Tensor:
    """Move t towards the noise, k > 1, or the data, k < 1; 0 and 1 stay (Esser et al. 2024, arXiv:2403.03206, eq. 23)."""
    return k * t / (1 + (k - 1) * t)


def shift_of(tokens: int, config: TokenShift | None) -> float:
    """The shift k of a sample of `tokens` tokens."""
    return 1.0 if config is None else (tokens / config.base_tokens) ** 0.5


def draw(config: TimesConfig, token_shift: TokenShift | None, keys: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """One level t for each sample, from its key and its number of tokens: (n,) float64 on the CPU."""
    u = torch.tensor([randomness.uniform(key, "time") for key in keys], dtype=torch.float64)
    k = torch.tensor([shift_of(length, token_shift) for length in lengths], dtype=torch.float64)
    return shift(from_uniform(config, u), k)


def schedule(steps: int, k: float) -> Tensor:
    """The levels that a sampler visits, t_i = shift(1 - i / steps, k): (steps + 1,) float64 from exactly 1 to exactly 0."""
    return shift(1 - torch.arange(steps + 1, dtype=torch.float64) / steps, k)
