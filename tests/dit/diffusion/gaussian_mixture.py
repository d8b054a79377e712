"""A mixture of Gaussians with a closed-form velocity: the truth that samplers and objectives are measured against."""

from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipelines.packed import Conditioning, PackedLatents, pack_conditioning


@dataclass(frozen=True)
class GaussianMixture:
    """Data of isotropic components: means (K, P), one standard deviation each (K,), weights (K,). It is a denoiser."""

    means: Tensor
    stds: Tensor
    weights: Tensor

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """E[noise - latents | x_t = x] for x (L, P), t (L, 1): by each component's posterior, weighted by its likelihood."""
        means, stds = self.means.to(x), self.stds.to(x)
        variance = (1 - t) ** 2 * stds**2 + t**2  # (L, K)
        offset = x[:, None] - (1 - t)[..., None] * means  # (L, K, P)
        log_likelihood = -offset.square().sum(-1) / (2 * variance) - x.shape[1] / 2 * variance.log() + self.weights.to(x).log()
        slope = (t - (1 - t) * stds**2) / variance  # d log(std of x_t) / dt
        each = -means + slope[..., None] * offset  # (L, K, P)
        return (log_likelihood.softmax(1)[..., None] * each).sum(1)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self.velocity(x_t, cond.per_token(t)[:, None])

    def draw(self, count: int, seed: int) -> Tensor:
        """(count, P) samples of the data."""
        rng = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.weights.float(), count, replacement=True, generator=rng)
        return (self.means[which] + self.stds[which, None] * torch.randn(count, self.means.shape[1], generator=rng)).float()


def points(count: int, text_width: int = 4) -> Conditioning:
    """Conditioning of `count` samples of one token each, with one zero text token."""
    return pack_conditioning([(1, 1, 1)] * count, [torch.zeros(1, text_width)] * count)


def pack_of_points(latents: Tensor, first_key: int) -> PackedLatents:
    """Samples of one token each: latents (n, P), keys counted from `first_key`."""
    count = len(latents)
    ids = tuple(f"point/{i}" for i in range(count))
    return PackedLatents(latents, points(count), tuple(range(first_key, first_key + count)), ids, torch.ones(count))
