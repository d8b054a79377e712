"""Mean flow: a student of two times that knows the mean velocity u(x_t, t, r) from any level t to any r <= t.

One jump is x_r = x_t - (t - r) u, so a chain of jumps is Euler's rule, without fresh noise and in any number of steps; at r = t the
student is a denoiser like any other.
"""

import torch
from torch import Tensor

from data_pipelines.packed import PackedLatents
from dit.config.distillation import MeanFlowConfig
from dit.config.objective import ShiftConfig
from dit.diffusion import times
from dit.diffusion.denoiser import Denoiser
from dit.diffusion.objectives import noised
from dit.diffusion.paths import on_tokens
from dit.distillation.flow import Walk, derivative, flow_of
from dit.runtime.losses import Losses


class MeanFlow:
    """Regress u on v - (t - r) du/dt, which it equals (Geng et al. 2025, arXiv:2505.13447, eqs. 6 and 11), v the velocity of the flow.

    teacher: frozen, and guided already. token_shift: that of the teacher's training.
    """

    def __init__(self, config: MeanFlowConfig, teacher: Denoiser, token_shift: ShiftConfig | None) -> None:
        self.config, self.teacher, self.token_shift = config, teacher, token_shift

    def __call__(self, student: Denoiser, batch: PackedLatents, progress: float) -> Losses:
        """Loss of each sample, zero for holes. Calls the student three times, once with gradient."""
        config = self.config
        upper, lower = self._levels(batch)
        x_t, noise, t = noised(batch, upper)
        jump = (upper - lower).to(t)
        cond = batch.cond.over(jump)
        with torch.no_grad():
            velocity = flow_of(config.flow, self.teacher, batch, noise)(x_t, t, batch.cond).float()
        rate = derivative(student, x_t, t, velocity, cond, config.derivative, config.step)
        target = velocity - on_tokens(jump, cond, rate) * rate
        squared = cond.per_sample((student(x_t, t, cond).float() - target).square())
        weight = (squared.detach() + config.constant) ** -config.power
        error, is_plain, is_hole = squared.detach(), jump == 0, batch.weights == 0
        figures = {
            "velocity_error": error.masked_fill(~is_plain | is_hole, torch.nan),
            "jump_error": error.masked_fill(is_plain | is_hole, torch.nan),
        }
        return Losses(weight * squared * batch.weights, t, figures)

    def walk(self, t: Tensor, lengths: tuple[int, ...]) -> Walk:
        return Walk.fine(t, torch.zeros_like(t))

    def _levels(self, batch: PackedLatents) -> tuple[Tensor, Tensor]:
        """t and r of each sample, (n,) float64: two draws in order, the same draw twice for `plain_fraction` of the samples."""
        drawn = [times.from_uniform(self.config.times, times.uniforms(batch.keys, None, purpose)) for purpose in ("time", "jump")]
        plain = times.uniforms(batch.keys, None, "plain") < self.config.plain_fraction
        first, second = drawn[0], torch.where(plain, drawn[0], drawn[1])
        k = times.shifts(batch.cond.lengths, self.token_shift)
        return times.shift(torch.maximum(first, second), k), times.shift(torch.minimum(first, second), k)
