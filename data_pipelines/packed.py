"""The packed batch: tokens of samples of any size and length in one sequence, without padding.

Letters: n samples, L tokens, P channels of a token (C * pt * ph * pw), S text tokens, R conditioning rows.
A sample's tokens are contiguous and ordered t, h, w; the vector of a token is ordered (pt, ph, pw, C), channel last, as in
the Wan family. Noise is added and loss is taken in this layout; images exist only before `patchify` and after `unpatchify`.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from data_pipelines.errors import UserError

Grid = tuple[int, int, int]


class InStep(NamedTuple):
    """Where a pack lies in its global step: the number of its first sample, the samples of the step, and a random key of the step.

    Equal for every number of ranks.
    """

    first: int
    samples: int
    key: int


@dataclass(frozen=True)
class Conditioning:
    """All that a denoiser sees beside x_t and t.

    grids: (t, h, w) in tokens, one per sample. text: (S, D_text), the samples' text tokens one after another.
    text_lengths: text tokens of each sample. rows: (L,) which row of t each token is at, or None for one row a sample.
    labels: (n,) class labels, or None. jump: (R,) how much of t the answer is to be the mean velocity over, None for 0: the velocity at t.
    guidance: (R,) scale s to answer under, None for that of the denoiser.
    """

    grids: tuple[Grid, ...]
    text: Tensor
    text_lengths: tuple[int, ...]
    rows: Tensor | None = None
    labels: Tensor | None = None
    jump: Tensor | None = None
    guidance: Tensor | None = None

    def __post_init__(self) -> None:
        assert len(self.text_lengths) == len(self.grids), (len(self.text_lengths), len(self.grids))
        assert sum(self.text_lengths) == self.text.shape[0], (self.text_lengths, self.text.shape)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sample."""
        return tuple(t * h * w for t, h, w in self.grids)

    @cached_property
    def sample_of_token(self) -> Tensor:
        """(L,) index of the sample that a token belongs to."""
        counts = torch.tensor(self.lengths, device=self.text.device)
        return torch.repeat_interleave(torch.arange(len(counts), device=self.text.device), counts)

    @cached_property
    def positions(self) -> Tensor:
        """(L, 3) integer position of each token on the axes t, h, w; every sample starts at zero."""
        return torch.cat([_grid_positions(grid) for grid in self.grids]).to(self.text.device)

    def per_sample(self, per_token: Tensor) -> Tensor:
        """(L, ...) -> (n,) mean over the tokens of each sample and their channels, in float32."""
        means = per_token.float().flatten(1).mean(1)
        sums = torch.zeros(len(self.grids), device=means.device).index_add_(0, self.sample_of_token, means)
        return sums / torch.tensor(self.lengths, device=means.device)

    def per_token(self, per_row: Tensor) -> Tensor:
        """(R, ...) -> (L, ...): the row of each token."""
        return per_row[self.sample_of_token if self.rows is None else self.rows]

    def with_text(self, texts: Sequence[Tensor], labels: Tensor | None = None) -> "Conditioning":
        """The same samples under other texts (n tensors (S_i, D_text)) and labels."""
        return replace(self, text=torch.cat(list(texts)), text_lengths=tuple(len(x) for x in texts), labels=labels)

    def over(self, jump: Tensor) -> "Conditioning":
        """The same samples, asked for the mean velocity from t down to t - jump (R,). Networks without that input do not see it."""
        cond = copy(self)  # with all that is cached: nothing else changes
        object.__setattr__(cond, "jump", jump)
        return cond

    def guided(self, scale: Tensor) -> "Conditioning":
        """The same samples, asked for the answer under guidance of scale s (R,)."""
        cond = copy(self)
        object.__setattr__(cond, "guidance", scale)
        return cond

    def beside(self, other: "Conditioning") -> "Conditioning":
        """Both sets of samples in one pack, so that a single call of the network serves two conditions."""
        first = self.sample_of_token if self.rows is None else self.rows
        second = other.sample_of_token if other.rows is None else other.rows
        rows = None if self.rows is None and other.rows is None else torch.cat([first, second + int(first.max()) + 1])
        labels = None if self.labels is None or other.labels is None else torch.cat([self.labels, other.labels])
        jump = None if self.jump is None or other.jump is None else torch.cat([self.jump, other.jump])
        guidance = None if self.guidance is None or other.guidance is None else torch.cat([self.guidance, other.guidance])
        text = torch.cat([self.text, other.text])
        return Conditioning(self.grids + other.grids, text, self.text_lengths + other.text_lengths, rows, labels, jump, guidance)


@dataclass(frozen=True)
class PackedLatents:
    """Clean latents of a pack: what the encoders hand to the objective.

    tokens: (L, P) float32. keys: one 63-bit random key a sample (seed, epoch and sample id hashed). ids: "shard/key" of each.
    weights: (n,) 1 for a real sample, 0 for a hole left by an unreadable one. place: None for a pack that is a step of its own.
    """

    tokens: Tensor
    cond: Conditioning
    keys: tuple[int, ...]
    ids: tuple[str, ...]
    weights: Tensor
    place: InStep | None = None

    def to(self, device: torch.device) -> "PackedLatents":
        """Copy to `device`."""
        cond = self.cond
        moved = replace(
            cond,
            text=cond.text.to(device, non_blocking=True),
            rows=None if cond.rows is None else cond.rows.to(device, non_blocking=True),
            labels=None if cond.labels is None else cond.labels.to(device, non_blocking=True),
        )
        tokens, weights = self.tokens.to(device, non_blocking=True), self.weights.to(device, non_blocking=True)
        return replace(self, tokens=tokens, cond=moved, weights=weights)


def pack_conditioning(grids: Sequence[Grid], texts: Sequence[Tensor], labels: Tensor | None = None) -> Conditioning:
    """Conditioning of samples with the given token `grids`, `texts` (n tensors (S_i, D_text)) and class `labels` (n,)."""
    return Conditioning(tuple(grids), torch.cat(list(texts)), tuple(len(text) for text in texts), None, labels)


def patchify(latents: Tensor, patch: Grid) -> Tensor:
    """(C, T, H, W) -> (t*h*w, pt*ph*pw*C). Raises UserError if an axis is no multiple of the patch."""
    check_patch(tuple(latents.shape[1:]), patch)
    pt, ph, pw = patch
    return rearrange(latents, "c (t pt) (h ph) (w pw) -> (t h w) (pt ph pw c)", pt=pt, ph=ph, pw=pw)


def unpatchify(tokens: Tensor, grid: Grid, patch: Grid) -> Tensor:
    """(t*h*w, pt*ph*pw*C) -> (C, T, H, W): the inverse of `patchify`."""
    (t, h, w), (pt, ph, pw) = grid, patch
    return rearrange(tokens, "(t h w) (pt ph pw c) -> c (t pt) (h ph) (w pw)", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)


def unpack(tokens: Tensor, cond: Conditioning, patch: Grid) -> list[Tensor]:
    """(L, P) -> one (C, T, H, W) a sample."""
    return [unpatchify(part, grid, patch) for part, grid in zip(tokens.split(cond.lengths), cond.grids, strict=True)]


def check_patch(size: tuple[int, ...], patch: Grid) -> Grid:
    """The token grid of latents of `size` (T, H, W). Raises UserError that names the axis which does not divide."""
    for axis, have, part in zip("THW", size, patch, strict=True):
        if have % part:
            raise UserError(
                f"latents of {size} do not divide into patches of {patch}: axis {axis} has {have} % {part} = {have % part}. "
                "Change the size in `sizes`, or backbone.patch_size"
            )
    t, h, w = (have // part for have, part in zip(size, patch, strict=True))
    return t, h, w


def _grid_positions(grid: Grid) -> Tensor:
    axes = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    return torch.stack(axes, dim=-1).reshape(-1, 3)
