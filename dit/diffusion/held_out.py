"""How well a denoiser does on samples it was not trained on, at fixed noise and fixed levels, so that figures can be compared."""

from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipelines.packed import PackedLatents
from dit.diffusion.denoiser import Denoiser
from dit.diffusion.objectives import noised
from dit.diffusion.times import RECTIFIED_FLOW


@torch.no_grad()
def held_out_loss(denoiser: Denoiser, batches: Sequence[PackedLatents], times: Sequence[float]) -> Tensor:
    """Mean squared velocity error on rectified flow of every sample of `batches` at each of `times`: (levels, n) float64 on the CPU.

    NaN for holes.

    Every sample keeps one noise, drawn by its key, at all levels; conditions are never dropped.
    """
    losses = []
    for batch in batches:
        for level in times:
            x_t, noise, t = noised(batch, torch.full((len(batch.keys),), level, dtype=torch.float64))
            velocity = denoiser(x_t, t, batch.cond)[:, : x_t.shape[1]]
            error = (velocity.float() - RECTIFIED_FLOW.target("velocity", batch.tokens, noise, t, batch.cond)).square()
            losses.append(batch.cond.per_sample(error).double().masked_fill(batch.weights == 0, torch.nan).cpu())
    return torch.cat([torch.stack(losses[i : i + len(times)]) for i in range(0, len(losses), len(times))], dim=1)
