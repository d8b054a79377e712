"""Matched distributions: a student whose noised samples have the teacher's score, as far as a critic that learns theirs can tell."""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.packed import Conditioning, PackedLatents
from dit.config.distillation import ScoreCriticConfig, ScoreRegularisedConfig
from dit.config.objective import ShiftConfig
from dit.diffusion import times
from dit.diffusion.denoiser import Denoiser
from dit.diffusion.draws import noise_tokens
from dit.diffusion.objectives import noised
from dit.diffusion.paths import on_tokens
from dit.distillation.adversarial import judged
from dit.distillation.continuous_consistency import ContinuousConsistency
from dit.distillation.flow import Objective, Walk
from dit.distillation.networks import Discriminator, turn_of
from dit.runtime.losses import Losses


class DistributionMatching:
    """Lower KL(student || teacher) at all levels, by the difference of two scores (DMD2, Yin et al. 2024, arXiv:2405.14867).

    The critic is told the jump of the student's last step. Samples of 1, 2, ... steps are different distributions, and one score of them
    all, as published, asks no more than that their mixture be the data. On 256 modes, four steps, 3,000 updates, the four were 0.38, 0.20,
    0.32 and 0.23 from the data in Wasserstein-2 so, their mixture 0.07; told, they are 0.08, 0.07, 0.07 and 0.06.

    teacher: frozen, and guided already. critic: learns the velocity of what the student makes, without guidance. judge: heads that tell
    it from data, or None. token_shift: that of the teacher's training, for the student makes samples as its sampler will.
    """

    def __init__(
        self,
        config: ScoreCriticConfig,
        student_steps: int,
        teacher: Denoiser,
        critic: Denoiser,
        judge: Discriminator | None,
        token_shift: ShiftConfig | None,
    ) -> None:
        self.config, self.student_steps, self.token_shift = config, student_steps, token_shift
        self.teacher, self.critic, self.judge = teacher, critic, judge

    def at(self, step: int) -> Objective:
        """The objective of step number `step`."""
        turn = turn_of(step, self.config.steps)
        return partial(self.student_losses if turn.network == "student" else self.critic_losses, turn.number)

    def student_losses(self, number: int, student: Denoiser, batch: PackedLatents, progress: float) -> Losses:
        """A loss with the gradient (f_critic - f_teacher) / mean|x - f_teacher| in the sample x, f the latents that each sees in it noised.

        Its value is half of the square of that gradient, which says how far critic and teacher are apart. Calls the student up to
        `student_steps` times, once with gradient.
        """
        made, cond = self.make(student, batch, number), batch.cond
        x_t, _, t = noised(replace(batch, tokens=made.detach()), self._levels(batch))
        with torch.no_grad():
            answers = self.teacher(x_t, t, cond), self.critic(x_t, t, self._told(batch, number))
            real, fake = (answer[:, : x_t.shape[1]].float() for answer in answers)
        level = on_tokens(t, cond, x_t)
        size = cond.per_sample((made.detach() - (x_t - level * real)).abs())
        gradient = level * (real - fake) / on_tokens(size, cond, x_t)
        square = cond.per_sample(gradient.square())
        sound = square.isfinite()
        gradient = gradient.where(sound[cond.sample_of_token][:, None], 0)
        loss = cond.per_sample(gradient * (made - made.detach())) + square.where(sound, 0) / 2
        lost = (~sound).float().masked_fill(batch.weights == 0, torch.nan)
        figures = {"matching_gradient": square.sqrt().masked_fill(batch.weights == 0, torch.nan), "not_finite": lost}
        if self.judge and self.config.heads:
            said = judged(self.judge, made, batch, self.config.heads.times, self.token_shift, "noise of samples")
            loss = loss + self.config.heads.weight * cond.per_sample(F.softplus(-said))
        return Losses(loss * batch.weights, t, figures)

    def critic_losses(self, number: int, student: Denoiser, batch: PackedLatents, progress: float) -> Losses:
        """Squared error of the critic's velocity on what the student makes. Calls the student without gradient."""
        with torch.no_grad():
            made = self.make(student, batch, number)
        x_t, noise, t = noised(replace(batch, tokens=made), self._levels(batch))
        answer = self.critic(x_t, t, self._told(batch, number))
        error = batch.cond.per_sample((answer[:, : x_t.shape[1]].float() - (noise - made)).square())
        loss, hole = error, batch.weights == 0
        figures = {"critic_error": error.detach().masked_fill(hole, torch.nan)}
        if self.judge and (heads := self.config.heads):
            judge = partial(judged, self.judge, batch=batch, levels=heads.times, token_shift=self.token_shift)
            of_data, of_samples = judge(batch.tokens, purpose="noise of data"), judge(made, purpose="noise of samples")
            loss = loss + heads.critic_weight * batch.cond.per_sample(F.softplus(-of_data) + F.softplus(of_samples))
            figures |= {
                f"judged_{name}": batch.cond.per_sample(said.detach()).masked_fill(hole, torch.nan)
                for name, said in (("data", of_data), ("samples", of_samples))
            }
        return Losses(loss * batch.weights, t, figures)

    def make(self, student: Denoiser, batch: PackedLatents, number: int) -> Tensor:
        """Samples (L, P) of the student from noise, in 1 + `number` mod `student_steps` of its sampler's steps; the last has a gradient.

        So the student learns at each of its levels, from inputs that it made itself (backward simulation, their section 4.5).
        """
        cond, channels, levels = batch.cond, batch.tokens.shape[1], self._levels_of_steps(batch)
        x = noise_tokens(batch.keys, cond.lengths, channels, "made", 0).to(batch.tokens)
        last = number % self.student_steps
        for step, t in enumerate(levels[:last], start=1):
            with torch.no_grad():
                made = self._jump(student, x, t, batch)
                fresh = noise_tokens(batch.keys, cond.lengths, channels, "made", step).to(x)
                x = times.RECTIFIED_FLOW.interpolate(made, fresh, levels[step], cond).to(x)
        return self._jump(student, x, levels[last], batch)

    def walk(self, t: Tensor, lengths: tuple[int, ...]) -> Walk:
        return Walk.fine(t, torch.zeros_like(t))

    def _told(self, batch: PackedLatents, number: int) -> Conditioning:
        """The conditions of samples that `make` made, with the jump of their last step."""
        return batch.cond.over(self._levels_of_steps(batch)[number % self.student_steps])

    def _levels_of_steps(self, batch: PackedLatents) -> Tensor:
        """The levels that the student's sampler steps from, each a jump to the data, (student_steps, n)."""
        u = 1 - torch.arange(self.student_steps, dtype=torch.float64)[:, None] / self.student_steps
        return times.shift(u, times.shifts(batch.cond.lengths, self.token_shift)).to(batch.tokens)

    def _jump(self, student: Denoiser, x: Tensor, t: Tensor, batch: PackedLatents) -> Tensor:
        return x - on_tokens(t, batch.cond, x) * student(x, t, batch.cond.over(t))[:, : x.shape[1]].float()

    def _levels(self, batch: PackedLatents) -> Tensor:
        low, high = self.config.ends
        u = low + (high - low) * times.from_uniform(self.config.times, times.uniforms(batch.keys, None))
        return times.shift(u, times.shifts(batch.cond.lengths, self.token_shift))


class ScoreRegularised:
    """Continuous consistency and matched distributions in one loss (rCM, Zheng et al. 2025, arXiv:2510.08431)."""

    def __init__(self, config: ScoreRegularisedConfig, consistency: ContinuousConsistency, matching: DistributionMatching) -> None:
        self.config, self.consistency, self.matching, self.teacher = config, consistency, matching, matching.teacher

    def at(self, step: int) -> Objective:
        """The objective of step number `step`."""
        turn = turn_of(step, self.config.critic.steps)
        if turn.network == "critic":
            return self.matching.at(step)
        return partial(self.student_losses, turn.number)

    def student_losses(self, number: int, student: Denoiser, batch: PackedLatents, progress: float) -> Losses:
        """The sum of both losses, at the levels of consistency."""
        near = self.consistency(student, batch, progress)
        far = self.matching.student_losses(number, student, batch, progress)
        return Losses(near.per_sample + self.config.weight * far.per_sample, near.t, {**near.figures, **far.figures})

    def walk(self, t: Tensor, lengths: tuple[int, ...]) -> Walk:
        return self.consistency.walk(t, lengths)
