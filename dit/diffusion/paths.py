"""The path from data to noise: rectified flow (Liu et al. 2022, arXiv:2209.03003, eq. 1), x_t = (1 - t) latents + t noise.

Owns the signs. t is 0 at the data and 1 at the noise; it broadcasts against the tokens, so for (L, P) tokens it is (L, 1).
Must not know networks, draws or losses.
"""

from torch import Tensor


def interpolate(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Noise `latents` (L, P) to the level t (L, 1)."""
    return (1 - t) * latents + t * noise


def velocity_of(latents: Tensor, noise: Tensor) -> Tensor:
    """The slope d x_t / d t of the path, (L, P)."""
    return noise - latents


def latents_of(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """The end of the path at t = 0 on the line through x_t (L, P) with `velocity` (L, P)."""
    return x_t - t * velocity


def noise_of(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """The end of the path at t = 1 on the line through x_t (L, P) with `velocity` (L, P)."""
    return x_t + (1 - t) * velocity
