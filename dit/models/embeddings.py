"""Embeddings of time, class and position, and the layers that keep them in at least float32. Knows nothing of blocks.

Letters: R conditioning rows, L tokens, N heads, K channels a head, D width, F sinusoidal features.
"""

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

TIME_UNITS = 1000
"""Public weights of this family were trained on t in [0, 1000]; frequencies assume that range."""
THETA = 10_000.0
"""Longest period of the sinusoids of time and position, over 2 pi."""


def at_least_float32(x: Tensor) -> Tensor:
    """Widen bfloat16 and float16; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class WideLinear(nn.Linear):
    """A linear layer that computes in at least float32 even where its weights are stored in less."""

    def forward(self, x: Tensor) -> Tensor:
        weight = at_least_float32(self.weight)
        return F.linear(x.to(weight.dtype), weight, at_least_float32(self.bias))


class TimestepEmbedder(nn.Module):
    """Embed t in [0, 1] (0 = data, 1 = noise), or another scalar in `units` of its own: (R,) -> (R, D), at least float32."""

    def __init__(self, frequency_size: int, hidden_size: int, units: int = TIME_UNITS) -> None:
        super().__init__()
        self.units = units
        self.frequency_size = frequency_size
        self.mlp = nn.Sequential(WideLinear(frequency_size, hidden_size), nn.SiLU(), WideLinear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoids(at_least_float32(t) * self.units, self.frequency_size))


def sinusoids(x: Tensor, size: int) -> Tensor:
    """(R,) -> (R, size): cosines, then sines, at periods from 2 pi to 2 pi THETA (arXiv:1706.03762, 3.5)."""
    half = size // 2
    frequencies = torch.exp(-math.log(THETA) * torch.arange(half, dtype=x.dtype, device=x.device) / half)
    angles = x[:, None] * frequencies  # (R,) -> (R, size / 2)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, size % 2))


class LabelEmbedder(nn.Module):
    """Embed class labels in [0, num_classes); label num_classes is "no class", learned like the others. (R,) -> (R, D)."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        return at_least_float32(self.table(labels))


def axis_sizes(head_size: int) -> tuple[int, int, int]:
    """Channels of a head that turn with t, h and w; even each, the remainder goes to t."""
    side = 2 * (head_size // 6)
    return head_size - 2 * side, side, side


def rotation(positions: Tensor, head_size: int, dtype: torch.dtype) -> Tensor:
    """Phases e^(i angle) of every token and channel pair: (L, 3) -> (L, 1, K / 2), complex of `dtype` (arXiv:2104.09864, eq. 34)."""
    exact = positions.double()  # angles in float64: at position 1000, float32 would be off by 1e-4
    frequencies = [THETA ** -(torch.arange(0, size, 2, device=positions.device).double() / size) for size in axis_sizes(head_size)]
    angles = torch.cat([exact[:, axis, None] * f for axis, f in enumerate(frequencies)], dim=1)  # (L, K / 2)
    return torch.polar(torch.ones_like(angles), angles)[:, None].to(torch.promote_types(dtype, torch.complex64))


def rotate(x: Tensor, phases: Tensor) -> Tensor:
    """Turn neighbouring channel pairs of x (L, N, K) by `phases` (L, 1, K / 2), in at least float32."""
    return _Rotate.apply(at_least_float32(x), phases).to(x.dtype)


class _Rotate(torch.autograd.Function):
    """A rotation is orthogonal: its gradient is the rotation by the opposite angles, one pass instead of autograd's six."""

    @staticmethod
    def forward(x: Tensor, phases: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))  # (L, N, K) -> (L, N, K / 2)
        return torch.view_as_real(pairs * phases).flatten(-2)  # (L, N, K / 2) -> (L, N, K)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (phases,) = ctx.saved_tensors
        return _Rotate.apply(gradient, phases.conj().resolve_conj()), None
