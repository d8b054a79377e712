"""How well a denoiser does on samples it was not trained on, at fixed noise and fixed levels, so that figures can be compared."""

from collections.abc import Sequence

import torch

from data_pipelines.packed import PackedLatents
from dit.diffusion.denoiser import Denoiser
from dit.diffusion.objectives import noised, velocity_losses
from dit.diffusion.paths import velocity_of


@torch.no_grad()
def held_out_loss(denoiser: Denoiser, batches: Sequence[PackedLatents], times: Sequence[float]) -> dict[float, float]:
    """Mean squared velocity error at each of `times`, over the samples of all `batches` that are no holes.

    Every sample keeps one noise, drawn by its key, at all levels; conditions are never dropped.
    """
    losses = dict.fromkeys(times, 0.0)
    samples = sum(float(batch.weights.sum()) for batch in batches)
    assert samples > 0, "no sample to evaluate"
    for batch in batches:
        for level in times:
            x_t, noise, t = noised(batch, torch.full((len(batch.keys),), level, dtype=torch.float64))
            result = velocity_losses(denoiser(x_t, t, batch.cond), velocity_of(batch.tokens, noise), batch, t)
            losses[level] += float(result.per_sample.double().sum())
    return {level: loss / samples for level, loss in losses.items()}
