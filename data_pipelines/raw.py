"""One sample read by its plan: verified bytes to tensors, or the reason why there are none.

Knows nothing of packs, steps or processes. Letters: T frames, H rows, W columns, C latent channels, S text tokens, D their width.
"""

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
from data_pipelines.storage import Member, read_members

# Nor are they written: a view saves a copy.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable", module=__name__)


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


def read_sample(planned: PlannedSample, seconds: float | None = None, cache: ShardCache | None = None) -> RawSample:
    """Read and decode one planned sample, alone and anywhere. What makes it unusable becomes its `error`; so does taking `seconds`.

    Waiting for remote storage does not count, for the sample is not to blame: storage has a patience of its own.
    """
    limit = nullcontext if seconds is None else partial(deadline, seconds)
    try:
        read = partial(_members, planned, cache.read_members if cache else read_members)
        data = read() if "://" in planned.shard else None
        with limit():
            return _decoded(planned, read() if data is None else data)
    except BadSample as error:
        return RawSample(planned.id, planned.key, error=error.reason)
    except MemoryError:
        return RawSample(planned.id, planned.key, error="needs more memory than a loader process may take")


def _members(planned: PlannedSample, read: Callable[[str, Mapping[str, Member]], dict[str, bytes]]) -> dict[str, bytes]:
    members = planned.entry.members
    media = media_extension(set(members))
    wanted = {media, CAPTION_EXTENSION, LABEL_EXTENSION, *([TEXT_EXTENSION] if media == LATENTS_EXTENSION else [])}
    return read(planned.shard, {name: place for name, place in members.items() if name in wanted})


def _decoded(planned: PlannedSample, data: Mapping[str, bytes]) -> RawSample:
    media = media_extension(set(data))
    sample = partial(RawSample, planned.id, planned.key, read_caption(data.get(CAPTION_EXTENSION, b"")), _label(planned.entry.meta, data))
    if media != LATENTS_EXTENSION:
        assert planned.size is not None, planned.id
        pixels = decode(data[media], media, planned.size, planned.key)
        return sample(pixels=torch.from_numpy(np.ascontiguousarray(pixels)))
    latents = _array(data[LATENTS_EXTENSION], 4)
    facts = planned.entry.facts
    if latents.shape[1:] != (facts.frames, facts.height, facts.width):
        raise BadSample(f"latents of {tuple(latents.shape)}, the index says {(facts.frames, facts.height, facts.width)}")
    return sample(latents=latents, text=_array(data[TEXT_EXTENSION], 2) if TEXT_EXTENSION in data else None)


def _array(data: bytes, axes: int) -> Tensor:
    values = decode_npy(data)
    if values.ndim != axes or 0 in values.shape:
        raise BadSample(f"array of shape {values.shape}, expected {axes} axes")
    return torch.from_numpy(values)


def _label(meta: Mapping[str, Any], data: Mapping[str, bytes]) -> int | None:
    value = meta.get("label", data.get(LABEL_EXTENSION))
    if value is None:
        return None
    try:
        label = int(value)
    except (ValueError, TypeError) as error:
        raise BadSample("class label is not a whole number") from error
    if label < 0:
        raise BadSample("class label is negative")
    return label
