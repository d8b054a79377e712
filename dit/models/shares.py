"""The tokens of a pack, shared out over the ranks that compute it together. Knows nothing of the model.

Letters: L tokens of the pack, l of this rank, n ranks, N heads, K channels a head. Every exchange is linear: gradients go
the way back, and dual numbers send value and tangent in one message.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dit.runtime import distributed
from dit.runtime.duals import apply_linear


@dataclass(frozen=True)
class Shares:
    """Rank i holds the tokens [borders[i], borders[i + 1]). rank: which one this is."""

    borders: tuple[int, ...]
    rank: int

    @classmethod
    def even(cls, tokens: int) -> "Shares":
        """Even shares, up to one token, over the ranks that compute this pack."""
        ranks = distributed.sequence_parallel()
        return cls(tuple(tokens * i // ranks for i in range(ranks + 1)), distributed.sequence_rank())

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each rank."""
        return tuple(end - start for start, end in pairwise(self.borders))

    @property
    def own(self) -> slice:
        """The tokens of this rank."""
        return slice(self.borders[self.rank], self.borders[self.rank + 1])

    def to_heads(self, *per_token: Tensor) -> list[Tensor]:
        """From some tokens with all heads to all tokens with some heads: (l, N, K) each -> (L, N / n, K) each, in one message."""
        ranks, own = len(self.lengths), self.lengths[self.rank]
        x = torch.stack([x.unflatten(1, (ranks, -1)) for x in per_token], dim=2)  # (l, N, K) -> (l, n, m, N / n, K)
        received = _Exchange.apply(x.transpose(0, 1).flatten(0, 1), (own,) * ranks, self.lengths)  # (n l, m, N / n, K) -> (L, m, N / n, K)
        return list(received.unbind(1))

    def to_tokens(self, per_head: Tensor) -> Tensor:
        """The way back: (L, N / n, K) -> (l, N, K)."""
        ranks, own = len(self.lengths), self.lengths[self.rank]
        received = _Exchange.apply(per_head, self.lengths, (own,) * ranks)  # (L, N / n, K) -> (n l, N / n, K)
        return received.unflatten(0, (ranks, own)).transpose(0, 1).flatten(1, 2)  # (n, l, N / n, K) -> (l, N, K)

    def gather(self, x: Tensor) -> Tensor:
        """All tokens on every rank: (l, P) -> (L, P). The gradient of a token is summed over the ranks."""
        ranks, own = len(self.lengths), self.lengths[self.rank]
        return _Exchange.apply(x.repeat(ranks, 1), (own,) * ranks, self.lengths)


class _Exchange(torch.autograd.Function):
    """`distributed.exchange` with its gradient."""

    @staticmethod
    def forward(x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return apply_linear(lambda x: distributed.exchange(x, send, receive), x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Sequence[int], Sequence[int]], output: Tensor) -> None:
        _, ctx.send, ctx.receive = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _Exchange.apply(gradient, ctx.receive, ctx.send), None, None
