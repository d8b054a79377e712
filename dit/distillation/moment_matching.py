"""Moment matching in parameter space: a student of few noisy steps whose samples would leave its teacher as it is, were it trained on them.

The student predicts the latents, a point is drawn between them and x_t, and the teacher's own loss there has a gradient by the teacher's
weights. Its mean is zero if the student's latents have the moments of the data that the teacher knows; its squared norm is the loss.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipelines.errors import UserError
from data_pipelines.packed import Conditioning, PackedLatents
from dit.config.distillation import MomentMatchingConfig
from dit.config.objective import ShiftConfig
from dit.diffusion import times
from dit.diffusion.chain import posterior
from dit.diffusion.denoiser import Denoiser
from dit.diffusion.draws import noise_tokens
from dit.diffusion.objectives import noised
from dit.diffusion.paths import on_tokens
from dit.distillation.flow import Walk
from dit.runtime.losses import Losses

RELATIVE_STEP = 1e-3
"""Of the teacher's weights, as a vector, where it is differentiated by them."""


class Weight(NamedTuple):
    """A weight of the teacher's network, and the metric of its gradients: 1 / sqrt of Adam's second moment."""

    value: Tensor
    metric: Tensor


class Points(NamedTuple):
    """What the teacher is asked of one half of a pack: z (L, P) at s (n,), drawn with `latents` (L, P), which are constant here."""

    z: Tensor
    s: Tensor
    latents: Tensor
    cond: Conditioning
    there: Tensor


class MomentMatching:
    """|E gradient|^2 in the metric of Adam (Salimans et al. 2024, arXiv:2406.04103, 4.2): the gradient of one half of a pack times that of
    the other, so that the mean over packs is the square of a mean.

    teacher: frozen, and guided already. weights: those of its network. token_shift: that of its training.
    """

    def __init__(self, config: MomentMatchingConfig, teacher: Denoiser, token_shift: ShiftConfig | None, weights: Sequence[Weight]) -> None:
        assert weights, "moments are taken by the teacher's weights"
        self.config, self.teacher, self.token_shift = config, teacher, token_shift
        self.values = [weight.value.requires_grad_() for weight in weights]
        self.metrics = [weight.metric for weight in weights]

    def __call__(self, student: Denoiser, batch: PackedLatents, progress: float) -> Losses:
        """Loss of each sample, zero for holes: its part of the product of the two gradients. Calls the student once.

        2 (latents - prediction) * (change of the prediction along the other half's gradient); errors weigh 1 / s, so that what the student
        is told of its velocity has one size at all levels.
        """
        upper, lower = self._levels(batch)
        x_t, _, t = noised(batch, upper)
        latents = x_t - on_tokens(t, batch.cond, x_t) * student(x_t, t, batch.cond)[:, : x_t.shape[1]].float()
        z = self._between(x_t, latents.detach(), upper, lower, batch)
        halves = self._halves(z, lower.to(t), latents.detach(), batch)
        gradients = [self._gradient(half) for half in halves]
        found = [self._change(half, other) for half, other in zip(halves, reversed(gradients))]
        prediction, change = (torch.cat(parts) for parts in zip(*found))
        return Losses(batch.cond.per_sample(2 * (latents - prediction) * change) * batch.weights, t)

    def walk(self, t: Tensor, lengths: tuple[int, ...]) -> Walk:
        return Walk.fine(t, torch.zeros_like(t))

    def _levels(self, batch: PackedLatents) -> tuple[Tensor, Tensor]:
        """t, a level of the sampler, and s between it and the next one, (n,) float64."""
        k = times.shifts(batch.cond.lengths, self.token_shift)
        upper, below = (times.uniforms(batch.keys, None, purpose) for purpose in ("time", "jump"))
        upper = (upper * self.config.student_steps).ceil().clamp(min=1)
        lower = (upper - below.clamp(min=1e-3)) / self.config.student_steps
        return times.shift(upper / self.config.student_steps, k), times.shift(lower.clamp(min=1e-3), k)

    def _between(self, x_t: Tensor, latents: Tensor, t: Tensor, s: Tensor, batch: PackedLatents) -> Tensor:
        """x_s ~ q(x_s | x_t, latents), (L, P): as the sampler goes on, not freshly noised."""
        back = posterior(times.RECTIFIED_FLOW, t, s)
        noise = noise_tokens(batch.keys, batch.cond.lengths, x_t.shape[1], "bridge noise").to(x_t)
        of_x, of_latents, std = (on_tokens(part, batch.cond, x_t) for part in (back.of_x, back.of_latents, back.small.sqrt()))
        return of_x * x_t + of_latents * latents + std * noise

    def _halves(self, z: Tensor, s: Tensor, latents: Tensor, batch: PackedLatents) -> list[Points]:
        cond, count = batch.cond, len(batch.keys)
        if count < 2:
            raise UserError("moment_matching compares two halves of a pack, and one has a single sample: raise data.token_budget")
        halves = []
        for samples in (slice(0, count // 2), slice(count // 2, count)):
            tokens = slice(sum(cond.lengths[: samples.start]), sum(cond.lengths[: samples.stop]))
            text = slice(sum(cond.text_lengths[: samples.start]), sum(cond.text_lengths[: samples.stop]))
            labels = None if cond.labels is None else cond.labels[samples]
            part = Conditioning(cond.grids[samples], cond.text[text], cond.text_lengths[samples], None, labels)
            halves.append(Points(z[tokens], s[samples], latents[tokens], part, batch.weights[samples]))
        return halves

    def _gradient(self, half: Points) -> list[Tensor]:
        """Of the teacher's loss, the mean over samples that are there, by its weights; in the metric, the direction that mends it."""
        with torch.enable_grad():
            error = half.latents - self._predicted(half)
            losses = half.cond.per_sample(error.square()) / half.s * half.there
            gradients = torch.autograd.grad(losses.sum() / half.there.sum().clamp(min=1), self.values, allow_unused=True)
        pairs = zip(gradients, self.values, self.metrics, strict=True)
        return [torch.zeros_like(value) if g is None else g * metric for g, value, metric in pairs]

    @torch.no_grad()
    def _change(self, half: Points, direction: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The teacher's prediction (L, P), and its derivative by the weights along `direction`, over -s: a central difference."""
        size = torch.stack([d.square().sum() for d in direction]).sum().sqrt()
        length = torch.stack([value.square().sum() for value in self.values]).sum().sqrt()
        step = RELATIVE_STEP * length / size.clamp(min=1e-30)
        ahead, behind = (self._moved(half, direction, sign * step) for sign in (1, -1))
        return (ahead + behind) / 2, -(ahead - behind) / (2 * step) / on_tokens(half.s, half.cond, ahead)

    def _moved(self, half: Points, direction: Sequence[Tensor], step: Tensor) -> Tensor:
        kept = [value.data for value in self.values]
        try:
            for value, d in zip(self.values, direction, strict=True):
                value.data = value.data + step * d
            return self._predicted(half)
        finally:
            for value, data in zip(self.values, kept, strict=True):
                value.data = data

    def _predicted(self, half: Points) -> Tensor:
        """The latents (L, P) that the teacher sees from z."""
        velocity = self.teacher(half.z, half.s, half.cond)[:, : half.z.shape[1]].float()
        return half.z - on_tokens(half.s, half.cond, half.z) * velocity
