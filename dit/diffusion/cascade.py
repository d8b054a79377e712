"""The second stage of a cascade: a network that is told what its samples look like at a lower resolution.

The lower resolution is noised to a level of its own, which the network is told too, so that the stage learns to overlook the errors of
the stage before (conditioning augmentation, Ho et al. 2021, arXiv:2106.15282, section 4.2). Both go beside x_t as channels: any backbone
takes them.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.packed import Conditioning, Grid, PackedLatents, patchify, unpack
from dit.diffusion.denoiser import Denoiser
from dit.diffusion.draws import noise_tokens
from dit.diffusion.objectives import Regression
from dit.diffusion.paths import Path, on_tokens
from dit.diffusion.times import uniforms
from dit.runtime.losses import Losses


def lowered(tokens: Tensor, cond: Conditioning, patch: Grid, factor: int) -> Tensor:
    """What is left of the latents of tokens (L, P) at a resolution `factor` times lower, at the size they have: (L, P).

    Raises ValueError where rows or columns are no multiple of the factor.
    """
    parts = []
    for latents in unpack(tokens, cond, patch):
        height, width = latents.shape[2:]
        if height % factor or width % factor:
            raise ValueError(f"latents of {height} x {width} are not multiples of {factor}")
        low = F.avg_pool2d(latents.transpose(0, 1), factor)  # (T, C, H / factor, W / factor)
        whole = F.interpolate(low, size=(height, width), mode="bicubic", align_corners=False)
        parts.append(patchify(whole.transpose(0, 1), patch))
    return torch.cat(parts)


class Upsampler:
    """A network that is told `low` (L, P) at the levels (n,): to the outside a network of x_t alone. keys: of the samples.

    network: a backbone of 2 C + 1 channels, of whose answer the first C count. Guidance may call it with several copies of the pack.
    """

    def __init__(
        self, network: Denoiser, path: Path, patch: Grid, low: Tensor, level: Tensor, cond: Conditioning, keys: Sequence[int]
    ) -> None:
        noise = noise_tokens(keys, cond.lengths, low.shape[1], "augmentation").to(low)
        seen, scale = path.interpolate(low, noise, level, cond), path.input_scale(level)
        seen = seen if scale is None else on_tokens(scale, cond, seen) * seen
        self.network = network
        self.beside = torch.cat([seen, on_tokens(path.label(level), cond, seen).expand(-1, math.prod(patch))], dim=1)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        beside = self.beside.repeat(len(x_t) // len(self.beside), 1).to(x_t)
        return self.network(torch.cat([x_t, beside], dim=1), t, cond)[:, : x_t.shape[1]]


class Cascade:
    """Train the network of an objective to be an `Upsampler` by `factor`, at levels drawn evenly up to `most` by each sample's key."""

    def __init__(self, objective: Regression, patch: Grid, factor: int, most: float) -> None:
        self.objective, self.patch, self.factor, self.most = objective, patch, factor, most

    def __call__(self, network: Denoiser, batch: PackedLatents, progress: float) -> Losses:
        """Loss of each sample, zero for holes. network: raw, one call of it."""
        level = self.most * uniforms(batch.keys, None, "augmentation level").to(batch.tokens.device)
        low = lowered(batch.tokens, batch.cond, self.patch, self.factor)
        return self.objective(Upsampler(network, self.objective.path, self.patch, low, level, batch.cond, batch.keys), batch, progress)
