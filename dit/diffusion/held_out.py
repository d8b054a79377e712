"""How well a denoiser does on samples it was not trained on, at fixed noise and fixed levels, so that figures can be compared."""

from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipelines.packed import PackedLatents
from dit.diffusion.denoiser import Denoiser
from dit.diffusion.objectives import noised, velocity_losses
from dit.diffusion.paths import velocity_of


@torch.no_grad()
def held_out_loss(denoiser: Denoiser, batches: Sequence[PackedLatents], times: Sequence[float]) -> Tensor:
    """Mean squared velocity error of every sample of `batches` at each of `times`: (levels, n) float64 on the CPU, NaN for holes.

    Every sample keeps one noise, drawn by its key, at all levels; conditions are never dropped.
    """
    losses = []
    for batch in batches:
        for level in times:
            x_t, noise, t = noised(batch, torch.full((len(batch.keys),), level, dtype=torch.float64))
            result = velocity_losses(denoiser(x_t, t, batch.cond), velocity_of(batch.tokens, noise), batch, t)
            losses.append(result.per_sample.double().masked_fill(batch.weights == 0, torch.nan).cpu())
    return torch.cat([torch.stack(losses[i : i + len(times)]) for i in range(0, len(losses), len(times))], dim=1)
