"""Ingest: images and videos as people keep them, made into indexed shards.

First every file is examined, which fixes the samples of every shard; then the shards are written, each whole or not at all.
So the result is the same however often the work was interrupted.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipelines import randomness
from data_pipelines.decode import decode_image, encode_png, fit, image_size, is_plain
from data_pipelines.errors import UserError
from data_pipelines.progress import Progress
from data_pipelines.raw_files import MAX_IMAGE_BYTES, Listing, RawFile, listed, sidecar
from data_pipelines.samples import BadSample, Facts
from data_pipelines.shard_set import claim, complete, write_json
from data_pipelines.shards import ShardWriter, shard_name
from data_pipelines.video import VideoFacts, encode_mp4, examine, frames_at

RECORD = "ingest.json"
CLASS_CAPTION = "a photo of a {class}"
SIDECAR, CLASS_NAME = "sidecar", "class-name"
_DEFAULT_FPS = 1.0  # of a video that states no rate: a frame is a second


@dataclass(frozen=True)
class IngestSettings:
    """captions: "sidecar", "class-name", or a text in which {class} is replaced; None: by class if there are classes.

    clip_frames: frames of a clip. fps: rate that videos are resampled to, None keeps theirs. size: (height, width) that
    pictures are scaled and cropped to, None keeps theirs.
    """

    captions: str | None
    shard_samples: int
    clip_frames: int
    fps: float | None
    size: tuple[int, int] | None


@dataclass(frozen=True)
class Piece:
    """One sample to be made: an image, or the frames `indices` of a video at `fps`."""

    key: str
    file: RawFile
    indices: tuple[int, ...] = ()
    fps: float | None = None


Skipped = tuple[str, str]


@dataclass(frozen=True)
class IngestReport:
    """What became of the files: samples written, (file, reason) of what was skipped, samples without a caption."""

    samples: int
    shards: int
    skipped: tuple[Skipped, ...]
    uncaptioned: int
    ignored: dict[str, int]
    classes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the reasons counted."""
        return {**asdict(self), "reasons": dict(Counter(reason for _, reason in self.skipped))}


def ingest(source: Path, out: Path, settings: IngestSettings) -> IngestReport:
    """Make shards of `source` in `out`, with a record in `ingest.json`. Raises UserError if nothing in it is usable."""
    _check(settings)
    if not source.exists():
        raise UserError(f"SRC = {str(source)!r}: no such file or folder; expected a folder of images or videos, or a .tar.gz of one")
    out.parent.mkdir(parents=True, exist_ok=True)
    with listed(source, out.parent) as listing:
        if not listing.files:
            raise UserError(f"SRC = {str(source)!r}: no image or video in it (files of other kinds: {listing.ignored or 'none'})")
        captions = settings.captions or (CLASS_NAME if listing.classes else SIDECAR)
        if captions != SIDECAR and "{class}" in _template(captions) and not listing.classes:
            raise UserError(f"--captions {captions}: the files lie in no class folders; use --captions sidecar or a text without {{class}}")
        pieces, skipped = _examine(listing, settings)
        if not pieces:
            reasons = Counter(reason for _, reason in skipped)
            raise UserError(f"SRC = {str(source)!r}: none of its {len(listing.files)} images and videos is usable: {dict(reasons)}")
        claim(out, {"made_by": "ingest", **asdict(settings), "captions": captions, "files": _fingerprint(listing)})
        maker = _Maker(listing, captions, settings)
        report = _write(out, pieces, [*listing.problems, *skipped], maker)
    write_json(out / RECORD, report.as_dict())
    if not report.samples:
        raise UserError(f"SRC = {str(source)!r}: no file of it gave a sample; the reasons are in {out / RECORD}")
    return report


def _check(settings: IngestSettings) -> None:
    low = [f"--{name.replace('_', '-')} {value}" for name in ("shard_samples", "clip_frames") if (value := getattr(settings, name)) < 1]
    if settings.fps is not None and not 0 < settings.fps <= 1000:
        low.append(f"--fps {settings.fps}")
    if settings.size is not None and not all(0 < side <= 16384 for side in settings.size):
        low.append(f"--height {settings.size[0]} --width {settings.size[1]}")
    if low:
        raise UserError(f"{', '.join(low)}: out of range; expected whole numbers from 1 (sides up to 16384), a rate up to 1000")


# --- examining --------------------------------------------------------------------------------------------------


def _examine(listing: Listing, settings: IngestSettings) -> tuple[list[Piece], list[Skipped]]:
    """Every sample to be made, in the order of the shards: shuffled by file, so that each shard is a mixture."""
    keys = listing.keys()
    pieces: list[Piece] = []
    skipped: list[Skipped] = []
    progress = Progress(len(listing.files), "examining", "files")
    for file in sorted(listing.files, key=lambda file: (randomness.key("ingest", file.name), file.name)):
        try:
            pieces += _pieces(file, keys[file.name], settings)
        except BadSample as error:
            skipped.append((file.name, error.reason))
        progress.advance()
    return pieces, skipped


def _pieces(file: RawFile, key: str, settings: IngestSettings) -> list[Piece]:
    if file.is_image:
        image_size(file.read(MAX_IMAGE_BYTES))
        return [Piece(key, file)]
    facts = examine(file.source(), file.extension)
    fps = settings.fps or facts.fps or _DEFAULT_FPS
    ticks = _ticks(facts, settings.fps)
    count = len(ticks) // settings.clip_frames
    if not count:
        raise BadSample(f"video of {len(ticks)} frames, {settings.clip_frames} make a clip")
    cuts = (ticks[number * settings.clip_frames : (number + 1) * settings.clip_frames] for number in range(count))
    return [Piece(f"{key}-{number:05d}", file, indices, fps) for number, indices in enumerate(cuts)]


def _ticks(facts: VideoFacts, fps: float | None) -> tuple[int, ...]:
    """Numbers of the frames that are shown at the times 0, 1/fps, 2/fps ...; all of them if fps is None."""
    if fps is None:
        return tuple(range(len(facts.times)))
    interval = 1.0 / (facts.fps or _DEFAULT_FPS)  # how long the last frame is shown
    ticks = np.arange(0.0, facts.times[-1] + interval - 1e-6, 1.0 / fps)
    return tuple((np.searchsorted(np.array(facts.times), ticks + 1e-6, side="right") - 1).tolist())


def _fingerprint(listing: Listing) -> str:
    """Names and lengths of all files: enough to notice that the source is another one."""
    names = "\n".join(f"{file.name}\x1f{file.size}" for file in (*listing.files, *listing.captions.values()))
    return xxhash.xxh3_128_hexdigest(names.encode("utf-8", "surrogateescape"))


# --- writing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Maker:
    """From a piece to the members, facts and metadata of a sample."""

    listing: Listing
    captions: str
    settings: IngestSettings

    def samples(self, file: RawFile, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, dict[str, bytes], Facts, dict[str, Any]]]:
        """Make the samples of one file, videos in a single pass. Raises BadSample at the first that cannot be made."""
        members: dict[str, bytes] = {}
        meta: dict[str, Any] = {"file": file.name}
        if (caption := self._caption(file)) is not None:
            members["txt"] = caption.encode()
        if (name := self.listing.class_of(file)) is not None:
            meta |= {"class": name, "label": self.listing.classes.index(name)}
            members["cls"] = str(meta["label"]).encode()
        content = self._image(file, pieces) if file.is_image else self._clips(file, pieces)
        for piece, extension, data, facts in content:
            yield piece, {**members, extension: data}, facts, meta

    def _caption(self, file: RawFile) -> str | None:
        if self.captions == SIDECAR:
            return sidecar(self.listing, file)
        return _template(self.captions).replace("{class}", (self.listing.class_of(file) or "").replace("_", " "))

    def _image(self, file: RawFile, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, str, bytes, Facts]]:
        data = file.read(MAX_IMAGE_BYTES)
        picture = decode_image(data)  # also where the bytes are kept: what cannot be decoded is found here, not in training
        extension = file.extension
        if self.settings.size is not None and picture.shape[:2] != self.settings.size:
            picture = fit(picture, *self.settings.size, key=None)
            data, extension = encode_png(picture), "png"
        elif not is_plain(data):
            data, extension = encode_png(picture), "png"
        yield pieces[0], extension, data, Facts("image", 1, picture.shape[0], picture.shape[1], None)

    def _clips(self, file: RawFile, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, str, bytes, Facts]]:
        frames = frames_at(file.source(), file.extension, [index for piece in pieces for index in piece.indices])
        for piece in pieces:
            pictures = [self._sized(next(frames)) for _ in piece.indices]
            clip = np.stack(pictures)  # T H W 3
            assert piece.fps is not None
            count, height, width, _ = clip.shape
            yield piece, "mp4", encode_mp4(clip, piece.fps, "archive"), Facts("video", count, height, width, piece.fps)

    def _sized(self, picture: np.ndarray) -> np.ndarray:
        return picture if self.settings.size is None else fit(picture, *self.settings.size, key=None)


def _template(captions: str) -> str:
    return CLASS_CAPTION if captions == CLASS_NAME else captions


def _write(out: Path, pieces: Sequence[Piece], skipped: Sequence[Skipped], maker: _Maker) -> IngestReport:
    each = maker.settings.shard_samples
    shards = -(-len(pieces) // each)
    progress = Progress(len(pieces), "writing", "samples")
    samples, uncaptioned, lost = 0, 0, list(skipped)
    for number in range(shards):
        part = pieces[number * each : (number + 1) * each]
        index = complete(out, number)
        if index is None:
            with ShardWriter(out / shard_name(number)) as shard:
                _fill(shard, part, maker, progress)
            index = shard.index
        else:
            progress.advance(len(part))
        samples += len(index.entries)
        uncaptioned += sum(entry.caption_length == 0 for entry in index.entries)
        lost += index.problems
    return IngestReport(samples, shards, tuple(lost), uncaptioned, maker.listing.ignored, maker.listing.classes)


def _fill(shard: ShardWriter, pieces: Sequence[Piece], maker: _Maker, progress: Progress) -> None:
    for file, group in itertools.groupby(pieces, key=lambda piece: piece.file):
        waiting = list(group)
        count = len(waiting)
        try:
            for piece, members, facts, meta in maker.samples(file, waiting.copy()):
                shard.add(piece.key, members, facts, meta)
                waiting.remove(piece)
        except BadSample as error:
            for piece in waiting:
                shard.leave_out(f"{file.name} ({piece.key})", error.reason)
        progress.advance(count)
