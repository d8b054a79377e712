"""Packs on their way from the process that reads them to the rank: read into memory that both see, without a copy.

Knows nothing of how they are read.
"""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipelines.packed import Grid, InStep
from data_pipelines.plan import PlannedPack, Position
from data_pipelines.raw import Memory, RawSample

_SLOTS = 64  # of a reader; what a rank holds beyond them gets memory of its own
_TENSORS = ("pixels", "latents", "text")

Part = tuple[int, str, np.dtype, tuple[int, ...], int]
"""A tensor of a pack: number of the sample, name, type, shape and offset."""


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


class Slot(NamedTuple):
    """Where a pack lies. number: None for memory that is not used again. fresh: the memory, None where the rank knows it."""

    number: int | None
    fresh: Tensor | None


class Slots:
    """Memory of one reader that packs are read into, used again once nothing is left of the pack in it: to touch fresh memory costs
    several times as much as to read into it. Reader and rank have an object each, or share one in the same process.

    taken: (slots,) shared; the reader sets what the rank clears.
    """

    def __init__(self, *, shared: bool) -> None:
        self.shared = shared
        self.taken = torch.zeros(_SLOTS, dtype=torch.uint8)
        if shared:
            self.taken.share_memory_()
        self._memory: dict[int, Tensor] = {}

    def take(self, length: int) -> tuple[Slot, Memory]:
        """For the reader: a free slot with at least `length` bytes."""
        free = [number for number, taken in enumerate(self.taken.tolist()) if not taken]
        number = next((number for number in free if number in self._memory and len(self._memory[number]) >= length), None)
        if number is not None:
            self.taken[number] = 1
            return Slot(number, None), self._memory[number].numpy()
        room = 1 + length + length // 8  # the next may be larger; a pack of holes alone has none
        # what is not in shared memory from the beginning would be copied there
        storage = torch.UntypedStorage._new_shared(room) if self.shared else torch.UntypedStorage(room)
        memory = torch.empty(0, dtype=torch.uint8).set_(storage)
        number = free[0] if free else None
        if number is not None:
            self.taken[number], self._memory[number] = 1, memory
        return Slot(number, memory), memory.numpy()

    def receive(self, slot: Slot) -> Memory:
        """For the rank: what was handed over. The slot is free when the last view of it is gone."""
        number, fresh = slot
        if number is None:
            assert fresh is not None
            return fresh.numpy()
        if fresh is not None:
            self._memory[number] = fresh
        array = self._memory[number].numpy()  # which views of it keep, as they would not keep a view
        weakref.finalize(array, self.taken.__setitem__, number, 0).atexit = False
        return array


@dataclass(frozen=True)
class Parcel:
    """A pack that was read. worker: number of the process. parts: tensors that lie in the slot and are missing in the samples."""

    samples: tuple[RawSample, ...]
    worker: int
    parts: tuple[Part, ...] = ()
    slot: Slot | None = None

    @classmethod
    def wrap(cls, samples: list[RawSample], worker: int, slot: Slot, memory: Memory) -> "Parcel":
        """What goes from process to process is where the tensors lie."""
        parts = []
        for number, sample in enumerate(samples):
            for name in _TENSORS:
                if (tensor := getattr(sample, name)) is not None:
                    parts.append((number, name, tensor.numpy().dtype, tuple(tensor.shape), tensor.data_ptr() - memory.ctypes.data))
            samples[number] = replace(sample, pixels=None, latents=None, text=None)
        return cls(tuple(samples), worker, tuple(parts), slot)

    def open(self, slots: Slots) -> tuple[RawSample, ...]:
        """The samples with their tensors: views of the slot."""
        if self.slot is None:
            return self.samples
        memory = slots.receive(self.slot)
        samples = list(self.samples)
        for number, name, dtype, shape, offset in self.parts:
            tensor = torch.from_numpy(np.ndarray(shape, dtype, memory, offset))
            samples[number] = replace(samples[number], **{name: tensor})  # type: ignore[arg-type]
        return tuple(samples)
