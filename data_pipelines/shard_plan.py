"""The plan of a set of shards, on disk: which samples make which shard; and writing one shard of it by its number."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.curation.candidates import Candidate
from data_pipelines.decode import decode_image, encode_png, fit, is_plain
from data_pipelines.errors import UserError
from data_pipelines.index import ShardIndex
from data_pipelines.raw_files import MAX_IMAGE_BYTES, Place, RawFile
from data_pipelines.samples import MAX_CAPTION_BYTES, BadSample, Facts
from data_pipelines.shards import ShardWriter, shard_name
from data_pipelines.video import encode_mp4, frames_at

PLAN = "plan"
"""Folder beside the shards."""
SAMPLES, SHARDS = "samples.jsonl", "shards.json"

Skipped = tuple[str, str]


@dataclass(frozen=True)
class ShardPlan:
    """Which samples make which shard: where the lines of each shard begin in `plan/samples.jsonl`, and how many there are."""

    starts: tuple[int, ...]
    shard_samples: int
    samples: int
    size: tuple[int, int] | None
    skipped: tuple[Skipped, ...]
    ignored: dict[str, int]
    classes: tuple[str, ...]

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return len(self.starts)

    def count(self, shard: int) -> int:
        """Samples of one shard."""
        return min(self.shard_samples, self.samples - shard * self.shard_samples)

    @classmethod
    def read(cls, out: Path) -> "ShardPlan":
        """The plan of the folder `out`."""
        record = json.loads((out / PLAN / SHARDS).read_text())
        skipped = tuple((what, reason) for what, reason in record["skipped"])
        size = record["size"] and tuple(record["size"])
        return cls(**{**record, "starts": tuple(record["starts"]), "size": size, "skipped": skipped, "classes": tuple(record["classes"])})


def write_shard(out: Path, number: int) -> ShardIndex:
    """Write shard `number` of the plan in `out`, whole or not at all; a pure function of the plan and the files it names."""
    plan = ShardPlan.read(out)
    with (out / PLAN / SAMPLES).open("rb") as lines:
        lines.seek(plan.starts[number])
        samples = [Candidate.from_dict(json.loads(line)) for line in itertools.islice(lines, plan.count(number))]
    with ShardWriter(out / shard_name(number)) as shard:
        for _, group in itertools.groupby(samples, key=lambda sample: sample.file.name):
            _write_file(shard, list(group), plan.size)
    return shard.index


def _write_file(shard: ShardWriter, samples: Sequence[Candidate], size: tuple[int, int] | None) -> None:
    """Write the samples of one file, a video in a single pass; those from the first that cannot be read on are left out.

    A file that has gone since it was examined is no bad sample: a disk that is not mounted must not make an empty shard.
    """
    place = samples[0].file.place.address
    if "://" not in place and not Path(place).is_file():
        raise UserError(f"{place} was there when the source was examined and is missing now; bring it back and start the command again")
    done = 0
    try:
        for sample, (extension, data, facts) in zip(samples, _contents(samples, size), strict=True):
            shard.add(sample.key, {extension: data, **_members(sample)}, facts, _meta(sample))
            done += 1
    except BadSample as error:
        for sample in samples[done:]:
            shard.leave_out(sample.title, error.reason)


def _contents(samples: Sequence[Candidate], size: tuple[int, int] | None) -> Iterator[tuple[str, bytes, Facts]]:
    file = samples[0].file
    if file.is_image:
        yield _image(file, size)
        return
    frames = frames_at(file.source(), file.extension, [index for sample in samples for index in sample.indices])
    for sample in samples:
        assert sample.fps is not None
        clip = np.stack([_sized(next(frames), size) for _ in sample.indices])  # T H W 3
        count, height, width, _ = clip.shape
        yield "mp4", encode_mp4(clip, sample.fps, "archive"), Facts("video", count, height, width, sample.fps)


def _image(file: RawFile, size: tuple[int, int] | None) -> tuple[str, bytes, Facts]:
    data = file.place.read(MAX_IMAGE_BYTES)
    picture = decode_image(data)  # also where the bytes are kept: what cannot be decoded is found here, not in training
    extension = file.extension
    if (size is not None and picture.shape[:2] != size) or not is_plain(data):
        picture = _sized(picture, size)
        data, extension = encode_png(picture), "png"
    return extension, data, Facts("image", 1, picture.shape[0], picture.shape[1], None)


def _sized(picture: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    return picture if size is None or picture.shape[:2] == size else fit(picture, *size, key=None)


def _members(sample: Candidate) -> dict[str, bytes]:
    """Caption, label, and the lineage where there is more to say than the name of the file."""
    file = sample.file
    members = {} if sample.caption is None else {"txt": sample.caption.encode()}
    if file.label is not None:
        members["cls"] = str(file.label).encode()
    extra = dict(file.extra)
    if "json" in extra:
        extra = _original(Place(**extra["json"]))
    if sample.span or sample.scores or extra:
        lineage = {**_meta(sample), "frames": sample.indices, "scores": sample.scores, "caption_from": sample.caption_from, "source": extra}
        members["json"] = json.dumps(lineage, sort_keys=True).encode()
    return members


def _original(place: Place) -> dict[str, Any]:
    """What another tool wrote about a sample; nothing if it is no JSON object of at most 1 MiB. Raises BadSample if it is damaged."""
    if place.length is not None and place.length > MAX_CAPTION_BYTES:
        return {}
    data = place.read(MAX_CAPTION_BYTES)
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):  # also what is not UTF-8, and an integer of 5000 digits
        return {}
    return record if isinstance(record, dict) else {}


def _meta(sample: Candidate) -> dict[str, Any]:
    """What the index says of a sample: fields that a run may filter by."""
    span = sample.span or (None, None)
    meta: dict[str, Any] = {"file": sample.file.name, "class": sample.file.class_name, "label": sample.file.label, "scene": sample.scene}
    meta |= {"start": span[0], "end": span[1], **sample.scores}
    return {name: value for name, value in meta.items() if value is not None}
