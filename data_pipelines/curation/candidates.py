"""Candidates: the clips and images that a file may give, with everything that was found out and decided about them.

Stages are generators of candidates over candidates. One that is dropped stays in the stream with its reason, so that nothing is
lost silently.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from typing import Any, Self

import numpy as np

from data_pipelines.curation.config import Bounds, IngestConfig
from data_pipelines.curation.scenes import find_scenes
from data_pipelines.decode import decode_image, fit, image_size
from data_pipelines.raw_files import MAX_IMAGE_BYTES, RawFile
from data_pipelines.samples import BadSample
from data_pipelines.video import MAX_FRAMES, Frames, VideoFacts, examine, frames_at

LOOK_SIDE = 384  # pixels, shorter side of the frames that stages see
LOOK_PAIRS = 8  # pairs of consecutive frames of a clip that stages see
_DEFAULT_FPS = 1.0  # of a video that states no rate: a frame is a second


@dataclass(frozen=True)
class Look:
    """What stages see of a candidate: frames (h, w, 3) at most LOOK_SIDE small, and their numbers in the clip."""

    frames: tuple[Frames, ...]
    numbers: tuple[int, ...]

    @property
    def middle(self) -> Frames:
        """The frame in the middle of the clip."""
        return self.frames[len(self.frames) // 2]

    @property
    def pairs(self) -> list[tuple[Frames, Frames]]:
        """The frames that follow each other without a gap; none of an image."""
        return [(self.frames[i], self.frames[i + 1]) for i, (a, b) in enumerate(pairwise(self.numbers)) if b == a + 1]


@dataclass(frozen=True)
class Candidate:
    """A sample that may be made: an image, or the frames `indices` of a video at `fps`, `span` seconds of it.

    signature: what duplicates are found by, hexadecimal. dropped: why it is not to be made. look: only while stages run.
    """

    key: str
    file: RawFile
    indices: tuple[int, ...] = ()
    fps: float | None = None
    span: tuple[float, float] | None = None
    scene: int | None = None
    caption: str | None = None
    caption_from: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    signature: str = ""
    dropped: str | None = None
    look: Look | None = field(default=None, repr=False, compare=False)

    @property
    def title(self) -> str:
        """The file, and the seconds of a clip."""
        return self.file.name if self.span is None else f"{self.file.name} {self.span[0]:.2f}-{self.span[1]:.2f} s"

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the look; `from_dict` reads it back."""
        return {**vars(self), "file": self.file.as_dict(), "look": None}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """The inverse of `as_dict`."""
        span = record["span"] and tuple(record["span"])
        return cls(**{**record, "file": RawFile.from_dict(record["file"]), "indices": tuple(record["indices"]), "span": span})


Stage = Callable[[Iterable[Candidate]], Iterator[Candidate]]
Score = Callable[[Candidate, Look], float | None]


def scored(candidates: Iterable[Candidate], name: str, bounds: Bounds, score: Score) -> Iterator[Candidate]:
    """Give every candidate the score `name`, and drop those outside the bounds; a score of None says nothing."""
    for candidate in candidates:
        if candidate.dropped is None and candidate.look is not None:
            try:
                value = score(candidate, candidate.look)
            except BadSample as error:
                value, candidate = None, replace(candidate, dropped=error.reason)
            if value is not None:
                scores = {**candidate.scores, name: float(f"{value:.5g}")}
                candidate = replace(candidate, scores=scores, dropped=bounds.verdict(name, scores[name]))
        yield candidate


# --- cutting ----------------------------------------------------------------------------------------------------


def cut(whole: Candidate, config: IngestConfig) -> Iterator[Candidate]:
    """The clips of a video, scene by scene, or the image itself. Raises BadSample if the file cannot be used at all."""
    file = whole.file
    if file.is_image:
        image_size(file.place.read(MAX_IMAGE_BYTES))
        yield whole
        return
    source = file.source()
    facts = examine(source, file.extension)
    fps = config.fps or facts.fps or _DEFAULT_FPS
    ticks = _ticks(facts, config.fps)
    times = np.array([*facts.times, facts.times[-1] + 1.0 / (facts.fps or _DEFAULT_FPS)])
    if file.span is not None:
        ticks = ticks[(times[ticks] >= file.span[0]) & (times[ticks] < file.span[1])]
    scenes, failure = [(0, len(facts.times))], None
    if config.scenes is not None:
        scenes, failure = find_scenes(source, file.extension, facts, config.scenes)
    made = 0
    for number, (start, stop) in enumerate(scenes):
        scene = replace(whole, scene=number if config.scenes else None)
        clips = _clips(ticks[(ticks >= start) & (ticks < stop)], config)
        if not clips:
            kind = "scene" if config.scenes else "video"
            span = (float(times[start]), float(times[stop])) if config.scenes else None
            yield replace(scene, span=span, dropped=f"{kind} shorter than the {min(config.clip_frames)} frames of a clip")
        for clip in clips:
            indices = tuple(clip.tolist())
            span = (round(float(times[indices[0]]), 4), round(float(times[indices[-1] + 1]), 4))
            yield replace(scene, key=f"{whole.key}@{made:05d}", indices=indices, fps=fps, span=span)
            made += 1  # no key of a file has an "@", so none is that of a clip
    if failure is not None:
        yield replace(whole, span=(float(times[scenes[-1][1] if scenes else 0]), float(times[-1])), dropped=failure)


def _ticks(facts: VideoFacts, fps: float | None) -> np.ndarray:
    """Numbers of the frames that are shown at the times 0, 1/fps, 2/fps ...; all of them if fps is None. Raises BadSample if too many."""
    if fps is None:
        return np.arange(len(facts.times))
    interval = 1.0 / (facts.fps or _DEFAULT_FPS)  # how long the last frame is shown
    end = facts.times[-1] + interval
    if end * fps > MAX_FRAMES:
        raise BadSample(f"video whose last frame ends at {end:.0f} s: more than {MAX_FRAMES} frames at fps {fps:g}")
    ticks = np.arange(0.0, end - 1e-6, 1.0 / fps)
    return np.searchsorted(np.array(facts.times), ticks + 1e-6, side="right") - 1


def _clips(ticks: np.ndarray, config: IngestConfig) -> list[np.ndarray]:
    clips, at = [], 0
    for length in sorted(config.clip_frames, reverse=True):
        while at + length <= len(ticks):
            clips.append(ticks[at : at + length])
            at += length
    if config.clips_per_scene is None or len(clips) <= config.clips_per_scene:
        return clips
    return [clips[number] for number in _spread(config.clips_per_scene, len(clips))]


def _spread(count: int, total: int) -> list[int]:
    """`count` different numbers below `total`, evenly spread and ascending: the middles of as many equal parts."""
    assert 0 < count <= total, (count, total)
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


# --- looking ----------------------------------------------------------------------------------------------------


def looked_at(candidates: Sequence[Candidate]) -> Iterator[Candidate]:
    """Give the candidates of one file their look, a video in a single pass; those that cannot be decoded are dropped."""
    waiting = [(candidate, _look_numbers(len(candidate.indices))) for candidate in candidates if candidate.dropped is None]
    frames = _looks(waiting[0][0].file, [c.indices[n] for c, numbers in waiting for n in numbers if c.indices]) if waiting else iter(())
    failure: str | None = None
    for candidate in candidates:
        if candidate.dropped is None and failure is None:
            numbers = _look_numbers(len(candidate.indices))
            try:
                candidate = replace(candidate, look=Look(tuple(islice(frames, len(numbers))), numbers))
            except BadSample as error:
                failure = error.reason
        yield candidate if failure is None or candidate.dropped else replace(candidate, dropped=failure)


def _look_numbers(length: int) -> tuple[int, ...]:
    """Numbers of the frames in a clip of `length` that are looked at: pairs, evenly spread."""
    firsts = {round(place) for place in np.linspace(0, max(length - 2, 0), min(LOOK_PAIRS, max(length - 1, 1)))}
    return tuple(sorted(firsts | {first + 1 for first in firsts if length > 1}))


def _looks(file: RawFile, indices: Sequence[int]) -> Iterator[Frames]:
    if not file.is_image:
        yield from frames_at(file.source(), file.extension, indices, LOOK_SIDE)
        return
    picture = decode_image(file.place.read(MAX_IMAGE_BYTES))
    scale = min(1.0, LOOK_SIDE / min(picture.shape[:2]))
    height, width = (max(1, round(side * scale)) for side in picture.shape[:2])
    yield fit(picture, height, width, key=None)
