"""Scene cuts, by the detectors of PySceneDetect on frames that our own bounded reader decodes."""

from itertools import pairwise
from pathlib import Path

import numpy as np

from data_pipelines.curation.config import Scenes
from data_pipelines.extras import optional
from data_pipelines.samples import BadSample
from data_pipelines.video import VideoFacts, frames_at

_SIDE = 128  # pixels, shorter side: cuts are seen as well, eight times as fast as at 1080


def find_scenes(source: bytes | Path, extension: str, facts: VideoFacts, config: Scenes) -> tuple[list[tuple[int, int]], str | None]:
    """First frame and frame after the last of every scene; and why the video could not be read to its end, if so."""
    detectors = optional("scenedetect.detectors", "finding scenes (scenes:)")
    timecode = optional("scenedetect", "finding scenes (scenes:)").FrameTimecode
    fps = facts.fps or 1.0
    shortest = max(1, round(config.min_seconds * fps))
    match config.detector:
        case "content":
            detector = detectors.ContentDetector(threshold=config.jump, min_scene_len=shortest)
        case "adaptive":
            detector = detectors.AdaptiveDetector(adaptive_threshold=config.jump, min_scene_len=shortest)
    cuts, read, failure = [], 0, None
    try:
        for picture in frames_at(source, extension, range(len(facts.times)), _SIDE):
            cuts += detector.process_frame(timecode(read, fps), np.ascontiguousarray(picture[..., ::-1]))
            read += 1
    except BadSample as error:
        failure = error.reason
    if read:
        cuts += detector.post_process(timecode(read - 1, fps))
    edges = [0, *sorted({cut.frame_num for cut in cuts}), read]
    return [_without_margins(start, stop, read, config.margin_frames) for start, stop in pairwise(edges) if stop > start], failure


def _without_margins(start: int, stop: int, end: int, margin: int) -> tuple[int, int]:
    first = min(start + margin, stop) if start > 0 else 0
    return first, max(first, stop - margin if stop < end else end)
