"""Progressive distillation: one step of the student stands for several of its teacher, which may be such a student itself.

A student knows the levels of its own sampler only. A run is one stage, so that each is a run directory that can be sampled and judged.
"""

import torch
from torch import Tensor

from data_pipelines.packed import PackedLatents
from dit.config.distillation import ProgressiveConfig
from dit.config.objective import ShiftConfig
from dit.diffusion import times
from dit.diffusion.denoiser import Denoiser
from dit.diffusion.objectives import noised
from dit.diffusion.samplers import euler, euler_slope
from dit.distillation.flow import Walk, follow
from dit.runtime.losses import Losses


class Progressive:
    """Regress the mean velocity of the teacher's steps (Salimans & Ho 2022, arXiv:2202.00512, algorithm 2, with Euler's rule).

    The error is that of the velocity, so that all levels count alike. teacher: frozen, and guided already. token_shift: that of the
    teacher's training, for student and teacher step between the levels of a sampler.
    """

    def __init__(self, config: ProgressiveConfig, teacher: Denoiser, token_shift: ShiftConfig | None) -> None:
        self.config, self.teacher, self.token_shift = config, teacher, token_shift

    def __call__(self, student: Denoiser, batch: PackedLatents, progress: float) -> Losses:
        """Loss of each sample, zero for holes. Calls the student once."""
        levels = self._levels(times.uniforms(batch.keys, None), batch.cond.lengths)
        x_t, _, t = noised(batch, levels[0])
        _, mean = follow(self.teacher, x_t, levels, batch.cond, euler_slope)
        error = (euler_slope(student, x_t, t, levels[-1].to(t), batch.cond).float() - mean).square()
        return Losses(batch.cond.per_sample(error) * batch.weights, t)

    def walk(self, t: Tensor, lengths: tuple[int, ...]) -> Walk:
        return Walk(self._levels(times.shift(t, 1 / times.shifts(lengths, self.token_shift)), lengths), euler)

    def _levels(self, u: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """The levels that the teacher visits in the student's step around `u` (n,): (teacher_steps + 1, n) float64, falling."""
        steps, parts = self.config.student_steps, self.config.teacher_steps
        upper = (u * steps - 1e-9).ceil().clamp(min=1)  # a level begins the step below it
        grid = (upper - torch.arange(parts + 1, dtype=torch.float64)[:, None] / parts) / steps
        return times.shift(grid, times.shifts(lengths, self.token_shift))
