"""The stream as a rank sees it: the packs of its share of every global step, read, verified and decoded.

What is read follows from the plan alone; worker processes only read ahead. A sample that cannot be used keeps its place
as a hole, with the reason. Knows nothing of encoders.
"""

import logging
import os
import signal
import weakref
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from data_pipelines.cache import Prefetch, ShardCache
from data_pipelines.parcels import Parcel, RawPack, Slots, Task, wrap
from data_pipelines.plan import START, Plan, PlannedSample, Position, check_world_size, share
from data_pipelines.raw import RawSample, read_sample
from data_pipelines.workers import InOrder, WorkerLost

log = logging.getLogger(__name__)
ON_THE_LIST = "on the skip list"
"""Why a sample is a hole that was unusable before."""
_LOSSES = 3  # of workers in a row that no sample explains, before something else must be wrong

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


# --- from workers to the rank -----------------------------------------------------------------------------------


class _Reader(Dataset[Parcel]):
    """Map-style over tasks instead of numbers: the sampler says what to read, the reader holds no state.

    busy: (workers, 3) shared; process, task and sample that each worker is at, so that its end tells which sample was its last.
    """

    def __init__(self, seconds: float, busy: Tensor, slots: Slots, cache: ShardCache | None) -> None:
        self.seconds, self.busy, self.slots, self.cache = seconds, busy, slots, cache

    def __getitem__(self, task: Task) -> Parcel:
        return wrap(task, [self._sample(task, number, planned) for number, planned in enumerate(task.pack)], self.slots)

    def _sample(self, task: Task, number: int, planned: PlannedSample) -> RawSample:
        if number in task.holes:
            return RawSample(planned.id, planned.key, error=task.holes[number])
        if (worker := get_worker_info()) is None:
            return read_sample(planned, self.seconds, self.cache)
        place = self.busy[worker.id].numpy()
        place[:] = os.getpid(), task.number, number
        sample = read_sample(planned, self.seconds, self.cache)
        place[0] = 0
        return sample


class _Tasks(Sampler[Task]):
    """This rank's packs in order, without end. waiting: those that are given out and not delivered. left_out: ids not to read."""

    def __init__(
        self, plan: Plan, rank: int, world_size: int, start: Position, left_out: set[str], prefetch: Prefetch | None = None
    ) -> None:
        self.plan, self.rank, self.world_size, self.left_out, self.prefetch = plan, rank, world_size, left_out, prefetch
        self.waiting: deque[Task] = deque()
        self._again: deque[Task] = deque()
        self._fresh = self._from(start)

    def __iter__(self) -> Iterator[Task]:
        while True:
            task = self._again.popleft() if self._again else next(self._fresh)
            self.waiting.append(task)
            yield task

    def give_again(self, holes: Mapping[tuple[int, int], str]) -> None:
        """Begin anew with what was not delivered, now with `holes`, why by (task, sample)."""
        for task in self.waiting:
            found = {sample: why for (number, sample), why in holes.items() if number == task.number}
            self._again.append(replace(task, holes={**task.holes, **found}))
        self.waiting.clear()

    def _from(self, position: Position) -> Iterator[Task]:
        number, fetched = 0, None
        while True:
            if self.prefetch and (window := position[:2]) != fetched:
                self.prefetch.want(self.plan.shards(*window) + self.plan.shards(position.epoch, position.window + 1))
                fetched = window
            step = self.plan.step(position)
            for pack in share(step.packs, self.rank, self.world_size):
                holes = {i: ON_THE_LIST for i, planned in enumerate(pack) if planned.id in self.left_out}
                yield Task(number, pack, step.place(pack), step.after, holes)
                number += 1
            position = step.after


# --- the stream -------------------------------------------------------------------------------------------------


class StepStream(Iterator[StepPacks]):
    """One rank's endless iterator over global steps, from `start`. `skip`: ids that become holes without being read.

    A worker that dies is replaced, and the sample that it died of is a hole. Close it, or use it in a `with` block; it also closes
    when it is collected or the process ends.
    """

    def __init__(self, plan: Plan, rank: int, world_size: int, start: Position = START, skip: frozenset[str] = frozenset()) -> None:
        check_world_size(plan.config, world_size)
        assert 0 <= rank < world_size, (rank, world_size)
        self._each = plan.config.packs_per_step // world_size
        plan.step(start)  # an error in the plan is raised here, not in the middle of the loader
        self._config, self._left_out, self._lost = plan.config, set(skip), 0
        self._busy = torch.zeros(plan.config.num_workers, 3, dtype=torch.int64).share_memory_()
        self._cache = ShardCache.open(plan.config.cache) if plan.config.cache else None
        self._prefetch = Prefetch(self._cache) if self._cache else None
        if self._prefetch:
            weakref.finalize(self, self._prefetch.close)
        self._tasks = _Tasks(plan, rank, world_size, start, self._left_out, self._prefetch)
        self._parcels = self._open()

    def leave_out(self, ids: Iterable[str]) -> None:
        """From the next step on `ids` are holes, whether or not they were read ahead: equal on all ranks if `ids` are."""
        self._left_out.update(ids)

    def __next__(self) -> StepPacks:
        parcels, packs = [], []
        for _ in range(self._each):
            parcels.append(self._next_parcel())
            packs.append(parcels[-1].open(self._slots))  # at once: the slots go with the workers
        if self._left_out:
            packs = [replace(pack, samples=tuple(map(self._kept, pack.samples))) for pack in packs]
        samples = [sample for pack in packs for sample in pack.samples]
        bad = [(sample.id, sample.error) for sample in samples if sample.error is not None]
        counters = Counter("empty_captions" for sample in samples if sample.error is None and not sample.caption)
        return StepPacks(packs, parcels[0].place.samples, parcels[0].after, bad, dict(counters))

    def _open(self) -> InOrder[Parcel]:
        config = self._config
        self._slots = Slots(config.num_workers)
        reader = _Reader(config.sample_seconds, self._busy, self._slots, self._cache)
        return InOrder(reader, self._tasks, config.num_workers, int(config.worker_gib * 2**30))

    def _next_parcel(self) -> Parcel:
        while True:
            try:
                parcel = next(self._parcels)
            except WorkerLost as lost:
                self._replace_workers(lost)
            else:
                self._tasks.waiting.popleft()
                return parcel

    def _replace_workers(self, lost: WorkerLost) -> None:
        """Start other workers on what was not delivered. Raises WorkerLost again if they keep dying without a sample to blame."""
        self._parcels.close(kill=True)
        holes = {(task, sample): self._reason(lost.codes[pid]) for pid, task, sample in self._busy.tolist() if pid in lost.codes}
        self._lost = 0 if holes else self._lost + 1
        log.warning("%s; going on with others%s", lost, f" without the samples they were at: {len(holes)}" if holes else "")
        if self._lost > _LOSSES:
            raise lost
        self._busy.zero_()
        self._tasks.give_again(holes)
        self._parcels = self._open()

    def _reason(self, code: int) -> str:
        if code == -signal.SIGPROF:
            return f"took longer than {self._config.sample_seconds:g} s"
        return f"ended its reader ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"

    def _kept(self, sample: RawSample) -> RawSample:
        listed = sample.id in self._left_out
        return RawSample(sample.id, sample.key, error=ON_THE_LIST) if listed else sample

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers at once, for they hold nothing. The stream yields nothing more."""
        self._parcels.close(kill=True)
        if self._prefetch:
            self._prefetch.close()
