"""What a denoiser is trained for. An objective owns its draws of t, noise and dropped conditions, all keyed by sample.

Must not know how the denoiser is built, sharded or optimised. `progress` in [0, 1] is the part of the run that is done.
"""

from typing import Protocol

import torch
from torch import Tensor

from data_pipelines import randomness
from data_pipelines.packed import Conditioning, InStep, PackedLatents
from dit.config.objective import DiffusionConfig, RectifiedFlowConfig
from dit.diffusion import times
from dit.diffusion.clean_tokens import beside_clean, draw_clean
from dit.diffusion.denoiser import Denoiser, ask
from dit.diffusion.draws import noise_tokens
from dit.diffusion.paths import Path, build_path
from dit.diffusion.weighting import weight_of
from dit.runtime.losses import Losses


class Objective(Protocol):
    """Loss of each sample of a pack under `denoiser`."""

    def __call__(self, denoiser: Denoiser, batch: PackedLatents, progress: float, /) -> Losses: ...


class Regression:
    """Regress what the network predicts: E w(t) |target(x_t, t) - answer|^2; for rectified flow E |(noise - latents) - v|^2.

    One objective for every path, prediction, weighting and distance (Kingma & Gao 2023, arXiv:2303.00848, eq. 7).
    null_text: (S0, D) text tokens that stand for "no caption". null_label: class that stands for "no class", if there are classes.
    """

    def __init__(self, config: RectifiedFlowConfig | DiffusionConfig, null_text: Tensor, null_label: int | None) -> None:
        self.config = config
        self.path = build_path(config.path)
        self.null_text = null_text
        self.null_label = null_label

    def __call__(self, denoiser: Denoiser, batch: PackedLatents, progress: float) -> Losses:
        """Loss of each sample, zero for holes, and the t of its noised tokens. denoiser: the raw network, one call of it."""
        config = self.config
        place = batch.place or InStep(0, len(batch.keys), batch.keys[0])
        stratum = place if config.stratified else None
        levels = times.draw(config.times, config.shift, batch.keys, batch.cond.lengths, self.path, stratum)
        x_t, noise, t = noised(batch, levels, self.path)
        cond = drop_conditions(batch.cond, batch.keys, config.condition_dropout, self.null_text, self.null_label)
        clean = draw_clean(config.clean_tokens, batch.keys, batch.cond.grids)
        told = (x_t, t, cond) if clean is None else beside_clean(x_t, t, cond, clean.to(x_t.device), batch.tokens, t.new_zeros(1))
        answer = ask(denoiser, self.path, *told)
        target = self.path.target(config.prediction, batch.tokens, noise, t, batch.cond)
        squared = (answer.float() - target.float()).square()  # (L, P), in float32 whatever the network computes in
        error = batch.cond.per_sample(squared)  # (n,)
        if clean is not None:  # the mean over the noised tokens
            there = (~clean).to(squared)[:, None]
            error = batch.cond.per_sample(squared * there) / batch.cond.per_sample(there)
        space, weight = weight_of(config.weighting, config.prediction, self.path, t)
        error = error * self.path.conversion(config.prediction, space, t)[1].square().to(error)
        return Losses(weight.to(error) * distance(error, config.huber) * batch.weights, t)


def distance(squared: Tensor, huber: float) -> Tensor:
    """Squared error, or the pseudo-Huber sqrt(error^2 + c^2) - c (Song & Dhariwal 2023, arXiv:2310.14189, eq. 8), per dimension."""
    return squared if huber == 0 else (squared + huber**2).sqrt() - huber


def noised(batch: PackedLatents, levels: Tensor, path: Path = times.RECTIFIED_FLOW) -> tuple[Tensor, Tensor, Tensor]:
    """Noise a pack to `levels` (n,): x_t (L, P), noise (L, P) and t (n,) float32, on the device of the pack."""
    assert batch.cond.rows is None, "objectives draw one level a sample"
    latents = batch.tokens
    noise = noise_tokens(batch.keys, batch.cond.lengths, latents.shape[1], "noise").to(latents.device, non_blocking=True)
    t = levels.float().to(latents.device, non_blocking=True)
    return path.interpolate(latents, noise, t, batch.cond), noise, t


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
