"""Paths from data to noise: x_t = a(t) latents + b(t) noise, t = 0 at the data and 1 at the noise."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from data_pipelines.config import Section

Quantity = Literal["latents", "noise", "v", "velocity", "score", "edm"]
"""All that is linear in latents and noise. v = a noise - b latents (Salimans & Ho 2022, arXiv:2202.00512). velocity = d x_t / d t.
score = -noise / b, the gradient of log p(x_t | latents). edm = the raw network of Karras et al. 2022, eq. 7."""

OpenUnit = Annotated[float, Field(gt=0, lt=1)]


def _rising(pair: tuple[float, float]) -> tuple[float, float]:
    if not pair[0] < pair[1]:
        raise ValueError(f"got {list(pair)}, expected the lower end first")
    return pair


Rising = AfterValidator(_rising)
"""Of a pair: the ends of an interval."""


class RectifiedFlowPath(Section):
    """a = 1 - t, b = t (Liu et al. 2022, arXiv:2209.03003, eq. 1)."""

    name: Literal["rectified_flow"] = "rectified_flow"


class TrigFlowPath(Section):
    """a = cos(pi t / 2), b = sin(pi t / 2) (Lu & Song 2024, arXiv:2410.11081, eq. 3, with unit data)."""

    name: Literal["trigflow"]


class VPPath(Section):
    """a^2 = prod (1 - beta_i), i <= T t, b^2 = 1 - a^2 (Ho et al. 2020, arXiv:2006.11239, eq. 4), smooth between whole steps i."""

    name: Literal["vp"]
    schedule: Literal["linear", "scaled_linear", "cosine", "sigmoid", "saturating"] = "linear"
    """beta_i: linear in i; its root linear; cosine a^2 (arXiv:2102.09672, eq. 17); a sigmoid; min(1 - exp(-rate i), beta_end)."""
    steps: PositiveInt = 1000
    """T, the steps of the chain."""
    beta_start: OpenUnit = 1e-4
    beta_end: OpenUnit = 0.02
    rate: PositiveFloat = 2e-5
    """Of `saturating`."""
    zero_terminal_snr: bool = False
    """Rescale a so that nothing of the data is left at t = 1 (Lin et al. 2023, arXiv:2305.08891, algorithm 1)."""

    @model_validator(mode="after")
    def _betas_rise(self) -> Self:
        if self.beta_end < self.beta_start:
            raise ValueError(f"beta_end = {self.beta_end} must not be below beta_start = {self.beta_start}")
        return self


class Sigmas(Section):
    """From where to where sigma = b / a goes."""

    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if not self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min = {self.sigma_min} must be below sigma_max = {self.sigma_max}")
        return self


class VEPath(Sigmas):
    """a = 1, b^2 = sigma_min^2 ((sigma_max / sigma_min)^(2 t) - 1) (Song et al. 2020, arXiv:2011.13456, eq. 30, from exact data)."""

    name: Literal["ve"]
    sigma_min: PositiveFloat = 0.01
    sigma_max: PositiveFloat = 50.0


class EDMPath(Section):
    """a = 1, b = sigma_max t (Karras et al. 2022, arXiv:2206.00364, table 1); the network sees c_in x_t and ln(sigma) / 4."""

    name: Literal["edm"]
    sigma_max: PositiveFloat = 80.0
    sigma_data: PositiveFloat = 1.0
    """Standard deviation of the data; latents here have 1."""


class LearnedPath(Section):
    """a^2 = sigmoid(-gamma(t)) with a monotone gamma that is trained with the network (Kingma et al. 2021, arXiv:2107.00630, 4.1)."""

    name: Literal["learned"] = "learned"
    ends: Annotated[tuple[float, float], Rising] = (-13.3, 5.0)
    """gamma at t = 0 and t = 1 where training begins; -gamma is the logarithm of the signal-to-noise ratio."""
    pieces: PositiveInt = 32
    """gamma is linear in so many pieces."""


PathConfig = Annotated[RectifiedFlowPath | TrigFlowPath | VPPath | VEPath | EDMPath, Field(discriminator="name")]
