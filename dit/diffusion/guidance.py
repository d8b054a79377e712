"""Guidance: denoisers around denoisers. All of it is linear in the prediction, so it is the same for velocity, noise and latents.

They compose: `Within(plain, guided, ...)` limits any of them to an interval of t. s = 1 (and gamma = 0) is one plain call.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipelines.packed import Conditioning
from dit.diffusion.denoiser import Denoiser
from dit.diffusion.paths import Path, on_tokens, sample_sums

_LEAST_STD = 1e-6
"""Of a prediction. One that is constant, as a network's is before its first step, has a rounding error for a standard deviation."""


@dataclass(frozen=True)
class Extrapolation:
    """away + s (v - away), by sample: what all guidance by two predictions shares. `cond.guidance` goes before scale_s.

    zero_star: first scale `away` to fit v best (CFG-Zero*, Fan et al. 2025, arXiv:2503.18886, eq. 13). rescale: how far the standard
    deviation of the result is brought back to that of v (Lin et al. 2023, arXiv:2305.08891, eqs. 15 and 16). interval: low and high of
    the t at which to guide; elsewhere the result is v.
    """

    scale_s: float
    zero_star: bool = False
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __call__(self, v: Tensor, away: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """v, away: (L, P). t: (R,)."""
        guided = self._guided(v, away, cond)
        return guided if self.interval == (0, 1) else torch.where(_inside(t, self.interval, cond), guided, v)

    def _guided(self, v: Tensor, away: Tensor, cond: Conditioning) -> Tensor:
        if self.zero_star:
            away = away * _of_samples(sample_sums(v * away, cond) / sample_sums(away.square(), cond).clamp(min=1e-12), cond)
        guided = away + (self.scale_s if cond.guidance is None else on_tokens(cond.guidance, cond, v)) * (v - away)
        if self.rescale == 0:
            return guided
        ratio = _std(v, cond).clamp(min=_LEAST_STD) / _std(guided, cond).clamp(min=_LEAST_STD)
        return guided * _of_samples(1 - self.rescale + self.rescale * ratio, cond)


class ClassifierFreeGuidance:
    """v_null + s (v_cond - v_null), both conditions in one call (Ho & Salimans 2022, arXiv:2207.12598, eq. 6, with s = w + 1).

    null_text: (S0, D); a negative prompt takes the place of the empty caption here. null_label: class that stands for "no class".
    """

    def __init__(
        self,
        denoiser: Denoiser,
        null_text: Tensor,
        scale_s: float,
        null_label: int | None,
        zero_star: bool = False,
        rescale: float = 0.0,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.denoiser, self.null_text, self.null_label = denoiser, null_text, null_label
        self.combine = Extrapolation(scale_s, zero_star, rescale, interval)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Guided velocity (L, P) of x_t (L, P) at t (R,)."""
        if self.combine.scale_s == 1 and cond.guidance is None:
            return self.denoiser(x_t, t, cond)
        assert cond.rows is None or int(cond.rows.max()) + 1 == len(t), "every row of t must be in use, for rows are renumbered"
        both = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), self._null(cond).beside(cond))  # (2L, P)
        null, conditional = both.to(x_t.dtype).chunk(2)
        return _guide(self.combine, conditional, null, x_t.shape[1], t, cond)

    def _null(self, cond: Conditioning) -> Conditioning:
        labels = None
        if cond.labels is not None:
            assert self.null_label is not None, "labels without a null label"
            labels = torch.full_like(cond.labels, self.null_label)
        return cond.with_text([self.null_text.to(cond.text)] * len(cond.grids), labels)


class AutoGuidance:
    """v_weak + s (v - v_weak), both under the same condition (Karras et al. 2024, arXiv:2406.02507, eq. 3)."""

    def __init__(self, denoiser: Denoiser, weak: Denoiser, combine: Extrapolation) -> None:
        self.denoiser, self.weak, self.combine = denoiser, weak, combine

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        strong = self.denoiser(x_t, t, cond).to(x_t.dtype)
        if self.combine.scale_s == 1 and cond.guidance is None:
            return strong
        return _guide(self.combine, strong, self.weak(x_t, t, cond).to(x_t.dtype), x_t.shape[1], t, cond)


class ClassifierGuidance:
    """Adds gamma grad log p(y | x_t) to the score of a denoiser (Dhariwal & Nichol 2021, arXiv:2105.05233, algorithm 2).

    log_likelihood(x_t, t, cond): ln p(y | x_t) of each sample, (n,), by a classifier that was trained on noised samples of `path`.
    Where a = 0 no score makes a velocity: on rectified flow put it `Within` an interval that ends below t = 1.
    """

    def __init__(
        self, denoiser: Denoiser, path: Path, log_likelihood: Callable[[Tensor, Tensor, Conditioning], Tensor], gamma: float
    ) -> None:
        self.denoiser, self.path, self.log_likelihood, self.gamma = denoiser, path, log_likelihood, gamma

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        velocity = self.denoiser(x_t, t, cond)
        if self.gamma == 0:
            return velocity
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.log_likelihood(x, t, cond).sum(), x)
        of_score = self.path.conversion("score", "velocity", t)[1]
        return velocity + self.gamma * on_tokens(of_score, cond, x_t) * gradient


class AtScale:
    """A denoiser that takes the scale of guidance as an input (Meng et al. 2022, arXiv:2210.03142, 3.1), at scale_s: one call."""

    def __init__(self, denoiser: Denoiser, scale_s: float) -> None:
        self.denoiser, self.scale_s = denoiser, scale_s

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self.denoiser(x_t, t, cond if cond.guidance is not None else cond.guided(torch.ones_like(t) * self.scale_s))


class Within:
    """`guided` where low <= t <= high, `plain` elsewhere (Kynkäänniemi et al. 2024, arXiv:2404.07724, eq. 5).

    What is asked depends on t, so it must not wrap a network that ranks hold parts of, unless all have the same t.
    """

    def __init__(self, plain: Denoiser, guided: Denoiser, low: float, high: float) -> None:
        self.plain, self.guided, self.low, self.high = plain, guided, low, high

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        inside = _inside(t, (self.low, self.high), cond)
        if bool(inside.all()):
            return self.guided(x_t, t, cond)
        plain = self.plain(x_t, t, cond)
        return torch.where(inside, self.guided(x_t, t, cond), plain) if bool(inside.any()) else plain


def _inside(t: Tensor, interval: tuple[float, float], cond: Conditioning) -> Tensor:
    """(R,) -> (L, 1) bool: the tokens whose t is in the interval."""
    return cond.per_token((t >= interval[0]) & (t <= interval[1]))[:, None]


def _guide(combine: Extrapolation, v: Tensor, away: Tensor, channels: int, t: Tensor, cond: Conditioning) -> Tensor:
    """Guide the velocity; what `v` says of the variance stays."""
    guided = combine(v[:, :channels], away[:, :channels], t, cond)
    return guided if v.shape[1] == channels else torch.cat([guided, v[:, channels:]], dim=1)


def _std(x: Tensor, cond: Conditioning) -> Tensor:
    count = x.shape[1] * torch.tensor(cond.lengths, device=x.device).to(x)
    offset = x - _of_samples(sample_sums(x, cond) / count, cond)
    return (sample_sums(offset.square(), cond) / count).sqrt()


def _of_samples(per_sample: Tensor, cond: Conditioning) -> Tensor:
    return per_sample[cond.sample_of_token][:, None]  # (n,) -> (L, 1)
