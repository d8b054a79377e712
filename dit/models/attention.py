"""Attention over a packed sequence: one function, and the segmentations it runs on.

Letters: Lq query tokens, Lk key tokens, N heads, K channels a head, g segments, q and k tokens of one segment.
Full, spatial, temporal, windowed and cross attention differ in their `AttentionLayout` only. A token sees the tokens of its own
segment and nothing else, so every sample of a pack comes out as if it were alone. Knows nothing of projections or of the model.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from typing import Any, Literal, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.errors import UserError
from data_pipelines.packed import Grid
from dit.models.shares import Shares

Backend = Literal["sdpa", "xformers"]
Segments = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class AttentionLayout:
    """How a packed sequence falls into segments that attend within themselves.

    query_lengths, key_lengths: tokens of each segment, one after another.
    order: (L,) the token at each place of that sequence, for queries and keys alike; None where it is the pack's own order.
    shares: how those tokens lie on several ranks; None where this rank has them all.
    """

    query_lengths: Segments
    key_lengths: Segments
    device: torch.device
    order: Tensor | None = None
    shares: Shares | None = None

    def __post_init__(self) -> None:
        assert len(self.query_lengths) == len(self.key_lengths), (len(self.query_lengths), len(self.key_lengths))
        assert self.order is None or self.query_lengths == self.key_lengths, "an order is for self-attention"

    @classmethod
    def full(cls, grids: Sequence[Grid], device: torch.device) -> "AttentionLayout":
        """A segment a sample."""
        lengths = tuple(t * h * w for t, h, w in grids)
        return cls(lengths, lengths, device)

    @classmethod
    def spatial(cls, grids: Sequence[Grid], device: torch.device) -> "AttentionLayout":
        """A segment a frame."""
        lengths = tuple(h * w for t, h, w in grids for _ in range(t))
        return cls(lengths, lengths, device)

    @classmethod
    def temporal(cls, grids: Sequence[Grid], device: torch.device) -> "AttentionLayout":
        """A segment a place: the frames of one (h, w)."""
        return cls._permuted((_temporal_segments(grid) for grid in grids), device)

    @classmethod
    def windowed(cls, grids: Sequence[Grid], window: Grid, shifted: bool, device: torch.device) -> "AttentionLayout":
        """A segment a window of at most `window` tokens; `shifted` moves the borders by half a window (arXiv:2103.14030, 3.2).

        Windows are cut at the border of a sample, neither padded nor wrapped. An axis that fits into one window is not shifted.
        """
        return cls._permuted((_window_segments(grid, window, shifted) for grid in grids), device)

    @classmethod
    def cross(cls, lengths: Segments, text_lengths: Segments, device: torch.device) -> "AttentionLayout":
        """A segment a sample: its tokens see its text."""
        return cls(lengths, text_lengths, device)

    @classmethod
    def _permuted(cls, samples: Iterable[tuple[Tensor, Segments]], device: torch.device) -> "AttentionLayout":
        orders: list[Tensor] = []
        lengths: list[int] = []
        start = 0
        for order, segments in samples:
            orders.append(order + start)
            lengths.extend(segments)
            start += len(order)
        return cls(tuple(lengths), tuple(lengths), device, torch.cat(orders).to(device, non_blocking=True))

    @cached_property
    def inverse(self) -> Tensor | None:
        """(L,) the place of each token in `order`."""
        return None if self.order is None else _inverse(self.order)

    @cached_property
    def folded(self) -> "Folded":
        """The same layout as batches of equal segments."""
        sizes = list(zip(self.query_lengths, self.key_lengths, strict=True))
        counts = Counter(sizes)
        batches = tuple((count, q, k) for (q, k), count in counts.items())
        if len(counts) == len(list(groupby(sizes))):  # equal segments are neighbours already
            return Folded(batches, self.order, self.order, self.inverse)
        by_size = [[i for i, size in enumerate(sizes) if size == wanted] for wanted in counts]
        query = _tokens_of(by_size, self.query_lengths).to(self.device, non_blocking=True)
        key = _tokens_of(by_size, self.key_lengths).to(self.device, non_blocking=True)
        if self.order is not None:
            query = key = self.order[query]
        return Folded(batches, query, key, _inverse(query))

    @cached_property
    def block_diagonal_mask(self) -> Any:
        """The same layout as xformers' attention bias, over tokens that are already in `order`."""
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        return BlockDiagonalMask.from_seqlens(list(self.query_lengths), list(self.key_lengths), device=self.device)


@dataclass(frozen=True, eq=False)
class Folded:
    """Segments of one size as one batch.

    batches: (g, q, k) of each batch. query, key: tokens in the order of the batches, None if nothing moves.
    restore: place of each token in that order.
    """

    batches: tuple[tuple[int, int, int], ...]
    query: Tensor | None
    key: Tensor | None
    restore: Tensor | None


def attention(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, backend: Backend) -> Tensor:
    """Softmax attention within the segments of `layout`: q (Lq, N, K), k and v (Lk, N, K) -> (Lq, N, K).

    Where the tokens lie on several ranks, each attends with some of the heads (Ulysses; Jacobs et al. 2023, arXiv:2309.14509, 3.1).
    A segment without keys yields zeros. Raises UserError if the backend cannot run here.
    """
    if layout.shares is None:
        return _on_one_rank(q, k, v, layout, backend)
    q, k, v = layout.shares.to_heads(q, k, v)  # (l, N, K) -> (L, N / ranks, K)
    return layout.shares.to_tokens(_on_one_rank(q, k, v, layout, backend))


def _on_one_rank(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, backend: Backend) -> Tensor:
    assert q.shape[0] == sum(layout.query_lengths), (q.shape, sum(layout.query_lengths))
    assert k.shape[0] == v.shape[0] == sum(layout.key_lengths), (k.shape, v.shape, sum(layout.key_lengths))
    match backend:
        case "xformers" if isinstance(q, Tensor):
            return _xformers(q, k, v, layout)
        case "sdpa" | "xformers":  # dual numbers have a rule for torch's kernel alone
            return _sdpa(q, k, v, layout.folded)
        case _:
            assert_never(backend)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, folded: Folded) -> Tensor:
    q, k, v = _gather(q, folded.query), _gather(k, folded.key), _gather(v, folded.key)
    q_parts = q.split([g * lq for g, lq, _ in folded.batches])
    k_parts, v_parts = (x.split([g * lk for g, _, lk in folded.batches]) for x in (k, v))
    parts = [_one_batch(q, k, v, g, lk) for q, k, v, (g, _, lk) in zip(q_parts, k_parts, v_parts, folded.batches, strict=True)]
    return _gather(parts[0] if len(parts) == 1 else torch.cat(parts), folded.restore)


def _one_batch(q: Tensor, k: Tensor, v: Tensor, segments: int, key_length: int) -> Tensor:
    if key_length == 0:
        return 0 * q + k.sum() + v.sum()  # zeros, but in the graph: every rank must have gradients of the same parameters
    q, k, v = (x.unflatten(0, (segments, -1)).transpose(1, 2) for x in (q, k, v))  # (g l, N, K) -> (g, N, l, K)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)  # (g, N, q, K) -> (g q, N, K)


def _xformers(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
    if not q.is_cuda:
        raise UserError(f"backbone.attention_backend: xformers runs on CUDA only, the model is on {q.device}; set it to sdpa")
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        fix = "`pip install -c constraints.txt -e '.[xformers]'` in the project's folder, or set the key to sdpa"
        raise UserError(f"backbone.attention_backend: xformers cannot be imported ({error}); {fix}") from error
    if 0 in layout.key_lengths:
        raise UserError("backbone.attention_backend: xformers needs at least one text token a sample, one has none; set the key to sdpa")
    q, k, v = (_gather(x, layout.order)[None] for x in (q, k, v))  # (L, N, K) -> (1, L, N, K)
    out = memory_efficient_attention(q, k, v, attn_bias=layout.block_diagonal_mask)[0]  # (Lq, N, K)
    return _gather(out, layout.inverse)


def _gather(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


def _inverse(order: Tensor) -> Tensor:
    places = torch.arange(len(order), device=order.device)
    return torch.empty_like(order).scatter_(0, order, places)


def _tokens_of(batches: Sequence[Sequence[int]], lengths: Segments) -> Tensor:
    """The tokens of the listed segments, batch after batch; the segments of one batch are equally long."""
    starts = torch.tensor([0, *accumulate(lengths)])
    blocks = [starts[segments, None] + torch.arange(lengths[segments[0]]) for segments in batches]  # (g, l) each
    return torch.cat([block.flatten() for block in blocks])


@lru_cache(maxsize=1024)
def _temporal_segments(grid: Grid) -> tuple[Tensor, Segments]:
    t, h, w = grid
    return torch.arange(t * h * w).view(t, h * w).T.flatten(), (t,) * (h * w)


@lru_cache(maxsize=1024)
def _window_segments(grid: Grid, window: Grid, shifted: bool) -> tuple[Tensor, Segments]:
    axes = [_window_of(size, part, shifted) for size, part in zip(grid, window, strict=True)]
    counts = [int(axis[-1]) + 1 for axis in axes]
    t, h, w = torch.meshgrid(*axes, indexing="ij")
    window_of_token = ((t * counts[1] + h) * counts[2] + w).flatten()  # (t, h, w) -> (L,)
    return window_of_token.argsort(stable=True), tuple(window_of_token.bincount().tolist())


def _window_of(size: int, window: int, shifted: bool) -> Tensor:
    """(size,) the window of each place of an axis."""
    shift = window // 2 if shifted and size > window else 0
    return (torch.arange(size) + shift) // window
