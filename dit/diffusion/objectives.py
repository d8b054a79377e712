"""What a denoiser is trained for. An objective owns its draws of t, noise and dropped conditions, all keyed by sample.

Must not know how the denoiser is built, sharded or optimised. `progress` in [0, 1] is the part of the run that is done.
"""

from typing import Protocol

import torch
from torch import Tensor

from data_pipelines import randomness
from data_pipelines.packed import Conditioning, PackedLatents
from dit.config.objective import RectifiedFlowConfig
from dit.diffusion import times
from dit.diffusion.denoiser import Denoiser
from dit.diffusion.draws import noise_tokens
from dit.diffusion.paths import interpolate, velocity_of
from dit.runtime.losses import Losses


class Objective(Protocol):
    """Loss of each sample of a pack under `denoiser`."""

    def __call__(self, denoiser: Denoiser, batch: PackedLatents, progress: float, /) -> Losses: ...


class RectifiedFlow:
    """Regress the velocity: E |v(x_t, t, c) - (noise - latents)|^2 (Liu et al. 2022, arXiv:2209.03003, eq. 1).

    null_text: (S0, D) text tokens that stand for "no caption". null_label: class that stands for "no class", if there are classes.
    """

    def __init__(self, config: RectifiedFlowConfig, null_text: Tensor, null_label: int | None) -> None:
        self.config = config
        self.null_text = null_text
        self.null_label = null_label

    def __call__(self, denoiser: Denoiser, batch: PackedLatents, progress: float) -> Losses:
        """Mean squared velocity error over the tokens and channels of each sample, zero for holes. Takes one call of the network."""
        x_t, noise, t = noised(batch, times.draw(self.config.times, self.config.shift, batch.keys, batch.cond.lengths))
        cond = drop_conditions(batch.cond, batch.keys, self.config.condition_dropout, self.null_text, self.null_label)
        velocity = denoiser(x_t, t, cond)
        return velocity_losses(velocity, velocity_of(batch.tokens, noise), batch, t)


def noised(batch: PackedLatents, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Noise a pack to `levels` (n,): x_t (L, P), noise (L, P) and t (n,) float32, on the device of the pack."""
    assert batch.cond.rows is None, "objectives draw one level a sample"
    latents = batch.tokens
    noise = noise_tokens(batch.keys, batch.cond.lengths, latents.shape[1], "noise").to(latents.device, non_blocking=True)
    t = levels.float().to(latents.device, non_blocking=True)
    return interpolate(latents, noise, batch.cond.per_token(t)[:, None]), noise, t


def velocity_losses(velocity: Tensor, target: Tensor, batch: PackedLatents, t: Tensor) -> Losses:
    """Squared error of `velocity` (L, P), in float32 whatever the network computes in."""
    error = (velocity.float() - target.float()).square()
    return Losses(batch.cond.per_sample(error) * batch.weights, t)


def drop_conditions(cond: Conditioning, keys: tuple[int, ...], fraction: float, null_text: Tensor, null_label: int | None) -> Conditioning:
    """Replace text and label of the samples that draw below `fraction`, so that one network learns v_cond and v_null."""
    dropped = [randomness.uniform(key, "condition") < fraction for key in keys]
    if not any(dropped):
        return cond
    null_text = null_text.to(cond.text)
    texts = [null_text if drop else text for drop, text in zip(dropped, cond.text.split(cond.text_lengths), strict=True)]
    return cond.with_text(texts, _drop_labels(cond.labels, dropped, null_label))


def _drop_labels(labels: Tensor | None, dropped: list[bool], null_label: int | None) -> Tensor | None:
    if labels is None:
        return None
    assert null_label is not None, "labels without a null label"
    return labels.masked_fill(torch.tensor(dropped, device=labels.device), null_label)
