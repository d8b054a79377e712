"""What all ranks must know about a step before it is taken, in one small all-reduce."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_pipelines.randomness import key
from dit.engine.stragglers import OwnTime
from dit.runtime import distributed
from dit.runtime.losses import Losses

BINS = 5
"""Losses are also shown for each fifth of t in [0, 1]."""


@dataclass(frozen=True)
class Totals:
    """One step, over all ranks. ids_hash does not depend on order, packing or world size."""

    loss: float
    bad: int
    stop: bool
    ids_hash: str
    flops: float
    bins: dict[str, float]
    figures: dict[str, float]


class Tally:
    """Sums of one step on this rank. Losses stay on their device until `reduce`."""

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._losses: list[Tensor] = []
        self._times: list[Tensor] = []
        self._figures: defaultdict[str, list[Tensor]] = defaultdict(list)
        self.flops = 0.0
        self.own = OwnTime()

    def add(self, ids: Sequence[str], losses: Losses, flops: float) -> None:
        """Count a pack: n sample `ids`, their losses, and its floating-point operations."""
        assert len(ids) == len(losses.per_sample) == len(losses.t), (len(ids), losses.per_sample.shape, losses.t.shape)
        self._ids += ids
        self._losses.append(losses.per_sample.detach())
        self._times.append(losses.t.detach())
        for name, figure in losses.figures.items():
            self._figures[name].append(figure.detach())
        self.flops += flops

    def reduce(self, samples: int, bad: Sequence[tuple[str, str]], stop: bool) -> Totals:
        """Sum over ranks; `samples` is the global count."""
        losses, times = torch.cat(self._losses).double(), torch.cat(self._times)  # (n,), (n,)
        holes = {sample for sample, _ in bad}
        real = torch.tensor([sample not in holes for sample in self._ids], device=losses.device, dtype=torch.float64)  # (n,)
        fifth = (times * BINS).long().clamp(0, BINS - 1)  # (n,)
        sums = losses.new_zeros(BINS).index_add_(0, fifth, losses * real)  # (BINS,)
        counts = losses.new_zeros(BINS).index_add_(0, fifth, real)  # (BINS,)
        hashes = [key("sample", sample) for sample in self._ids]
        low, high = sum(h & 0xFFFFFF for h in hashes), sum(h >> 39 for h in hashes)  # exact in float64 for 2^29 samples
        figures = [torch.cat(parts).double() for parts in self._figures.values()]  # (n,) each
        diagnosed = [torch.stack([figure.nansum(), figure.isfinite().sum()]) for figure in figures]  # (2,) each
        facts = losses.new_tensor([len(bad), low, high, self.flops])  # (4,)
        own = torch.cat([losses.sum()[None], facts, sums, counts, *diagnosed])
        if distributed.sequence_rank() > 0:  # the first of the ranks that compute a pack counts it
            own = torch.zeros_like(own)
        *summed, stops = distributed.all_reduce_sum(torch.cat([own, own.new_tensor([stop])])).tolist()
        bins = zip(summed[5 : 5 + BINS], summed[5 + BINS : 5 + 2 * BINS], strict=True)
        named = {f"{i / BINS:.1f}-{(i + 1) / BINS:.1f}": loss / n for i, (loss, n) in enumerate(bins) if n}
        ids_hash = f"{int(summed[3]) & 0xFFFFFF:06x}{int(summed[2]) & 0xFFFFFF:06x}"
        means = zip(self._figures, summed[5 + 2 * BINS :: 2], summed[6 + 2 * BINS :: 2], strict=True)
        figure_means = {name: total / n for name, total, n in means if n}
        return Totals(summed[0] / samples, int(summed[1]), stops > 0, ids_hash, summed[4], named, figure_means)

    def samples(self) -> list[dict[str, Any]]:
        """Id, time and loss of each sample of this rank; a loss that JSON has no number for as text."""
        losses, times = torch.cat(self._losses).tolist(), torch.cat(self._times).tolist()
        rows = zip(self._ids, times, losses, strict=True)
        return [{"id": i, "t": t, "loss": loss if math.isfinite(loss) else str(loss)} for i, t, loss in rows]
