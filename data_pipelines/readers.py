"""Reading packs by worker processes, in the order of their tasks. A sample that ends its process is a hole like any other.

Knows nothing of steps, ranks or plans.
"""

import logging
import signal
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from data_pipelines.cache import ShardCache
from data_pipelines.deadline import alarm, limit_memory
from data_pipelines.parcels import Parcel, RawPack, Slots, Task
from data_pipelines.plan import PlannedSample
from data_pipelines.raw import Memory, RawSample, announce, read_sample, room_for
from data_pipelines.workers import InOrder, WorkerLost

log = logging.getLogger(__name__)
READ_AHEAD = 2
"""Packs that each process reads ahead of their use."""
_ALIGNMENT = 64  # bytes, of a sample in the memory of its pack
_LOSSES = 3  # of workers in a row that no sample explains, before something else must be wrong


def read_packs(
    tasks: Iterable[Task], workers: int, seconds: float | None = None, memory: int | None = None, cache: ShardCache | None = None
) -> InOrder[Task, Parcel, tuple[Task, RawPack]]:
    """Each task and its pack, read by `workers` processes, 0 for none. Close it to end them.

    seconds: of one sample; what takes longer is a hole. memory: bytes that each process may take. None: without limit.
    """
    readers = _Readers(workers, seconds, cache)
    begin = partial(_begin, memory)
    return InOrder(readers, tasks, workers, READ_AHEAD, readers.receive, readers.mend, preload="data_pipelines.parcels", begin=begin)


class _Reader:
    """What one process does with a task: it holds memory, and no state. busy: (2,) shared; task and sample that it is at, -1 for none."""

    def __init__(self, worker: int, seconds: float | None, cache: ShardCache | None, busy: Tensor, slots: Slots) -> None:
        self.worker, self.seconds, self.cache, self.busy, self.slots = worker, seconds, cache, busy, slots

    def __call__(self, task: Task) -> Parcel:
        rooms = [0 if number in task.holes else room_for(planned) for number, planned in enumerate(task.pack)]
        starts = [0, *accumulate(-(-room // _ALIGNMENT) * _ALIGNMENT for room in rooms)]
        for number, planned in enumerate(task.pack):
            if self.cache is None and number not in task.holes:
                announce(planned)
        slot, memory = self.slots.take(starts[-1])
        if not self.slots.shared:
            memory = self.slots.receive(slot)
        with alarm():
            samples = [self._sample(task, n, planned, memory[starts[n] : starts[n] + rooms[n]]) for n, planned in enumerate(task.pack)]
        return Parcel.wrap(samples, self.worker, slot, memory) if self.slots.shared else Parcel(tuple(samples), self.worker)

    def _sample(self, task: Task, number: int, planned: PlannedSample, memory: Memory) -> RawSample:
        if number in task.holes:
            return RawSample(planned.id, planned.key, error=task.holes[number])
        busy = self.busy.numpy()  # to write a tensor costs more than all the rest
        busy[:] = task.number, number
        sample = read_sample(planned, self.seconds, self.cache, memory)
        busy[:] = -1
        return sample


class _Readers:
    """The readers of a stream, one a process, as the rank sees them."""

    def __init__(self, workers: int, seconds: float | None, cache: ShardCache | None) -> None:
        self.workers, self.seconds, self.cache = workers, seconds, cache
        self.busy = torch.full((max(workers, 1), 2), -1).share_memory_()
        self._slots: dict[int, Slots] = {}
        self._lost = 0

    def __call__(self, number: int) -> _Reader:
        """The reader of process `number`, which may be one in place of another that was lost with its memory."""
        self.busy[number] = -1
        self._slots[number] = Slots(shared=self.workers > 0)
        return _Reader(number, self.seconds, self.cache, self.busy[number], self._slots[number])

    def receive(self, task: Task, parcel: Parcel) -> tuple[Task, RawPack]:
        """The pack that was read for a task."""
        grids = tuple(planned.grid for planned in task.pack)
        return task, RawPack(parcel.open(self._slots[parcel.worker]), grids, task.place)

    def mend(self, task: Task, lost: WorkerLost) -> Task:
        """The task without the sample that its process was at. Raises WorkerLost if they keep ending without a sample to blame."""
        blamed = self._blamed(task)
        self._lost = 0 if blamed else self._lost + 1
        if self._lost > _LOSSES:
            raise lost
        what = task.pack[blamed[0]].id if blamed else "nothing that it was at"
        log.warning("a loader is replaced, %s; left out: %s", lost, what)
        return replace(task, holes={**task.holes, **dict.fromkeys(blamed, self._reason(lost.code))})

    def _blamed(self, task: Task) -> list[int]:
        """The number of the sample that the lost process was at. None if it was at none, or if several processes say that they are at
        the task: the others live, and their samples are innocent.
        """
        at = {sample for number, sample in self.busy.tolist() if number == task.number and sample < len(task.pack)}
        blamed = sorted(at - task.holes.keys())  # a hole is not read: that process was lost before
        return blamed if len(blamed) == 1 else []

    def _reason(self, code: int) -> str:
        if code == -signal.SIGPROF:
            return f"took longer than {self.seconds:g} s"
        return f"ended its reader ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"


def _begin(memory: int | None) -> None:
    torch.set_num_threads(1)
    if memory is not None:
        limit_memory(memory)
