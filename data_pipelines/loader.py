"""The stream as a rank sees it: the packs of its share of every global step, read, verified and decoded.

What is read follows from the plan alone; worker processes only read ahead. A sample that cannot be used keeps its place
as a hole, with the reason. Knows nothing of encoders.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from data_pipelines.cache import Prefetch, ShardCache
from data_pipelines.packed import Grid
from data_pipelines.plan import START, Plan, PlannedPack, PlannedSample, Position, check_world_size, share
from data_pipelines.raw import RawSample, read_sample
from data_pipelines.workers import InOrder

__all__ = ["RawPack", "RawSample", "StepPacks", "StepStream"]


@dataclass(frozen=True)
class RawPack:
    """The samples of a pack and the token grid (t, h, w) that each has a place for, holes included."""

    samples: tuple[RawSample, ...]
    grids: tuple[Grid, ...]

    @property
    def ids(self) -> tuple[str, ...]:
        """Id of each sample."""
        return tuple(sample.id for sample in self.samples)


@dataclass(frozen=True)
class StepPacks:
    """This rank's share of a global step.

    samples: number of samples of the whole step, holes included. position: where the next step begins.
    bad: (id, reason) of this rank's holes. counters: what else is worth counting.
    """

    packs: list[RawPack]
    samples: int
    position: Position
    bad: list[tuple[str, str]]
    counters: dict[str, int] = field(default_factory=dict)


# --- from workers to the rank -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """One pack to read, and what the plan says of the step that it belongs to."""

    pack: PlannedPack
    samples: int
    after: Position


@dataclass(frozen=True)
class _Parcel:
    """A pack that was read, all its tensors in one buffer: a worker hands over one shared memory segment, not hundreds."""

    samples: tuple[RawSample, ...]
    grids: tuple[Grid, ...]
    task_samples: int
    after: Position
    parts: tuple[tuple[int, str, torch.dtype, tuple[int, ...]], ...]
    buffer: Tensor

    def open(self) -> RawPack:
        """Views of the buffer at their places."""
        samples = list(self.samples)
        offset = 0
        for number, name, dtype, shape in self.parts:
            end = offset + _aligned(torch.Size(shape).numel() * dtype.itemsize)
            flat = self.buffer[offset:end].view(dtype)[: torch.Size(shape).numel()]
            samples[number] = replace(samples[number], **{name: flat.view(shape)})  # type: ignore[arg-type]
            offset = end
        return RawPack(tuple(samples), self.grids)


def _aligned(length: int) -> int:
    return -(-length // 16) * 16


def _parcel(task: _Task, samples: list[RawSample]) -> _Parcel:
    parts, tensors = [], []
    for number, sample in enumerate(samples):
        for name in ("pixels", "latents", "text"):
            if (tensor := getattr(sample, name)) is not None:
                parts.append((number, name, tensor.dtype, tuple(tensor.shape)))
                tensors.append(tensor)
        samples[number] = replace(sample, pixels=None, latents=None, text=None)
    buffer = torch.zeros(sum(_aligned(tensor.nbytes) for tensor in tensors), dtype=torch.uint8)
    offset = 0
    for tensor in tensors:
        buffer[offset : offset + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
        offset += _aligned(tensor.nbytes)
    grids = tuple(planned.grid for planned in task.pack)
    return _Parcel(tuple(samples), grids, task.samples, task.after, tuple(parts), buffer)


class _Reader(Dataset[_Parcel]):
    """Map-style over tasks instead of numbers: the sampler says what to read, the reader holds no state but the skip list."""

    def __init__(self, skip: frozenset[str], cache: ShardCache | None) -> None:
        self.skip, self.cache = skip, cache

    def __getitem__(self, task: _Task) -> _Parcel:
        return _parcel(task, [self._sample(planned) for planned in task.pack])

    def _sample(self, planned: PlannedSample) -> RawSample:
        if planned.id in self.skip:
            return RawSample(planned.id, planned.key, error="on the skip list")
        return read_sample(planned, self.cache)


class _Tasks(Sampler[_Task]):
    """This rank's packs in order, without end."""

    def __init__(self, plan: Plan, rank: int, world_size: int, start: Position, prefetch: Prefetch | None) -> None:
        self.plan, self.rank, self.world_size, self.start, self.prefetch = plan, rank, world_size, start, prefetch

    def __iter__(self) -> Iterator[_Task]:
        position, fetched = self.start, None
        while True:
            if self.prefetch and (window := position[:2]) != fetched:
                self.prefetch.want(self.plan.shards(*window) + self.plan.shards(position.epoch, position.window + 1))
                fetched = window
            step = self.plan.step(position)
            for pack in share(step.packs, self.rank, self.world_size):
                yield _Task(pack, step.samples, step.after)
            position = step.after


# --- the stream -------------------------------------------------------------------------------------------------


class StepStream(Iterator[StepPacks]):
    """One rank's endless iterator over global steps, from `start`. `skip`: ids that become holes without being read.

    Close it, or use it in a `with` block; it also closes when it is collected or the process ends.
    """

    def __init__(self, plan: Plan, rank: int, world_size: int, start: Position = START, skip: frozenset[str] = frozenset()) -> None:
        check_world_size(plan.config, world_size)
        assert 0 <= rank < world_size, (rank, world_size)
        self._each = plan.config.packs_per_step // world_size
        plan.step(start)  # an error in the plan is raised here, not in the middle of the loader
        cache = ShardCache.open(plan.config.cache) if plan.config.cache else None
        self._prefetch = Prefetch(cache) if cache else None
        if self._prefetch:
            weakref.finalize(self, self._prefetch.close)
        tasks = _Tasks(plan, rank, world_size, start, self._prefetch)
        self._parcels = InOrder(_Reader(skip, cache), tasks, plan.config.num_workers)

    def __next__(self) -> StepPacks:
        parcels = [next(self._parcels) for _ in range(self._each)]
        packs = [parcel.open() for parcel in parcels]
        samples = [sample for pack in packs for sample in pack.samples]
        bad = [(sample.id, sample.error) for sample in samples if sample.error is not None]
        counters = Counter("empty_captions" for sample in samples if sample.error is None and not sample.caption)
        return StepPacks(packs, parcels[0].task_samples, parcels[0].after, bad, dict(counters))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. The stream yields nothing more."""
        self._parcels.close()
        if self._prefetch:
            self._prefetch.close()
