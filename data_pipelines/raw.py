"""One sample read by its plan: verified bytes to tensors, or the reason why there are none.

Knows nothing of packs, steps or processes. Letters: T frames, H rows, W columns, C latent channels, S text tokens, D their width.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipelines import storage
from data_pipelines.cache import ShardCache
from data_pipelines.deadline import deadline
from data_pipelines.decode import decode, decode_npy
from data_pipelines.plan import PlannedSample
from data_pipelines.samples import (
    CAPTION_EXTENSION,
    LABEL_EXTENSION,
    LATENTS_EXTENSION,
    TEXT_EXTENSION,
    BadSample,
    media_extension,
    read_caption,
)
from data_pipelines.storage import Member

Memory = NDArray[np.uint8]
_Read = Callable[[str, Mapping[str, Member], memoryview], dict[str, memoryview]]


@dataclass(frozen=True)
class RawSample:
    """One sample: either pixels, uint8 (T, H, W, 3), or cached latents (C, T, H, W), or an error; text: (S, D) if cached."""

    id: str
    key: int
    caption: str = ""
    label: int | None = None
    pixels: Tensor | None = None
    latents: Tensor | None = None
    text: Tensor | None = None
    error: str | None = None


def room_for(planned: PlannedSample) -> int:
    """Bytes of memory that the tensors of a sample take."""
    return storage.room_for(_wanted(planned)) if planned.size is None else 3 * math.prod(planned.size)


def announce(planned: PlannedSample) -> None:
    """Say that a sample will be read soon."""
    storage.announce(planned.shard, _wanted(planned))


def read_sample(
    planned: PlannedSample, seconds: float | None = None, cache: ShardCache | None = None, memory: Memory | None = None
) -> RawSample:
    """Read and decode one planned sample, alone and anywhere. What makes it unusable becomes its `error`; so does taking `seconds`.

    memory: where its tensors are put, `room_for` bytes; None takes some. Waiting for remote storage does not count as time,
    for the sample is not to blame: storage has a patience of its own.
    """
    limit = nullcontext if seconds is None else partial(deadline, seconds)
    try:
        if memory is None:
            memory = np.empty(room_for(planned), np.uint8)
        read = partial(_read, planned, cache.read_into if cache else storage.read_into, memory)
        data = read() if "://" in planned.shard else None
        with limit():
            return _decoded(planned, read() if data is None else data, memory)
    except BadSample as error:
        return RawSample(planned.id, planned.key, error=error.reason)
    except MemoryError:
        return RawSample(planned.id, planned.key, error="needs more memory than a loader process may take")


def _wanted(planned: PlannedSample) -> dict[str, Member]:
    members = planned.entry.members
    media = media_extension(set(members))
    names = {media, CAPTION_EXTENSION, LABEL_EXTENSION, *([TEXT_EXTENSION] if media == LATENTS_EXTENSION else [])}
    return {name: place for name, place in members.items() if name in names}


def _read(planned: PlannedSample, read: _Read, memory: Memory) -> dict[str, memoryview]:
    """Latents are used where they were read; of pictures only the decoded ones need to stay."""
    members = _wanted(planned)
    if planned.size is not None:
        memory = np.empty(storage.room_for(members), np.uint8)
    return read(planned.shard, members, memory.data)


def _decoded(planned: PlannedSample, data: Mapping[str, memoryview], memory: Memory) -> RawSample:
    caption = read_caption(bytes(data.get(CAPTION_EXTENSION, b"")))
    sample = partial(RawSample, planned.id, planned.key, caption, _label(planned.entry.meta, data))
    if planned.size is not None:
        media = media_extension(set(data))
        pixels = memory.reshape(*planned.size, 3)
        decode(bytes(data[media]), media, planned.size, planned.key, pixels)
        return sample(pixels=torch.from_numpy(pixels))
    latents = _array(data[LATENTS_EXTENSION], 4)
    facts = planned.entry.facts
    if latents.shape[1:] != (facts.frames, facts.height, facts.width):
        raise BadSample(f"latents of {tuple(latents.shape)}, the index says {(facts.frames, facts.height, facts.width)}")
    return sample(latents=latents, text=_array(data[TEXT_EXTENSION], 2) if TEXT_EXTENSION in data else None)


def _array(data: memoryview, axes: int) -> Tensor:
    values = decode_npy(data)
    if values.ndim != axes or 0 in values.shape:
        raise BadSample(f"array of shape {values.shape}, expected {axes} axes")
    return torch.from_numpy(values)


def _label(meta: Mapping[str, Any], data: Mapping[str, memoryview]) -> int | None:
    value = meta.get("label", data.get(LABEL_EXTENSION))
    if value is None:
        return None
    try:
        label = int(bytes(value) if isinstance(value, memoryview) else value)
    except (ValueError, TypeError) as error:
        raise BadSample("class label is not a whole number") from error
    if label < 0:
        raise BadSample("class label is negative")
    return label
