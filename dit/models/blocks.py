"""One transformer block and the output layer. Knows how tokens are conditioned, not what conditions them.

Letters: n samples, l tokens of each, L tokens, R conditioning rows, S text tokens, N heads, K channels a head, D width.
Tokens x are (n, l, D) where every sample has one conditioning row and the same length, so that modulation broadcasts without
a copy, and (L, D) otherwise. Nothing here depends on which of the two it is, except `per_token`.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, assert_never

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dit.models.attention import AttentionLayout, Backend, attention
from dit.models.embeddings import WideLinear, at_least_float32, rotate

EPSILON = 1e-6
"""Of every norm, as in the Wan family."""


class Modulation(NamedTuple):
    """What time does to one branch of a block: x + gate * branch(norm(x) * (1 + scale) + shift)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


@dataclass(frozen=True, eq=False)
class Context:
    """What all blocks of one forward pass share.

    rows: (L,) conditioning row of each token, None where x is (n, l, D). text: (S, D). phases: (L, 1, K / 2) of the rotary embedding.
    """

    rows: Tensor | None
    text: Tensor
    phases: Tensor
    cross_layout: AttentionLayout


class SharedModulation(nn.Module):
    """A learned offset to the modulation that all blocks share (adaLN-single, arXiv:2310.00426, 2.2)."""

    def __init__(self, parts: int, hidden_size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(parts, hidden_size))

    def forward(self, time: Tensor) -> Tensor:
        """(R, parts or 1, D) -> (R, parts, D)."""
        return self.table + time


class AdaLNModulation(nn.Module):
    """Modulation by a linear layer of this block's own (adaLN-Zero, arXiv:2212.09748, 3.2)."""

    def __init__(self, parts: int, hidden_size: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = WideLinear(hidden_size, parts * hidden_size)

    def forward(self, time: Tensor) -> Tensor:
        """(R, D) -> (R, parts, D)."""
        return self.linear(F.silu(time)).unflatten(1, (self.parts, -1))


def modulation_layer(kind: Literal["shared", "per_block"], parts: int, hidden_size: int) -> nn.Module:
    """The layer that turns the embedding of time into `parts` vectors a row."""
    match kind:
        case "shared":
            return SharedModulation(parts, hidden_size)
        case "per_block":
            return AdaLNModulation(parts, hidden_size)
        case _:
            assert_never(kind)


def per_token(modulation: Tensor, rows: Tensor | None) -> list[Tensor]:
    """(R, parts, D) -> `parts` tensors that broadcast against the tokens."""
    if rows is None:
        return [part[:, None] for part in modulation.unbind(1)]  # (n, 1, D) against (n, l, D)
    return [part.index_select(0, rows) for part in modulation.unbind(1)]  # (L, D) against (L, D)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift, in at least float32, returned in the dtype of x."""
    normed = F.layer_norm(at_least_float32(x), x.shape[-1:], eps=EPSILON)
    return torch.addcmul(shift, normed, 1 + scale).to(x.dtype)


def add_gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch, in at least float32, returned in the dtype of x."""
    return torch.addcmul(at_least_float32(x), gate, at_least_float32(branch)).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, phases: Tensor | None, backend: Backend) -> Tensor:
    """`attention` of q and k that are turned by their positions first, if they have any."""
    if phases is not None:
        q, k = rotate(q, phases), rotate(k, phases)
    return attention(q, k, v, layout, backend)


class Attention(nn.Module):
    """Attention with RMSNorm of q and k over all heads (arXiv:2302.05442, 2)."""

    def __init__(self, hidden_size: int, num_heads: int, backend: Backend) -> None:
        super().__init__()
        self.head_size = hidden_size // num_heads
        self.backend = backend
        self.attend = attend
        self.q = nn.Linear(hidden_size, hidden_size)
        self.k = nn.Linear(hidden_size, hidden_size)
        self.v = nn.Linear(hidden_size, hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)
        self.q_norm = nn.RMSNorm(hidden_size, eps=EPSILON)
        self.k_norm = nn.RMSNorm(hidden_size, eps=EPSILON)

    def forward(self, x: Tensor, source: Tensor, layout: AttentionLayout, phases: Tensor | None) -> Tensor:
        """Tokens x (..., D) attend to `source` (..., D); `phases` rotate q and k, None for no positions."""
        q, k, v = self._heads(self.q_norm(self.q(x))), self._heads(self.k_norm(self.k(source))), self._heads(self.v(source))
        return self.out(self.attend(q, k, v, layout, phases, self.backend).reshape(x.shape))  # (L, N, K) -> (..., D)

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1] // self.head_size, self.head_size)  # (..., D) -> (L, N, K)


class DiTBlock(nn.Module):
    """Self-attention, cross-attention to text, MLP; time modulates the first and the last (arXiv:2503.20314, 4.2.1)."""

    def __init__(
        self, hidden_size: int, num_heads: int, ffn_size: int, modulation: Literal["shared", "per_block"], backend: Backend
    ) -> None:
        super().__init__()
        self.modulation = modulation_layer(modulation, 6, hidden_size)
        self.self_attention = Attention(hidden_size, num_heads, backend)
        self.cross_norm = nn.LayerNorm(hidden_size, eps=EPSILON)
        self.cross_attention = Attention(hidden_size, num_heads, backend)
        self.mlp = nn.Sequential(nn.Linear(hidden_size, ffn_size), nn.GELU(approximate="tanh"), nn.Linear(ffn_size, hidden_size))

    def forward(self, x: Tensor, time: Tensor, layout: AttentionLayout, context: Context) -> Tensor:
        """Tokens x -> tokens; `time` is what `modulation` takes."""
        parts = per_token(self.modulation(time), context.rows)
        first, last = Modulation(*parts[:3]), Modulation(*parts[3:])
        h = modulate(x, first.shift, first.scale)
        x = add_gated(x, first.gate, self.self_attention(h, h, layout, context.phases))
        x = x + self.cross_attention(self.cross_norm(x), context.text, context.cross_layout, None)
        return add_gated(x, last.gate, self.mlp(modulate(x, last.shift, last.scale)))


class FinalLayer(nn.Module):
    """Modulated norm, then the linear layer to token vectors."""

    def __init__(self, hidden_size: int, token_size: int, modulation: Literal["shared", "per_block"]) -> None:
        super().__init__()
        self.modulation = modulation_layer(modulation, 2, hidden_size)
        self.linear = nn.Linear(hidden_size, token_size)

    def forward(self, x: Tensor, time: Tensor, rows: Tensor | None) -> Tensor:
        """(..., D) -> (..., P)."""
        shift, scale = per_token(self.modulation(time), rows)
        return self.linear(modulate(x, shift, scale))
