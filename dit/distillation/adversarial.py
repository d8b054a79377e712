"""Judged by heads: a student whose noised samples cannot be told from noised data."""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.packed import Conditioning, PackedLatents
from dit.config.distillation import AdversarialConfig, StudentTimes
from dit.config.objective import ShiftConfig
from dit.diffusion import times
from dit.diffusion.denoiser import Denoiser
from dit.diffusion.draws import noise_tokens
from dit.diffusion.objectives import noised
from dit.distillation.flow import Objective, Walk, seen
from dit.distillation.networks import Discriminator, turn_of
from dit.runtime.losses import Losses


class Adversarial:
    """Hinge losses of heads: on the frozen teacher's tokens, nothing else (LADD, Sauer et al. 2024, arXiv:2403.12015, section 3); or on
    decoded clips, and beside them what the guided teacher sees in noised samples (ADD, Sauer et al. 2023, arXiv:2311.17042, section 3).

    The student denoises data from a level of its own sampler, drawn by key; at t = 1 that is generation from noise.
    """

    def __init__(self, config: AdversarialConfig, teacher: Denoiser, judge: Discriminator, token_shift: ShiftConfig | None) -> None:
        self.config, self.teacher, self.token_shift = config, teacher, token_shift
        self.judged = partial(judged, judge, levels=None if config.critic.in_pixels else config.critic.times, token_shift=token_shift)

    def at(self, step: int) -> Objective:
        """The objective of step number `step`."""
        return self.student_losses if turn_of(step, self.config.critic.steps).network == "student" else self.critic_losses

    def student_losses(self, student: Denoiser, batch: PackedLatents, progress: float) -> Losses:
        """How much the heads take samples for samples, and how far they are from what the teacher sees. Calls the student once."""
        made, t = self._made(student, batch)
        loss, figures = -batch.cond.per_sample(self.judged(made, batch, purpose="noise of samples")), {}
        if self.config.distillation_weight:
            distance = self._distance(made, batch)
            loss = loss + self.config.distillation_weight / len(self.config.critic.blocks) * distance
            figures = {"teacher_distance": distance.detach().masked_fill(batch.weights == 0, torch.nan)}
        return Losses(loss * batch.weights, t, figures)

    def critic_losses(self, student: Denoiser, batch: PackedLatents, progress: float) -> Losses:
        """How badly the heads tell samples, and data under other captions, from data. Calls the student once, without gradient."""
        with torch.no_grad():
            made, t = self._made(student, batch)
        config, cond = self.config.critic, batch.cond
        judge = partial(self.judged, batch=batch)
        of_data, of_samples = judge(batch.tokens, purpose="noise of data"), judge(made, purpose="noise of samples")
        loss = cond.per_sample(F.relu(1 - of_data)) + cond.per_sample(F.relu(1 + of_samples))
        if config.mismatched:
            wrong, others = under_other_captions(cond)
            others = others * (batch.weights.roll(1) != 0).to(others)  # a hole has no caption
            of_wrong = judge(batch.tokens, purpose="noise of data", batch=replace(batch, cond=wrong))
            loss = loss + others * cond.per_sample(F.relu(1 + of_wrong))
        if config.smoothness:
            nearby = judge(batch.tokens, purpose="noise of data", step=config.smoothness_step)
            loss = loss + config.smoothness * cond.per_sample((nearby - of_data).square()) / config.smoothness_step**2
        figures = {"judged_data": cond.per_sample(of_data.detach()), "judged_samples": cond.per_sample(of_samples.detach())}
        return Losses(
            loss * batch.weights, t, {name: figure.masked_fill(batch.weights == 0, torch.nan) for name, figure in figures.items()}
        )

    def walk(self, t: Tensor, lengths: tuple[int, ...]) -> Walk:
        return Walk.fine(t, torch.zeros_like(t))

    def _distance(self, made: Tensor, batch: PackedLatents) -> Tensor:
        """(1 - t) |made - what the teacher sees in it, noised to a uniform t|^2, without gradient through the teacher (n,)."""
        cond = batch.cond
        k = times.shifts(cond.lengths, self.token_shift)
        t = times.shift(times.uniforms(batch.keys, None, "distilled time"), k).to(made)
        noise = noise_tokens(batch.keys, cond.lengths, made.shape[1], "distilled noise").to(made)
        with torch.no_grad():
            known = seen(self.teacher, times.RECTIFIED_FLOW.interpolate(made.detach(), noise, t, cond), t, cond)
        return (1 - t) * cond.per_sample((made - known).square())

    def _made(self, student: Denoiser, batch: PackedLatents) -> tuple[Tensor, Tensor]:
        """What the student makes of data at a level of its sampler, (L, P), and the levels, (n,)."""
        steps, k = self.config.student_steps, times.shifts(batch.cond.lengths, self.token_shift)
        level = 1 - (times.uniforms(batch.keys, None) * steps).floor() / steps
        x_t, _, t = noised(batch, times.shift(level, k))
        return seen(student, x_t, t, batch.cond.over(t)), t


def judged(
    judge: Discriminator,
    tokens: Tensor,
    batch: PackedLatents,
    levels: StudentTimes | None,
    token_shift: ShiftConfig | None,
    purpose: str,
    step: float = 0.0,
) -> Tensor:
    """Logits (L, heads) of `tokens` (L, P), in place of those of `batch`, noised to `levels` drawn by key; None: not noised.

    purpose: of the noise. step: size of a random step away from the noised tokens.
    """
    u = times.uniforms(batch.keys, None, "judged time")
    u = torch.zeros_like(u) if levels is None else times.from_uniform(levels, u)
    t = times.shift(u, times.shifts(batch.cond.lengths, token_shift)).to(tokens)
    noise = noise_tokens(batch.keys, batch.cond.lengths, tokens.shape[1], purpose).to(tokens)
    x_t = times.RECTIFIED_FLOW.interpolate(tokens, noise, t, batch.cond)
    if step:
        x_t = x_t + step * noise_tokens(batch.keys, batch.cond.lengths, tokens.shape[1], purpose, "step").to(tokens)
    return judge(x_t.to(tokens), t, batch)


def under_other_captions(cond: Conditioning) -> tuple[Conditioning, Tensor]:
    """Every sample under the text and class of the one before it in the pack, and 1 where these are others, (n,)."""
    texts = cond.text.split(cond.text_lengths)
    before = [*texts[-1:], *texts[:-1]]
    labels = None if cond.labels is None else cond.labels.roll(1)
    differs = [a.shape != b.shape or not torch.equal(a, b) for a, b in zip(texts, before, strict=True)]
    others = torch.tensor(differs, device=cond.text.device)
    if labels is not None:
        others = others | (labels != cond.labels)
    return cond.with_text(before, labels), others.float()
