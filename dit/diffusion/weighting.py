"""Weights of the training loss over t. A weighting is the quantity whose squared error is weighed, and its weight w(t) >= 0.

Errors in two quantities differ by a factor of t alone, so any quantity may be predicted under any weighting.
"""

import math
from typing import assert_never

import torch
from torch import Tensor

from dit.config.path import Quantity
from dit.config.weighting import (
    ConstantWeighting,
    EDMWeighting,
    LogitNormalWeighting,
    MinSNRWeighting,
    P2Weighting,
    SigmoidWeighting,
    SNRPlusOneWeighting,
    TruncatedSNRWeighting,
    WeightingConfig,
)
from dit.diffusion.paths import Path


def weight_of(config: WeightingConfig, prediction: Quantity, path: Path, t: Tensor) -> tuple[Quantity, Tensor]:
    """The quantity and its weights (n,) float64 at t (n,); sources stand with the config classes."""
    snr = path.at(t).snr
    match config:
        case ConstantWeighting():
            return config.space or prediction, torch.ones_like(snr)
        case MinSNRWeighting():
            return "latents", snr.clamp(max=config.gamma)
        case SNRPlusOneWeighting():
            return "latents", snr + 1
        case TruncatedSNRWeighting():
            return "latents", snr.clamp(min=1)
        case EDMWeighting():
            return "latents", snr + path.sigma_data**-2
        case P2Weighting():
            return "noise", (config.k + snr) ** -config.gamma
        case SigmoidWeighting():
            return "noise", torch.sigmoid(config.bias - snr.log())
        case LogitNormalWeighting():
            t = t.double()
            place = (torch.logit(t) - config.mean) / config.std
            density = torch.exp(-place.square() / 2) / (config.std * math.sqrt(2 * math.pi) * t * (1 - t))
            return "velocity", torch.where((t > 0) & (t < 1), density, 0.0)  # its limit; float32 rounds t to the ends
        case _:
            assert_never(config)
