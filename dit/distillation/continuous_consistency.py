"""Consistency in continuous time: the limit of a vanishing gap, which needs the student's derivative along the flow instead of a target.

Stated on the rectified-flow path for f(x, t) = x - t v(x, t). The published form is on the trigonometric path, which holds the same
samples at another scale, x (cos + sin), and time, tan = t / (1 - t); both have the same f.
"""

import torch
from torch import Tensor

from data_pipelines.packed import PackedLatents
from dit.config.distillation import ContinuousConsistencyConfig, ScoreRegularisedConfig
from dit.config.objective import ShiftConfig
from dit.diffusion import times
from dit.diffusion.denoiser import Denoiser
from dit.diffusion.objectives import noised
from dit.diffusion.paths import on_tokens
from dit.distillation.flow import Walk, derivative, flow_of
from dit.runtime.losses import Losses


class ContinuousConsistency:
    """|F - stopped F - g / (rms(g) + c)|^2 with the tangent g = cos df/dangle (Lu & Song 2024, arXiv:2410.11081, algorithm 1).

    With a normalised tangent the loss is the same at every t, so the weight that they learn would only undo their prior weight: the
    times drawn are the weight, and nothing is learned beside the student. Warm-up scales t dv/dt, which they scale in their
    coordinates; both begin with the velocity of the flow and end at the same g.
    """

    def __init__(
        self, config: ContinuousConsistencyConfig | ScoreRegularisedConfig, teacher: Denoiser, token_shift: ShiftConfig | None
    ) -> None:
        self.config, self.teacher, self.token_shift = config, teacher, token_shift

    def __call__(self, student: Denoiser, batch: PackedLatents, progress: float) -> Losses:
        """Loss of each sample, zero for holes. Calls the student three times, once with gradient.

        Its value says little, for g is normalised: look at `tangent_norm`, the root mean square of g before, 0 for the exact student.
        """
        config = self.config
        x_t, noise, t = noised(batch, times.draw(config.times, self.token_shift, batch.keys, batch.cond.lengths))
        cond = batch.cond.over(t)
        with torch.no_grad():
            velocity = flow_of(config.flow, self.teacher, batch, noise)(x_t, t, batch.cond).float()
        rate = derivative(student, x_t, t, velocity, cond, config.derivative, config.step)
        answer = student(x_t, t, cond).float()
        part = min(1.0, progress / config.warmup) if config.warmup else 1.0
        to_angle = (t.square() + (1 - t).square()).sqrt()  # dF/dv = 1 / (cos + sin), whose square is dt/dangle
        change = velocity - answer.detach() - part * on_tokens(t, cond, rate) * rate  # df/dt
        tangent = on_tokens((1 - t) * to_angle, cond, rate) * change
        norm = cond.per_sample(tangent.square()).sqrt()  # (n,)
        goal = answer.detach() * on_tokens(to_angle, cond, rate) + tangent / on_tokens(norm + config.constant, cond, rate)
        squared = cond.per_sample((on_tokens(to_angle, cond, rate) * answer - goal).square())
        return Losses(squared * batch.weights, t, {"tangent_norm": norm.masked_fill(batch.weights == 0, torch.nan)})

    def walk(self, t: Tensor, lengths: tuple[int, ...]) -> Walk:
        return Walk.fine(t, torch.zeros_like(t))
