"""What methods share: the flow that a student learns to jump along, steps on it, and the student's derivative by it."""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol, assert_never, runtime_checkable

import torch
from torch import Tensor

from data_pipelines.packed import Conditioning, PackedLatents
from dit.diffusion.denoiser import Denoiser
from dit.diffusion.paths import on_tokens
from dit.diffusion.samplers import Slope, heun
from dit.runtime.duals import dual, parts
from dit.runtime.losses import Losses

SMALL, TINY = 1e-3, 1e-12
"""Part of t below which no difference is taken; what a width is at least."""
Objective = Callable[[Denoiser, PackedLatents, float], Losses]
"""From a student, a batch and the progress of the run in [0, 1]."""


class Taught(Protocol):
    """A method with a teacher that is guided already: guidance is baked in, so captions are never dropped."""

    teacher: Denoiser

    def walk(self, t: Tensor, lengths: tuple[int, ...], /) -> "Walk":
        """What the teacher does where a trained student jumps once, from t (n,) or the next level above that it knows."""
        ...


class Distillation(Taught, Protocol):
    """One objective for all steps."""

    def __call__(self, student: Denoiser, batch: PackedLatents, progress: float, /) -> Losses: ...


@runtime_checkable
class Alternating(Taught, Protocol):
    """An objective for each step, for a student and a critic that train in turns."""

    def at(self, step: int) -> Objective:
        """The objective of step number `step`, from 0: of the network whose turn it is."""
        ...


class Walk(NamedTuple):
    """Levels (steps + 1, n), float64 and falling, and the sampler that visits them."""

    levels: Tensor
    sampler: Callable[[Denoiser, Tensor, Tensor, Conditioning], Tensor]

    @classmethod
    def fine(cls, start: Tensor, end: Tensor, steps: int = 12) -> "Walk":
        """Heun steps, ever shorter towards the end, for the last onto t = 0 is Euler's. start, end: (n,)."""
        return cls(torch.stack([torch.lerp(end, start, (1 - i / steps) ** 2) for i in range(steps + 1)]), heun)


def flow_of(flow: Literal["teacher", "data"], teacher: Denoiser, batch: PackedLatents, noise: Tensor) -> Denoiser:
    """The velocity that moves x_t: the teacher's, or that of the line between a sample's own latents and noise (L, P)."""
    return teacher if flow == "teacher" else lambda x_t, t, cond: noise - batch.tokens


def seen(network: Denoiser, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """The latents (L, P) that a network sees in x_t (L, P) at t (n,)."""
    return x_t - on_tokens(t, cond, x_t) * network(x_t, t, cond)[:, : x_t.shape[1]].float()


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
def derivative(
    student: Denoiser, x: Tensor, t: Tensor, velocity: Tensor, cond: Conditioning, how: Literal["forward", "difference"], step: float
) -> Tensor:
    """d/dt of the student's answer along the flow, the level that it jumps to staying where it is: (L, P), in the dtype of `velocity`.

    A central difference over t +- step: two calls; or forward mode: one call on dual numbers. Differences stay between the level that is
    jumped to and 1, one-sided there: students have never seen a jump upwards, and some know nothing at t = 0.
    """

    def moved(level: Tensor, x: Tensor) -> Tensor:
        return student(x, level, cond if cond.jump is None else cond.over(cond.jump + level - t))

    match how:
        case "forward":
            with torch.compiler.set_stance("force_eager"):  # a compiled block knows plain tensors alone
                return parts(moved(dual(t, torch.ones_like(t)), dual(x, velocity.to(x))))[1].to(velocity)
        case "difference":
            end = t * SMALL if cond.jump is None else torch.maximum(t - cond.jump, t * SMALL)
            upper, lower = (t + step).clamp(max=1), torch.maximum(t - step, end)
            after, before = (moved(level, x + on_tokens(level - t, cond, x) * velocity.to(x)) for level in (upper, lower))
            return (after - before).to(velocity) / on_tokens(
                (upper - lower).clamp(min=TINY), cond, velocity
            )  # 0 / TINY at t = 1 without a jump
        case _:
            assert_never(how)
