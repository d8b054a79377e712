"""What methods share: the flow that a student learns to jump along, steps on it, and the student's derivative by it."""

from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from data_pipelines.packed import Conditioning, PackedLatents
from dit.diffusion.denoiser import Denoiser
from dit.diffusion.paths import on_tokens
from dit.diffusion.samplers import Slope
from dit.runtime.losses import Losses


class Distillation(Protocol):
    """An objective with a teacher that is guided already: guidance is baked in, so captions are never dropped."""

    teacher: Denoiser

    def __call__(self, student: Denoiser, batch: PackedLatents, progress: float, /) -> Losses: ...

    def jumps(self, t: Tensor, lengths: tuple[int, ...], /) -> tuple[Tensor, Tensor]:
        """The jump of a trained student that begins nearest to t (n,), from where to where: (n,) float64 each."""
        ...


def flow_of(flow: Literal["teacher", "data"], teacher: Denoiser, batch: PackedLatents, noise: Tensor) -> Denoiser:
    """The velocity that moves x_t: the teacher's, or that of the line between a sample's own latents and noise (L, P)."""
    return teacher if flow == "teacher" else lambda x_t, t, cond: noise - batch.tokens


@torch.no_grad()
def follow(flow: Denoiser, x: Tensor, levels: Tensor, cond: Conditioning, slope: Slope) -> tuple[Tensor, Tensor]:
    """Move x (L, P) along `flow` through `levels` (steps + 1, n) float64: where it ends, (L, P), and its mean velocity, (L, P)."""
    levels = levels.to(x.device)
    mean, whole = torch.zeros_like(x), levels[-1] - levels[0]
    for t, t_next in pairwise(levels):
        velocity = slope(flow, x, t.to(x), t_next.to(x), cond)
        x = x + on_tokens(t_next - t, cond, x) * velocity
        mean = mean + on_tokens((t_next - t) / whole, cond, x) * velocity
    return x, mean


@torch.no_grad()
def derivative(student: Denoiser, x: Tensor, t: Tensor, velocity: Tensor, cond: Conditioning, step: float) -> Tensor:
    """d/dt of the student's answer (L, P) along the flow, the level that it jumps to staying where it is; (L, P) float32.

    A central difference over t +- step, one-sided at the ends of [0, 1]: it takes any attention kernel and any sharding, at two calls.
    """
    answers, levels = [], [(t + step).clamp(max=1), (t - step).clamp(min=0)]
    for level in levels:
        moved = x + on_tokens(level - t, cond, x) * velocity
        answers.append(student(moved, level, cond if cond.jump is None else cond.over(cond.jump + level - t)).float())
    return (answers[0] - answers[1]) / on_tokens(levels[0] - levels[1], cond, answers[0])
