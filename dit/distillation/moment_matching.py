"""Moment matching (Salimans et al. 2024, arXiv:2406.04103): a student of few noisy steps whose latents have the moments of its teacher.

The student predicts the latents, and a point z is drawn between them and x_t. There the mean of the student's latents is to be what the
teacher sees. A critic that learns this mean tells the difference, in turns with the student (4.1). Or the teacher's weights tell it
(4.2): its own loss on the student's latents has a gradient by them, whose mean is zero for matched moments; its squared norm is the loss.
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
from dit.distillation.flow import Objective, Walk, seen
from dit.distillation.networks import turn_of
from dit.runtime.losses import Losses

RELATIVE_STEP = 1e-3
"""Of the teacher's weights, as a vector, where it is differentiated by them."""


class Weight(NamedTuple):
    """A weight of the teacher's network, and the metric of its gradients: 1 / sqrt of Adam's second moment."""

    value: Tensor
    metric: Tensor


class Bridge(NamedTuple):
    """Latents (L, P) that the student predicts from t (n,), with gradient, and z (L, P) between x_t and them at s (n,), without."""

    latents: Tensor
    t: Tensor
    z: Tensor
    s: Tensor


def bridge(student: Denoiser, batch: PackedLatents, upper: Tensor, lower: Tensor) -> Bridge:
    """z ~ q(x_s | x_t, latents), s = lower < t = upper, (n,) float64: as the sampler goes on, not noised afresh. Calls the student once."""
    x_t, _, t = noised(batch, upper)
    latents = x_t - on_tokens(t, batch.cond, x_t) * student(x_t, t, batch.cond)[:, : x_t.shape[1]].float()
    back = posterior(times.RECTIFIED_FLOW, upper, lower)
    noise = noise_tokens(batch.keys, batch.cond.lengths, x_t.shape[1], "bridge noise").to(x_t)
    of_x, of_latents, std = (on_tokens(part, batch.cond, x_t) for part in (back.of_x, back.of_latents, back.small.sqrt()))
    return Bridge(latents, t, of_x * x_t + of_latents * latents.detach() + std * noise, lower.to(t))


def levels(batch: PackedLatents, steps: int, token_shift: ShiftConfig | None) -> tuple[Tensor, Tensor]:
    """t, a level of a sampler of `steps` steps, and s between it and the next one, (n,) float64, drawn by key."""
    k = times.shifts(batch.cond.lengths, token_shift)
    upper, below = (times.uniforms(batch.keys, None, purpose) for purpose in ("time", "jump"))
    upper = (upper * steps).ceil().clamp(min=1)
    lower = (upper - below.clamp(min=1e-3)) / steps
    return times.shift(upper / steps, k), times.shift(lower.clamp(min=1e-3), k)


class AlternatingMoments:
    """With a critic f: E|latents - f|^2 + |f_teacher - f|^2 is least halfway between the mean of the student's latents and f_teacher.

    Both losses weigh 1 / s, as in parameter space: errors of latents are s times those of velocities, so that what the student is told of
    its velocity has one size at all levels. f_teacher is guided in both, or f would not meet it where the moments match.
    """

    def __init__(self, config: MomentMatchingConfig, teacher: Denoiser, critic: Denoiser, token_shift: ShiftConfig | None) -> None:
        assert config.critic is not None
        self.config, self.steps = config, config.critic.steps
        self.teacher, self.critic, self.token_shift = teacher, critic, token_shift

    def at(self, step: int) -> Objective:
        """The objective of step number `step`."""
        return self.student_losses if turn_of(step, self.steps).network == "student" else self.critic_losses

    def student_losses(self, student: Denoiser, batch: PackedLatents, progress: float) -> Losses:
        """A loss with the gradient (f_critic - f_teacher) / s in the latents. Its value is half of the square of that gradient.

        Calls the student once.
        """
        latents, t, z, s = self._bridge(student, batch)
        cond = batch.cond
        with torch.no_grad():
            gradient = (seen(self.critic, z, s, cond) - seen(self.teacher, z, s, cond)) / on_tokens(s, cond, z)
        square = cond.per_sample(gradient.square())
        loss = cond.per_sample(gradient * (latents - latents.detach())) + square / 2
        return Losses(loss * batch.weights, t, {"matching_gradient": square.sqrt().masked_fill(batch.weights == 0, torch.nan)})

    def critic_losses(self, student: Denoiser, batch: PackedLatents, progress: float) -> Losses:
        """Squared errors of what the critic sees, to the student's latents and to the teacher's. Calls the student without gradient."""
        with torch.no_grad():
            latents, _, z, s = self._bridge(student, batch)
            known = seen(self.teacher, z, s, batch.cond)
        found = seen(self.critic, z, s, batch.cond)
        of_student, of_teacher = (batch.cond.per_sample((target - found).square()) / s for target in (latents, known))
        figures = {"critic_error": of_student.detach().masked_fill(batch.weights == 0, torch.nan)}
        return Losses((of_student + of_teacher) * batch.weights, s, figures)

    def walk(self, t: Tensor, lengths: tuple[int, ...]) -> Walk:
        return Walk.fine(t, torch.zeros_like(t))

    def _bridge(self, student: Denoiser, batch: PackedLatents) -> Bridge:
        return bridge(student, batch, *levels(batch, self.config.student_steps, self.token_shift))


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
        self.length = norm([value.detach() for value in self.values])

    def __call__(self, student: Denoiser, batch: PackedLatents, progress: float) -> Losses:
        """Loss of each sample, zero for holes: its part of the product of the two gradients. Calls the student once.

        2 (latents - prediction) * (change of the prediction along the other half's gradient); errors weigh 1 / s, so that what the student
        is told of its velocity has one size at all levels.
        """
        latents, t, z, s = bridge(student, batch, *levels(batch, self.config.student_steps, self.token_shift))
        halves = self._halves(z, s, latents.detach(), batch)
        gradients = [self._gradient(half) for half in halves]
        found = [self._change(half, other) for half, other in zip(halves, reversed(gradients))]
        prediction, change = (torch.cat(parts) for parts in zip(*found))
        return Losses(batch.cond.per_sample(2 * (latents - prediction) * change) * batch.weights, t)

    def walk(self, t: Tensor, lengths: tuple[int, ...]) -> Walk:
        return Walk.fine(t, torch.zeros_like(t))

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
        step = RELATIVE_STEP * self.length / max(norm(direction), 1e-30)
        ahead, behind = (self._moved(half, direction, sign * step) for sign in (1, -1))
        return (ahead + behind) / 2, -(ahead - behind) / (2 * step) / on_tokens(half.s, half.cond, ahead)

    def _moved(self, half: Points, direction: Sequence[Tensor], step: float) -> Tensor:
        kept = [value.data for value in self.values]
        try:
            for value, d in zip(self.values, direction, strict=True):
                value.data = value.data.add(d, alpha=step)  # one pass over both
            return self._predicted(half)
        finally:
            for value, data in zip(self.values, kept, strict=True):
                value.data = data

    def _predicted(self, half: Points) -> Tensor:
        return seen(self.teacher, half.z, half.s, half.cond)


def norm(tensors: Sequence[Tensor]) -> float:
    """Of all of them as one vector."""
    return float(torch.nn.utils.get_total_norm(tensors))
