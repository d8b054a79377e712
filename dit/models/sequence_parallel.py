"""The backbone over several ranks that compute a pack together: each has a part of the tokens, and all have the answer.

Everything but self-attention works token by token, or sees text that each rank has. A loss of the answer, equal on all ranks and
divided by their number, has gradients whose sum over the ranks is that of the loss.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from torch import Tensor

from data_pipelines.errors import UserError
from data_pipelines.packed import Conditioning
from dit.config import SpatioTemporalDiTConfig
from dit.models.attention import AttentionLayout
from dit.models.dit import SpatioTemporalDiT
from dit.models.shares import Shares
from dit.runtime import distributed


@dataclass(frozen=True, kw_only=True)
class PartConditioning(Conditioning):
    """What goes with the tokens of one rank: its samples, the first and the last of them maybe in part. grids: of the whole samples."""

    whole: Conditioning
    shares: Shares
    samples: slice
    """Those that this rank has tokens of."""

    @classmethod
    def of(cls, whole: Conditioning, shares: Shares) -> "PartConditioning":
        """What goes with this rank's own of `shares`, which is not empty."""
        own, ends = shares.own, list(accumulate(whole.lengths))
        samples = slice(bisect_right(ends, own.start), bisect_left(ends, own.stop) + 1)
        texts = [0, *accumulate(whole.text_lengths)]
        return cls(
            grids=whole.grids[samples],
            text=whole.text[texts[samples.start] : texts[samples.stop]],
            text_lengths=whole.text_lengths[samples],
            rows=None if whole.rows is None else whole.rows[own],
            labels=None if whole.labels is None else whole.labels[samples],
            jump=whole.jump if whole.jump is None or whole.rows is not None else whole.jump[samples],
            guidance=whole.guidance if whole.guidance is None or whole.rows is not None else whole.guidance[samples],
            whole=whole,
            shares=shares,
            samples=samples,
        )

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sample on this rank."""
        own, ends = self.shares.own, [0, *accumulate(self.whole.lengths)]
        return tuple(min(own.stop, ends[i + 1]) - max(own.start, ends[i]) for i in range(self.samples.start, self.samples.stop))

    @cached_property
    def positions(self) -> Tensor:
        """(l, 3) position of each token in its sample."""
        return self.whole.positions[self.shares.own]


class SequenceParallelDiT(SpatioTemporalDiT):
    """`SpatioTemporalDiT`, with the same parameters under the same names. All ranks of a pack call it, with equal arguments."""

    def __init__(self, config: SpatioTemporalDiTConfig, **sizes: Any) -> None:
        ranks = distributed.sequence_parallel()
        if rest := config.num_heads % ranks:
            raise UserError(
                f"backbone.num_heads % engine.sequence_parallel = {config.num_heads} % {ranks} = {rest}, expected 0: "
                "each rank attends with an equal number of heads; change either"
            )
        super().__init__(config, **sizes)

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x_t (L, P), t (R,) -> (L, P), as `SpatioTemporalDiT` answers."""
        part = _part_of(len(x_t), cond)
        return part.shares.gather(super().forward(x_t[part.shares.own], t if cond.rows is not None else t[part.samples], part))

    def features(self, x_t: Tensor, t: Tensor, cond: Conditioning, blocks: Sequence[int]) -> list[Tensor]:
        """(L, D) after each of `blocks`, as those of `SpatioTemporalDiT`."""
        part = _part_of(len(x_t), cond)
        own = super().features(x_t[part.shares.own], t if cond.rows is not None else t[part.samples], part, blocks)
        return [part.shares.gather(x) for x in own]

    def layouts(self, cond: Conditioning) -> tuple[AttentionLayout, ...]:
        """Segmentations of the whole pack, whose tokens lie on several ranks."""
        assert isinstance(cond, PartConditioning), type(cond)
        return tuple(replace(layout, shares=cond.shares) for layout in super().layouts(cond.whole))


def _part_of(tokens: int, cond: Conditioning) -> PartConditioning:
    shares = Shares.even(tokens)
    if 0 in shares.lengths:
        raise UserError(f"a pack of {tokens} tokens cannot be shared by engine.sequence_parallel={len(shares.lengths)} ranks")
    return PartConditioning.of(cond, shares)
