"""Clips that are known to be good, with their captions: rendered shapes, shards, or a folder. The reference of every metric.

Order and content follow from (config, split, seed). Nothing here knows what is measured.
"""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor

from data_pipelines import moving_shapes, randomness
from data_pipelines.decode import decode
from data_pipelines.errors import UserError
from data_pipelines.listing import list_source
from data_pipelines.plan import PlannedSample
from data_pipelines.raw import RawSample, read_sample
from data_pipelines.raw_files import MAX_ARCHIVED_BYTES, RawFile
from data_pipelines.samples import BadSample
from data_pipelines.sources import read_source
from dit.config.evaluation import ShapesClips, StoredClips

Split = Literal["train", "held_out", "all"]
log = logging.getLogger(__name__)
RULES = {
    "frames": "consecutive, the window drawn by the hash of seed and name",
    "resize": "antialiased bicubic until the size is covered, aspect kept, crop drawn by the hash of seed and name",
}
"""How stored clips are brought to a size (`data_pipelines.decode`); part of every protocol."""


@dataclass(frozen=True)
class Clip:
    """video (T, H, W, 3) uint8. label: class, where the source has classes."""

    video: Tensor
    caption: str
    label: int | None


def splits_of(config: ShapesClips | StoredClips) -> tuple[Split, ...]:
    """The kinds of captions that are measured apart."""
    return ("train", "held_out") if isinstance(config, ShapesClips) else ("all",)


def clips_of(config: ShapesClips | StoredClips, split: Split, captions: int, repeats: int, seed: int) -> Iterator[Clip]:
    """Clips of one split. Shapes come without end, for `captions` captions, each `repeats` times, and again with other starts.

    Raises UserError if the source cannot be read; samples that cannot be used are left out and counted in the log.
    """
    if isinstance(config, ShapesClips):
        assert split != "all"
        return _shapes(shape_captions(split, captions, seed), repeats, seed)
    return _usable(_from_shards(config, seed) if config.name == "shards" else _from_folder(config, seed), config.path)


def shape_captions(split: moving_shapes.Split, count: int, seed: int) -> list[str]:
    """`count` captions of a split, all of them as evenly as `count` allows, in an order that depends on the seed."""
    everything = sorted(moving_shapes.all_captions(split), key=lambda text: randomness.key("evaluation", seed, text))
    return [everything[index % len(everything)] for index in range(count)]


def _shapes(captions: list[str], repeats: int, seed: int) -> Iterator[Clip]:
    for again in itertools.count():
        for index, (caption, repeat) in enumerate(itertools.product(captions, range(repeats))):
            attributes = moving_shapes.parse(caption)
            low, high = moving_shapes.start_region(attributes)
            drawn = [randomness.uniform("start", seed, again, index, repeat, caption, axis) for axis in "xy"]
            x, y = (low + (high - low) * drawn).tolist()
            yield Clip(torch.from_numpy(moving_shapes.render(attributes, (x, y))), caption, None)


def _from_shards(config: StoredClips, seed: int) -> Iterator[RawSample]:
    source = read_source(config.path, config_key="clips.path")
    if all(facts.kind == "latents" for facts in source.facts):
        raise UserError(f"clips.path={config.path} holds cached latents: give the shards of pixels that they were made from")
    entries = [(shard, entry) for shard in source.shards for entry in source.index(shard).entries if entry.facts.kind != "latents"]
    entries.sort(key=lambda pair: randomness.key("evaluation", seed, pair[0].name, pair[1].key))
    for shard, entry in entries:
        name = f"{shard.name}/{entry.key}"
        yield read_sample(PlannedSample(name, shard.address, entry, config.size, (0, 0, 0), seed, 0, 0))


def _from_folder(config: StoredClips, seed: int) -> Iterator[RawSample]:
    if not Path(config.path).is_dir():
        raise UserError(f"clips.path={config.path}: no such folder; expected one with images or videos")
    with TemporaryDirectory() as spool:
        listing = list_source(config.path, Path(spool) / "archive.tar")
    for file in sorted(listing.files, key=lambda file: randomness.key("evaluation", seed, file.name)):
        key = randomness.key(seed, file.name)
        try:
            yield _of_file(file, config, key)
        except BadSample as error:
            yield RawSample(file.name, key, error=error.reason)


def _of_file(file: RawFile, config: StoredClips, key: int) -> RawSample:
    pixels = torch.from_numpy(decode(file.place.read(MAX_ARCHIVED_BYTES), file.extension, config.size, key).copy())
    return RawSample(file.name, key, file.own_caption() or file.class_name or "", file.label, pixels)


def _usable(samples: Iterator[RawSample], path: str) -> Iterator[Clip]:
    bad = 0
    for sample in samples:
        if sample.pixels is not None:
            yield Clip(sample.pixels, sample.caption, sample.label)
        else:
            bad += 1
            log.warning("%s: left out %s (%s), %d so far", path, sample.id, sample.error or "latents", bad)
