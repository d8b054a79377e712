"""How far a student is from its teacher: each of its jumps against the walk that it stands for, on samples it was not trained on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipelines.packed import PackedLatents
from dit.diffusion.denoiser import Denoiser
from dit.diffusion.objectives import noised
from dit.diffusion.paths import on_tokens
from dit.diffusion.samplers import euler_slope
from dit.distillation.flow import Taught


@torch.no_grad()
def teacher_gap(method: Taught, student: Denoiser, batches: Sequence[PackedLatents], levels: Sequence[float]) -> Tensor:
    """Squared difference of the mean velocities of student and teacher over the jump at each of `levels`: (levels, n) float64 on the CPU.

    Every sample keeps one noise, drawn by its key, at all levels. NaN for holes.
    """
    gaps = []
    for batch in batches:
        for level in levels:
            walk, sampler = method.walk(torch.full((len(batch.keys),), level, dtype=torch.float64), batch.cond.lengths)
            x_t, _, t = noised(batch, walk[0])
            mean = (x_t - sampler(method.teacher, x_t, walk, batch.cond)) / on_tokens(walk[0] - walk[-1], batch.cond, x_t)
            error = (euler_slope(student, x_t, t, walk[-1].to(t), batch.cond).float() - mean).square()
            gaps.append(batch.cond.per_sample(error).double().masked_fill(batch.weights == 0, torch.nan).cpu())
    return torch.cat([torch.stack(gaps[i : i + len(levels)]) for i in range(0, len(gaps), len(levels))], dim=1)
