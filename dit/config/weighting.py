"""Weights of the training loss over t."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from data_pipelines.config import Section
from dit.config.path import Quantity


class ConstantWeighting(Section):
    name: Literal["constant"] = "constant"
    space: Quantity | None = None
    """Take the error of this quantity; None of what the network predicts."""


class MinSNRWeighting(Section):
    """min(SNR, gamma) on the error of the latents (Hang et al. 2023, arXiv:2303.09556, 3.4)."""

    name: Literal["min_snr"]
    gamma: PositiveFloat = 5.0


class SNRPlusOneWeighting(Section):
    """SNR + 1 on the error of the latents (Salimans & Ho 2022, arXiv:2202.00512, 4)."""

    name: Literal["snr_plus_one"]


class TruncatedSNRWeighting(Section):
    """max(SNR, 1) on the error of the latents (Salimans & Ho 2022, arXiv:2202.00512, 4)."""

    name: Literal["truncated_snr"]


class EDMWeighting(Section):
    """SNR + 1 / sigma_data^2 on the error of the latents (Karras et al. 2022, arXiv:2206.00364, table 1)."""

    name: Literal["edm"]


class P2Weighting(Section):
    """1 / (k + SNR)^gamma on the error of the noise (Choi et al. 2022, arXiv:2204.00227, eq. 8)."""

    name: Literal["p2"]
    gamma: NonNegativeFloat = 1.0
    k: PositiveFloat = 1.0


class SigmoidWeighting(Section):
    """sigmoid(bias - ln SNR) on the error of the noise (Hoogeboom et al. 2024, arXiv:2410.19324, 3.1)."""

    name: Literal["sigmoid"]
    bias: float = -3.0


class LogitNormalWeighting(Section):
    """The logit-normal density of t on the error of the velocity, in place of drawing t from it (Esser et al. 2024, 3.1)."""

    name: Literal["logit_normal"]
    mean: float = 0.0
    std: PositiveFloat = 1.0


_SNRWeighting = MinSNRWeighting | SNRPlusOneWeighting | TruncatedSNRWeighting
_OtherWeighting = EDMWeighting | P2Weighting | SigmoidWeighting | LogitNormalWeighting
WeightingConfig = Annotated[ConstantWeighting | _SNRWeighting | _OtherWeighting, Field(discriminator="name")]
