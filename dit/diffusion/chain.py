"""The steps of a diffusion chain as Gaussians: forward kernel, posterior and reverse step between any two levels of any path.

DDPM is the case of a vp path and levels i / T. Source: Ho et al. 2020, arXiv:2006.11239, eqs. 4 to 7; for general a and b Kingma
et al. 2021, arXiv:2107.00630, appendix A.
"""

from typing import Literal, NamedTuple, assert_never

import torch
from torch import Tensor

from dit.diffusion.paths import Path

Variance = Literal["small", "large", "learned"]


class Posterior(NamedTuple):
    """q(x_s | x_t, latents) = N(of_x x_t + of_latents latents, small), float64. large: the variance of q(x_t | x_s)."""

    of_x: Tensor
    of_latents: Tensor
    small: Tensor
    large: Tensor


def posterior(path: Path, t: Tensor, s: Tensor) -> Posterior:
    """The step back from t to s < t, (R,) each."""
    c, d = path.at(t), path.at(s)
    kept = c.a / d.a
    large = c.b.square() - (kept * d.b).square()
    rest = (d.b / c.b).square()
    return Posterior(kept * rest, d.a * large / c.b.square(), large * rest, large)


def log_variance(step: Posterior, variance: Variance, between: Tensor | None) -> Tensor:
    """ln of the variance of the reverse step, to broadcast against tokens where it is learned.

    between: what the network says, -1 for `small` and 1 for `large` (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15).
    """
    match variance:
        case "small":
            return step.small.log()
        case "large":
            return step.large.log()
        case "learned":
            assert between is not None
            return torch.lerp(step.small.log(), step.large.log(), (between.to(step.small) + 1) / 2)
        case _:
            assert_never(variance)


def gaussian_kl(mean: Tensor, log_var: Tensor, other_mean: Tensor, other_log_var: Tensor) -> Tensor:
    """KL(N(mean, e^log_var) | N(other_mean, e^other_log_var)) in nats, elementwise."""
    spread = log_var - other_log_var
    return (spread.exp() - 1 - spread + (mean - other_mean).square() * (-other_log_var).exp()) / 2
