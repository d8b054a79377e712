"""What all samplers share: the loop over levels, and the two ends of the path that a denoiser sees from a point."""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from data_pipelines.packed import Conditioning
from dit.diffusion.denoiser import Denoiser
from dit.diffusion.paths import Path

OnStep = Callable[[int, Tensor], None]
"""Called after each step with the number of steps done and x (L, P)."""


def walk(
    x: Tensor, times: Tensor, cond: Conditioning, step: Callable[[int, Tensor, Tensor, Tensor], Tensor], on_step: OnStep | None
) -> Tensor:
    """Apply step(number from 1, x, t, t_next) between neighbouring levels; t and t_next are (R,) float64 on the device of x."""
    rows = len(cond.grids) if cond.rows is None else int(cond.rows.max()) + 1
    levels = times.double().to(x.device).reshape(len(times), -1).expand(-1, rows)  # (steps + 1, R)
    for number, (t, t_next) in enumerate(pairwise(levels), start=1):
        x = step(number, x, t, t_next)
        if on_step:
            on_step(number, x)
    return x


def ends_of(denoiser: Denoiser, path: Path, x: Tensor, t: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
    """The latents and the noise (L, P) that `denoiser` sees from x (L, P) at t (R,)."""
    t = t.to(x)
    velocity = denoiser(x, t, cond)[:, : x.shape[1]].to(x.dtype)
    latents = path.convert(velocity, "velocity", "latents", x, t, cond)
    return latents, path.convert(velocity, "velocity", "noise", x, t, cond)
