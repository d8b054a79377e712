"""Is a student better than its teacher in as many steps? Both are drawn from the same noise and held against the teacher's long walk.

Knows no prompts, pixels or files: conditions, keys and denoisers in, figures out. Every draw is keyed, so figures depend on weights alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipelines.packed import Conditioning
from dit.config.distillation import DiagnosisConfig
from dit.config.objective import SamplingConfig
from dit.diffusion.denoiser import Denoiser
from dit.diffusion.draws import noise_tokens
from dit.diffusion.samplers import euler_slope, levels, sample
from dit.distillation.traits import Traits
from dit.runtime.figures import mean_figure


class Pack(NamedTuple):
    """Samples drawn in one call: conditions, and the random key of each."""

    cond: Conditioning
    keys: tuple[int, ...]


@dataclass(frozen=True)
class Reference:
    """What the teacher makes of the noise. states: (N, D) at each of `levels`, 1 to 0. few: its latents (N, D) by number of Euler steps."""

    levels: Tensor
    states: Sequence[Tensor]
    few: Mapping[int, Tensor]


class Judge:
    """Draws a student and says how it compares, by name.

    packs: all samples have one token grid, and every run of `config.noises` of them one condition. sampling: the student's own.
    channels: of a token. shift: of the levels. The teacher is guided already, and drawn once, at the first call.
    """

    def __init__(
        self,
        config: DiagnosisConfig,
        sampling: SamplingConfig,
        traits: Traits,
        teacher: Denoiser,
        packs: Sequence[Pack],
        channels: int,
        shift: float,
    ) -> None:
        self.config, self.sampling, self.traits = config, sampling, traits
        self.teacher, self.packs, self.channels, self.shift = teacher, packs, channels, shift
        self.teacher_steps = 2 * sampling.steps * -(-config.teacher_steps // (2 * sampling.steps))
        self.all_counts = sorted({*config.steps, sampling.steps})
        self.counts = self.all_counts if traits.any_steps else [sampling.steps]

    @cached_property
    def reference(self) -> Reference:
        """The teacher's walk in `teacher_steps` Euler steps, kept where steps of the student begin and at their middle; its short walks."""
        every, states = self.teacher_steps // (2 * self.sampling.steps), list[list[Tensor]]()
        for pack in self.packs:
            noise = noise_tokens(pack.keys, pack.cond.lengths, self.channels, "start noise")
            states.append(kept := [noise.view(len(pack.keys), -1)])
            keep = partial(_keep, kept, every)
            sample(self.teacher, *pack, self.channels, SamplingConfig(steps=self.teacher_steps), self.shift, on_step=keep)
        few = {n: self.draw(self.teacher, SamplingConfig(steps=n)) for n in self.all_counts}
        return Reference(
            levels(SamplingConfig(steps=2 * self.sampling.steps), self.shift), [torch.cat(x) for x in zip(*states, strict=True)], few
        )

    @torch.no_grad()
    def __call__(self, student: Denoiser) -> tuple[dict[str, float | None], dict[int, Tensor]]:
        """Figures by name, None for what is no number, and the student's latents (N, D) by number of steps.

        distance/n and teacher/n: of student and teacher in n steps to the teacher's long walk; change/n their difference with its 95 %
        interval; verdict/n: 1 better, -1 worse than the teacher, 0 no evidence. gap/t and self_consistency/t: of the jump at t (see
        `jumps`). motion and diversity: of the student in its own number of steps over the teacher's.
        """
        truth, figures = self.reference.states[-1], dict[str, float]()
        drawn = {n: self.draw(student, self.sampling.model_copy(update={"steps": n})) for n in self.counts}
        for n, latents in drawn.items():
            is_paired = self.traits.follows_flow and (n == 1 or self.sampling.sampler == "euler")  # else fresh noise leads elsewhere
            mine, theirs = (self._paired(x, truth) if is_paired else self._between_sets(x, truth) for x in (latents, self.reference.few[n]))
            change = mean_figure(mine - theirs)
            figures |= {f"distance/{n}": float(mine.mean()), f"teacher/{n}": float(theirs.mean()), f"change/{n}": change.value}
            if change.low is not None and change.high is not None:
                figures |= {f"change_low/{n}": change.low, f"change_high/{n}": change.high}
                figures[f"verdict/{n}"] = 1.0 if change.high < 0 else 0.0 if change.low <= 0 else -1.0  # no number is worse
        own = drawn[self.sampling.steps]
        figures |= self.jumps(student)
        if (still := self._motion(truth)) > 0:
            figures["motion"] = self._motion(own) / still
        figures["diversity"] = self._within(own) / self._within(truth)
        return {name: value if isfinite(value) else None for name, value in figures.items()}, drawn

    def draw(self, denoiser: Denoiser, sampling: SamplingConfig) -> Tensor:
        """Latents (N, D) float32 on the CPU."""
        parts = [sample(denoiser, *pack, self.channels, sampling, self.shift).view(len(pack.keys), -1) for pack in self.packs]
        return torch.cat([part.float().cpu() for part in parts])

    def jumps(self, student: Denoiser) -> dict[str, float]:
        """From where the teacher is when a step of the student begins: the error of its jump, and how far it agrees with itself.

        Both as squared mean velocities. self_consistency: two jumps to the same place, from the level t and from the middle of the step.
        """
        figures, states, times, last = dict[str, float](), self.reference.states, self.reference.levels, len(self.reference.levels) - 1
        for k in range(0, last, 2):
            end = last if self.sampling.sampler == "consistency" else k + 2
            span = times[k] - times[end]
            landed = self._jump(student, k, end)
            figures[f"gap/{float(times[k]):.2f}"] = float(((landed - states[end]) / span).square().mean())
            if self.traits.any_time:
                again = self._jump(student, k + 1, end)
                figures[f"self_consistency/{float(times[k]):.2f}"] = float(((landed - again) / span).square().mean())
        return figures

    def _jump(self, student: Denoiser, at: int, end: int) -> Tensor:
        """Where the student lands (N, D) that jumps from the teacher's state number `at` to the level of number `end`."""
        landed, first = list[Tensor](), 0
        for cond, keys in self.packs:
            x = self.reference.states[at][first : first + len(keys)].reshape(-1, self.channels).to(cond.text.device)
            t, t_end = (self.reference.levels[i].to(x).expand(len(keys)) for i in (at, end))
            moved = x + (t_end - t)[0] * euler_slope(student, x, t, t_end, cond)
            landed.append(moved.reshape(len(keys), -1).cpu())
            first += len(keys)
        return torch.cat(landed)

    def _paired(self, latents: Tensor, truth: Tensor) -> Tensor:
        """Mean squared difference of each sample: (N,)."""
        return (latents - truth).square().mean(1)

    def _between_sets(self, latents: Tensor, truth: Tensor) -> Tensor:
        """Energy distance by condition, 2 E|x - y| - E|x - x'| - E|y - y'|, over pairs of different noise: (conditions,)."""
        x, y = (z.view(-1, self.config.noises, z.shape[1]) for z in (latents, truth))
        return 2 * self._apart(x, y) - self._apart(x, x) - self._apart(y, y)

    def _within(self, latents: Tensor) -> float:
        """Mean distance of clips of one condition."""
        x = latents.view(-1, self.config.noises, latents.shape[1])
        return float(self._apart(x, x).mean())

    def _apart(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean root mean square difference of (conditions, noises, D), between different noises: (conditions,)."""
        k = self.config.noises
        pairs = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[2] ** 0.5  # exact near zero
        return pairs.masked_fill(torch.eye(k, dtype=torch.bool), 0).sum((1, 2)) / (k * (k - 1))

    def _motion(self, latents: Tensor) -> float:
        """Mean absolute difference of neighbouring frames of latents; zero for pictures."""
        frames = latents.view(len(latents), self.packs[0].cond.grids[0][0], -1)
        return float(frames.diff(dim=1).abs().mean()) if frames.shape[1] > 1 else 0.0


def _keep(kept: list[Tensor], every: int, step: int, x: Tensor) -> None:
    if step % every == 0:
        kept.append(x.reshape(kept[0].shape).float().cpu())
