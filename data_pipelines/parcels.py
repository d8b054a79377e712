"""Packs on their way from the process that reads them to the rank, without a copy at arrival.

Knows nothing of how they are read.
"""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from data_pipelines.packed import Grid, InStep
from data_pipelines.plan import PlannedPack, Position
from data_pipelines.raw import RawSample

_SLOTS = 64  # of a worker; what a rank holds beyond them gets memory of its own


@dataclass(frozen=True)
class RawPack:
    """The samples of a pack and the token grid (t, h, w) that each has a place for, holes included. place: as in `PackedLatents`."""

    samples: tuple[RawSample, ...]
    grids: tuple[Grid, ...]
    place: InStep | None = None

    @property
    def ids(self) -> tuple[str, ...]:
        """Id of each sample."""
        return tuple(sample.id for sample in self.samples)


@dataclass(frozen=True)
class Task:
    """One pack to read, and what the plan says of the step that it belongs to. holes: why samples of it are not read, by their number."""

    number: int
    pack: PlannedPack
    place: InStep
    after: Position
    holes: Mapping[int, str]


@dataclass(frozen=True)
class Parcel:
    """A pack that was read, all its tensors in one buffer: a worker hands over one shared memory segment, not hundreds.

    slot: worker and number of the slot that it is in, None if in none. buffer: None for memory of the slot that the rank knows.
    """

    samples: tuple[RawSample, ...]
    grids: tuple[Grid, ...]
    place: InStep
    after: Position
    parts: tuple[tuple[int, str, torch.dtype, tuple[int, ...]], ...]
    slot: tuple[int, int] | None
    buffer: Tensor | None

    def open(self, slots: "Slots") -> RawPack:
        """Views of the buffer at their places."""
        buffer = slots.receive(self.slot, self.buffer)
        samples = list(self.samples)
        offset = 0
        for number, name, dtype, shape in self.parts:
            end = offset + _aligned(torch.Size(shape).numel() * dtype.itemsize)
            flat = buffer[offset:end].view(dtype)[: torch.Size(shape).numel()]
            samples[number] = replace(samples[number], **{name: flat.view(shape)})  # type: ignore[arg-type]
            offset = end
        return RawPack(tuple(samples), self.grids, self.place)


def _aligned(length: int) -> int:
    return -(-length // 16) * 16


class Slots:
    """Shared memory that packs are handed over in, used again once nothing is left of the pack in it: to touch fresh memory costs
    several times as much as to read into it. Each side has an object of its own.

    taken: (workers, slots) shared; a worker sets what the rank clears.
    """

    def __init__(self, workers: int) -> None:
        self.taken = torch.zeros(workers, _SLOTS, dtype=torch.uint8).share_memory_()
        self._memory: dict[tuple[int, int], Tensor] = {}

    def take(self, worker: int, length: int) -> tuple[tuple[int, int] | None, Tensor, bool]:
        """For a worker: a free slot, its memory, at least `length` bytes, and whether the rank knows that from before."""
        free = next((number for number, taken in enumerate(self.taken[worker].tolist()) if not taken), None)
        slot = None if free is None else (worker, free)
        if slot in self._memory and len(self._memory[slot]) >= length:
            self.taken[slot] = 1
            return slot, self._memory[slot], True
        room = torch.UntypedStorage._new_shared(length + length // 8)  # else it would be copied there later; the next may be larger
        memory = torch.empty(0, dtype=torch.uint8).set_(room)
        if slot is not None:
            self.taken[slot], self._memory[slot] = 1, memory
        return slot, memory, False

    def receive(self, slot: tuple[int, int] | None, fresh: Tensor | None) -> Tensor:
        """For the rank: what was handed over. Its slot is free when the last view of it is gone."""
        if slot is None:
            assert fresh is not None
            return fresh
        if fresh is not None:
            self._memory[slot] = fresh
        array = self._memory[slot].numpy()
        weakref.finalize(array, self.taken.__setitem__, slot, 0).atexit = False
        return torch.from_numpy(array)  # which keeps the array as long as any view


def wrap(task: Task, samples: list[RawSample], slots: Slots) -> Parcel:
    """Pack what a worker read; without workers it stays where it is."""
    grids = tuple(planned.grid for planned in task.pack)
    if (worker := get_worker_info()) is None:
        return Parcel(tuple(samples), grids, task.place, task.after, (), None, torch.empty(0))
    parts, tensors = [], []
    for number, sample in enumerate(samples):
        for name in ("pixels", "latents", "text"):
            if (tensor := getattr(sample, name)) is not None:
                parts.append((number, name, tensor.dtype, tuple(tensor.shape)))
                tensors.append(tensor)
        samples[number] = replace(sample, pixels=None, latents=None, text=None)
    length = sum(_aligned(tensor.nbytes) for tensor in tensors)
    slot, buffer, known = slots.take(worker.id, length)
    offset = 0
    for tensor in tensors:
        buffer[offset : offset + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
        offset += _aligned(tensor.nbytes)
    return Parcel(tuple(samples), grids, task.place, task.after, tuple(parts), slot, None if known else buffer)
