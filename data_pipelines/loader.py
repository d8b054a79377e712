"""The stream as a rank sees it: the packs of its share of every global step, read, verified and decoded.

What is read follows from the plan alone; worker processes only read ahead. A sample that cannot be used keeps its place
as a hole, with the reason. Knows nothing of encoders.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Self

from data_pipelines.cache import Prefetch, ShardCache
from data_pipelines.parcels import RawPack, Task
from data_pipelines.plan import START, Plan, Position, check_world_size, share
from data_pipelines.raw import RawSample
from data_pipelines.readers import read_packs

ON_THE_LIST = "on the skip list"
"""Why a sample is a hole that was unusable before."""

__all__ = ["RawPack", "RawSample", "StepPacks", "StepStream"]


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


def _tasks(plan: Plan, rank: int, world_size: int, start: Position, left_out: set[str], prefetch: Prefetch | None) -> Iterator[Task]:
    """This rank's packs in order, without end. left_out: ids not to read."""
    position, number, fetched = start, 0, None
    while True:
        if prefetch and (window := position[:2]) != fetched:
            prefetch.want(plan.shards(*window) + plan.shards(position.epoch, position.window + 1))
            fetched = window
        step = plan.step(position)
        for pack in share(step.packs, rank, world_size):
            holes = {i: ON_THE_LIST for i, planned in enumerate(pack) if planned.id in left_out}
            yield Task(number, pack, step.place(pack), step.after, holes)
            number += 1
        position = step.after


class StepStream(Iterator[StepPacks]):
    """One rank's endless iterator over global steps, from `start`. `skip`: ids that become holes without being read.

    A worker that dies is replaced, and the sample that it died of is a hole. Close it, or use it in a `with` block; it also closes
    when it is collected or the process ends.
    """

    def __init__(self, plan: Plan, rank: int, world_size: int, start: Position = START, skip: frozenset[str] = frozenset()) -> None:
        config = plan.config
        check_world_size(config, world_size)
        assert 0 <= rank < world_size, (rank, world_size)
        self._each = config.packs_per_step // world_size
        plan.step(start)  # an error in the plan is raised here, not in the middle of the loader
        self._left_out = set(skip)
        cache = ShardCache.open(config.cache) if config.cache else None
        self._prefetch = Prefetch(cache) if cache else None
        if self._prefetch:
            weakref.finalize(self, self._prefetch.close)
        tasks = _tasks(plan, rank, world_size, start, self._left_out, self._prefetch)
        self._packs = read_packs(tasks, config.num_workers, config.sample_seconds, int(config.worker_gib * 2**30), cache)

    def leave_out(self, ids: Iterable[str]) -> None:
        """From the next step on `ids` are holes, whether or not they were read ahead: equal on all ranks if `ids` are."""
        self._left_out.update(ids)

    def __next__(self) -> StepPacks:
        read = [next(self._packs) for _ in range(self._each)]
        step, packs = read[0][0], [pack for _, pack in read]
        if self._left_out:
            packs = [replace(pack, samples=tuple(map(self._kept, pack.samples))) for pack in packs]
        samples = [sample for pack in packs for sample in pack.samples]
        bad = [(sample.id, sample.error) for sample in samples if sample.error is not None]
        counters = Counter("empty_captions" for sample in samples if sample.error is None and not sample.caption)
        return StepPacks(packs, step.place.samples, step.after, bad, dict(counters))

    def _kept(self, sample: RawSample) -> RawSample:
        listed = sample.id in self._left_out
        return RawSample(sample.id, sample.key, error=ON_THE_LIST) if listed else sample

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers at once, for they hold nothing. The stream yields nothing more."""
        self._packs.close()
        if self._prefetch:
            self._prefetch.close()
