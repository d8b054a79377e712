"""Paths from data to noise, x_t = a(t) latents + b(t) noise, and the one algebra of what a network may predict on them.

Owns the signs. t is 0 at the data and 1 at the noise. Coefficients are float64, one a conditioning row; they are cast once, where
they meet tokens. Must not know networks, draws or losses.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, assert_never

import torch
from torch import Tensor

from data_pipelines.packed import Conditioning
from dit.config.path import EDMPath, PathConfig, Quantity, RectifiedFlowPath, TrigFlowPath, VEPath, VPPath

_SINGULAR = 1e-10
_LEAST_SIGMA = 1e-4
"""EDM's label ln(sigma) / 4 is -infinity for clean tokens; below this all are told alike."""


class Coefficients(NamedTuple):
    """a, b and their derivatives by t, float64 tensors of the shape of t."""

    a: Tensor
    b: Tensor
    da: Tensor
    db: Tensor

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio a^2 / b^2."""
        return (self.a / self.b).square()


class Path:
    """Four functions of t. A new path is a subclass with `at`."""

    sigma_data = 1.0
    """Standard deviation of the data, for EDM's scalings."""

    def at(self, t: Tensor) -> Coefficients:
        """Coefficients at t, float64."""
        raise NotImplementedError

    def input_scale(self, t: Tensor) -> Tensor | None:
        """What x_t is multiplied with before a network sees it; None for 1."""
        return None

    def label(self, t: Tensor) -> Tensor:
        """What a network is told instead of t."""
        return t

    def level_of(self, sigma: Tensor) -> Tensor:
        """The t in [0, 1] at which b / a = sigma, by bisection, for b / a rises. float64."""
        low, high = torch.zeros_like(sigma, dtype=torch.float64), torch.ones_like(sigma, dtype=torch.float64)
        for _ in range(60):
            middle = (low + high) / 2
            c = self.at(middle)
            below = c.b < sigma * c.a
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        level = (low + high) / 2
        c = self.at(level)
        newton = level + (sigma * c.a - c.b) * c.a / (c.a * c.db - c.b * c.da)  # no step any more, but the derivative by sigma
        return torch.where((low == 0) | (high == 1), torch.where(high == 1, high, level), newton)

    def interpolate(self, latents: Tensor, noise: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Noise `latents` (L, P) to the levels t (R,)."""
        c = self.at(t)
        return on_tokens(c.a, cond, latents) * latents + on_tokens(c.b, cond, latents) * noise

    def target(self, quantity: Quantity, latents: Tensor, noise: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The `quantity` of latents and noise (L, P) at levels t (R,)."""
        of_latents, of_noise = _basis(quantity, self.at(t), self.sigma_data)
        return on_tokens(of_noise, cond, noise) * noise + on_tokens(of_latents, cond, latents) * latents

    def conversion(self, source: Quantity, target: Quantity, t: Tensor) -> tuple[Tensor, Tensor]:
        """p, q (R,) such that target = p x_t + q source, for all latents and noise.

        Raises ValueError where x_t and the source do not determine the target, as noise does not determine latents where a = 0.
        """
        c = self.at(t)
        if source == target:
            return torch.zeros_like(c.a), torch.ones_like(c.a)
        (c1, d1), (c2, d2) = _basis(source, c, self.sigma_data), _basis(target, c, self.sigma_data)
        determinant = c.a * d1 - c.b * c1
        singular = ~(determinant.abs() >= _SINGULAR)  # a determinant that is no number is singular too
        if bool(singular.any()):
            where = t[singular][0].item()
            raise ValueError(f"{source} does not determine {target} at t = {where:g}: |a d - b c| < {_SINGULAR}; use another prediction")
        return (c2 * d1 - d2 * c1) / determinant, (d2 * c.a - c2 * c.b) / determinant

    def convert(self, value: Tensor, source: Quantity, target: Quantity, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """`value` (L, P), which is a `source` at x_t (L, P) and t (R,), as a `target`."""
        if source == target:
            return value
        p, q = self.conversion(source, target, t)
        return on_tokens(p, cond, x_t) * x_t + on_tokens(q, cond, x_t) * value


def _basis(quantity: Quantity, c: Coefficients, sigma_data: float) -> tuple[Tensor, Tensor]:
    """(c, d) of quantity = c latents + d noise."""
    zero, one = torch.zeros_like(c.a), torch.ones_like(c.a)
    match quantity:
        case "latents":
            return one, zero
        case "noise":
            return zero, one
        case "v":
            return -c.b, c.a
        case "velocity":
            return c.da, c.db
        case "score":
            return zero, -1 / c.b
        case "edm":  # (latents - c_skip x_t) / c_out at unit signal, for any a
            std = (c.b.square() + (sigma_data * c.a).square()).sqrt()
            return c.b / (sigma_data * std), -sigma_data * c.a / std
        case _:
            assert_never(quantity)


def on_tokens(per_row: Tensor, cond: Conditioning, like: Tensor) -> Tensor:
    """(R,) -> (L, 1), in the dtype and on the device of `like`."""
    return cond.per_token(per_row.to(like))[:, None]


def sample_sums(x: Tensor, cond: Conditioning) -> Tensor:
    """(L, P) -> (n,): the sum over the tokens and channels of each sample, in the dtype of x."""
    return x.new_zeros(len(cond.grids)).index_add_(0, cond.sample_of_token, x.sum(1))


class RectifiedFlow(Path):
    """a = 1 - t, b = t."""

    def at(self, t: Tensor) -> Coefficients:
        t = t.double()
        return Coefficients(1 - t, t, -torch.ones_like(t), torch.ones_like(t))


class TrigFlow(Path):
    """a = cos(pi t / 2), b = sin(pi t / 2)."""

    def at(self, t: Tensor) -> Coefficients:
        angle, rate = t.double() * (math.pi / 2), math.pi / 2
        return Coefficients(angle.cos(), angle.sin(), -rate * angle.sin(), rate * angle.cos())


class VarianceExploding(Path):
    """a = 1, b^2 = sigma_min^2 (r^(2 t) - 1) with r = sigma_max / sigma_min."""

    def __init__(self, sigma_min: float, sigma_max: float) -> None:
        self.sigma_min, self.rate = sigma_min, 2 * math.log(sigma_max / sigma_min)

    def at(self, t: Tensor) -> Coefficients:
        t, one = t.double(), torch.ones_like(t, dtype=torch.float64)
        b = self.sigma_min * torch.expm1(self.rate * t).sqrt()
        return Coefficients(one, b, torch.zeros_like(one), self.sigma_min**2 * self.rate * torch.exp(self.rate * t) / (2 * b))

    def input_scale(self, t: Tensor) -> Tensor:
        return (self.at(t).b.square() + 1).rsqrt()


class EDM(Path):
    """a = 1, b = sigma = sigma_max t; scalings of Karras et al. 2022, table 1."""

    def __init__(self, sigma_max: float, sigma_data: float) -> None:
        self.sigma_max, self.sigma_data = sigma_max, sigma_data

    def at(self, t: Tensor) -> Coefficients:
        t, one = t.double(), torch.ones_like(t, dtype=torch.float64)
        return Coefficients(one, self.sigma_max * t, torch.zeros_like(one), self.sigma_max * one)

    def input_scale(self, t: Tensor) -> Tensor:
        return (self.at(t).b.square() + self.sigma_data**2).rsqrt()

    def label(self, t: Tensor) -> Tensor:
        return (self.at(t).b.clamp(min=_LEAST_SIGMA).log() / 4).to(t)


@dataclass(frozen=True)
class VariancePreserving(Path):
    """b^2 = 1 - a^2 with a given at t = i / T, i = 0 .. T: exact there, and a cubic Hermite spline between.

    signal: (T + 1,) float64, a[0] = 1.
    """

    signal: Tensor

    @classmethod
    def of_betas(cls, betas: Tensor, zero_terminal_snr: bool) -> "VariancePreserving":
        """The path of a chain with noise variances `betas` (T,), float64."""
        a = (1 - betas).cumprod(0).sqrt()
        if zero_terminal_snr:
            a = (a - a[-1]) * (a[0] / (a[0] - a[-1]))
        return cls(torch.cat([torch.ones(1, dtype=torch.float64), a]))

    @property
    def steps(self) -> int:
        """T."""
        return len(self.signal) - 1

    @cached_property
    def _tables(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        """The signal and its slopes at each t = i / T, on each device that asked: a copy from the CPU would halt a GPU at every call."""
        slopes = torch.gradient(self.signal, edge_order=1)[0] if self.steps > 1 else self.signal.diff().expand(2)
        return {self.signal.device: (self.signal, slopes)}

    def _tables_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tables:
            signal, slopes = self._tables[self.signal.device]
            self._tables[device] = signal.to(device), slopes.to(device)
        return self._tables[device]

    def at(self, t: Tensor) -> Coefficients:
        place = t.double() * self.steps
        i = place.floor().long().clamp(0, self.steps - 1)
        u, (value, slope) = place - i, self._tables_on(t.device)
        rise, left, right = value[i + 1] - value[i], slope[i], slope[i + 1]
        square, cube = 3 * rise - 2 * left - right, left + right - 2 * rise
        a = value[i] + u * (left + u * (square + u * cube))
        a = torch.where(u == 1, value[i + 1], a)
        da = self.steps * (left + u * (2 * square + 3 * u * cube))
        b = (1 - a.square()).sqrt()
        return Coefficients(a, b, da, -a * da / b)


def betas_of(config: VPPath) -> Tensor:
    """The noise variance of each step of the chain, (T,) float64."""
    first, last, steps = config.beta_start, config.beta_end, config.steps
    i = torch.arange(1, steps + 1, dtype=torch.float64)
    match config.schedule:
        case "linear":
            return torch.linspace(first, last, steps, dtype=torch.float64)
        case "scaled_linear":
            return torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64).square()
        case "cosine":
            level = torch.cos((torch.cat([torch.zeros(1, dtype=torch.float64), i]) / steps + 0.008) / 1.008 * math.pi / 2).square()
            return (1 - level[1:] / level[:-1]).clamp(max=0.999)
        case "sigmoid":
            return first + (last - first) * torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid()
        case "saturating":
            return (-torch.expm1(-config.rate * i)).clamp(max=last)
        case _:
            assert_never(config.schedule)


def build_path(config: PathConfig) -> Path:
    """The path of a config."""
    match config:
        case RectifiedFlowPath():
            return RectifiedFlow()
        case TrigFlowPath():
            return TrigFlow()
        case VPPath():
            return VariancePreserving.of_betas(betas_of(config), config.zero_terminal_snr)
        case VEPath():
            return VarianceExploding(config.sigma_min, config.sigma_max)
        case EDMPath():
            return EDM(config.sigma_max, config.sigma_data)
        case _:
            assert_never(config)
