"""How well a denoiser does on samples it was not trained on, at fixed noise and fixed levels, so that figures can be compared."""

from collections.abc import Sequence

import torch

from data_pipelines.packed import PackedLatents
from dit.diffusion.denoiser import Denoiser
from dit.diffusion.objectives import noised
from dit.diffusion.times import RECTIFIED_FLOW


@torch.no_grad()
def held_out_loss(denoiser: Denoiser, batches: Sequence[PackedLatents], times: Sequence[float]) -> dict[float, float]:
    """Mean squared velocity error on rectified flow at each of `times`, over the samples of all `batches` that are no holes.

    Every sample keeps one noise, drawn by its key, at all levels; conditions are never dropped.
    """
    losses = dict.fromkeys(times, 0.0)
    samples = sum(float(batch.weights.sum()) for batch in batches)
    assert samples > 0, "no sample to evaluate"
    for batch in batches:
        for level in times:
            x_t, noise, t = noised(batch, torch.full((len(batch.keys),), level, dtype=torch.float64))
            velocity = denoiser(x_t, t, batch.cond)[:, : x_t.shape[1]]
            error = (velocity.float() - RECTIFIED_FLOW.target("velocity", batch.tokens, noise, t, batch.cond)).square()
            losses[level] += float((batch.cond.per_sample(error) * batch.weights).double().sum())
    return {level: loss / samples for level, loss in losses.items()}
