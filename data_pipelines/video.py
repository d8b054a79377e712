"""Video files: what they hold, their frames, and writing them. By PyAV, whose wheel brings its own FFmpeg.

Reading is bounded before anything is allocated, opens no further file and no network address, and uses one thread,
since loaders run many of these side by side. Knows nothing of samples' sizes or shards.

Letters: T frames, H rows, W columns.
"""

import io
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, Literal

import av
import numpy as np
from av.container import InputContainer
from numpy.typing import NDArray
from PIL import Image

from data_pipelines.samples import BadSample

MAX_PIXELS = 8192 * 8192  # of one frame or image
MAX_FRAMES = 2_000_000  # of one file
MAX_FPS = 1000.0

Frames = NDArray[np.uint8]
Quality = Literal["lossless", "archive", "view"]

# Naming the demuxer keeps playlists and other formats that refer to further files from being recognised at all.
_DEMUXERS = {"mp4": "mov", "mov": "mov", "webm": "matroska", "mkv": "matroska", "avi": "avi", "gif": "gif"}
_ENCODERS: dict[str, tuple[str, str, dict[str, str]]] = {
    "lossless": ("libx264rgb", "rgb24", {"crf": "0"}),
    "archive": ("libx264", "yuv444p", {"crf": "10"}),
    "view": ("libx264", "yuv420p", {"crf": "18"}),
}


@dataclass(frozen=True)
class VideoFacts:
    """Upright height and width in pixels, and the time of every frame in seconds from the first."""

    height: int
    width: int
    fps: float | None
    times: tuple[float, ...]


def examine(source: bytes | Path, extension: str) -> VideoFacts:
    """Count and time the frames of a video; of its pictures only the first is decoded. Raises BadSample."""
    turns: int | None = None
    times: list[float | None] = []
    with _opened(source, extension) as container:
        stream = container.streams.video[0]
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                times.append(float(packet.pts * packet.time_base) if packet.pts is not None and packet.time_base else None)
            if len(times) > MAX_FRAMES:
                raise BadSample(f"video of more than {MAX_FRAMES} frames")
            if turns is None:
                turns = next((_quarter_turns(frame) for frame in stream.decode(packet)), None)
        height, width = stream.codec_context.height, stream.codec_context.width
        fps = _frame_rate(stream.average_rate)
    if turns is None or not times:
        raise BadSample("video without frames")
    return VideoFacts(*((width, height) if turns % 2 else (height, width)), fps, _from_zero(times, fps))


def frames_at(source: bytes | Path, extension: str, indices: Iterable[int], short_side: int | None = None) -> Iterator[Frames]:
    """Decode the frames with these numbers (ascending, repeats allowed), upright: yields (H, W, 3). Raises BadSample.

    Pictures whose shorter side is more than `short_side` are scaled down to it, for a look at them.
    """
    wanted = iter(indices)
    following = next(wanted, None)
    with _opened(source, extension) as container:
        for number, frame in enumerate(container.decode(container.streams.video[0])):
            if following is None:
                return
            if number == following:
                if frame.width * frame.height > MAX_PIXELS:
                    raise BadSample(f"frame of {frame.width} x {frame.height} pixels, more than {MAX_PIXELS}")
                scale = 1.0 if short_side is None else min(1.0, short_side / min(frame.width, frame.height))
                width, height = (max(1, round(side * scale)) for side in (frame.width, frame.height))
                stored = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="AREA" if scale < 1 else None)
                pixels: Frames = np.rot90(stored, _quarter_turns(frame)).astype(np.uint8, copy=False)  # H W 3
                while number == following:
                    yield pixels
                    following = next(wanted, None)
                    assert following is None or following >= number, "indices must ascend"
    if following is not None:
        raise BadSample("video ends before the frame that was asked for")


@contextmanager
def _opened(source: bytes | Path, extension: str) -> Iterator[InputContainer]:
    """Open a video with its first picture stream checked against the bounds; every error of FFmpeg becomes a BadSample."""
    target: Any = io.BytesIO(source) if isinstance(source, bytes) else str(source.resolve())
    options = {"protocol_whitelist": "file,pipe"}
    try:
        with av.open(target, format=_DEMUXERS[extension], options=options, metadata_errors="replace") as container:
            if not container.streams.video:
                raise BadSample("no video stream")
            stream = container.streams.video[0]
            context = stream.codec_context
            if context is None or not context.width or not context.height:
                raise BadSample("video without a picture size")
            if context.width * context.height > MAX_PIXELS:
                raise BadSample(f"video of {context.width} x {context.height} pixels, more than {MAX_PIXELS}")
            context.options = {"max_pixels": str(MAX_PIXELS)}  # the size may change in mid-stream
            context.thread_count = 1
            yield container
    except av.error.FFmpegError as error:
        early = isinstance(error, av.error.EOFError)
        raise BadSample("video ends too early" if early else f"video cannot be decoded ({type(error).__name__})") from error


def _frame_rate(rate: Fraction | None) -> float | None:
    value = float(rate) if rate else math.nan
    return value if math.isfinite(value) and 0 < value <= MAX_FPS else None


def _from_zero(times: list[float | None], fps: float | None) -> tuple[float, ...]:
    """Times in order of display, the first at zero; equally spaced where a frame has no time stamp."""
    known = sorted(time for time in times if time is not None)
    if len(known) < len(times):
        return tuple(number / (fps or 1.0) for number in range(len(times)))
    return tuple(time - known[0] for time in known)


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Counter-clockwise quarter turns that bring a frame upright (phones store the turn beside the pixels)."""
    return round(int(frame.rotation) / 90) % 4


def encode_mp4(frames: Frames, fps: float, quality: Quality) -> bytes:
    """Encode (T, H, W, 3) uint8 as H.264 in MP4: every bit, nearly every bit, or small and playable anywhere."""
    assert frames.dtype == np.uint8, frames.dtype
    assert frames.ndim == 4 and frames.shape[3] == 3 and frames.size, frames.shape  # noqa: PT018
    codec, pixels, options = _ENCODERS[quality]
    if pixels == "yuv420p":  # chroma is stored at half the size, so sides must be even
        frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixels
        stream.codec_context.thread_count = 1  # several encoders side by side; and the bytes do not depend on the machine
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def write_mp4(target: str | Path | IO[bytes], frames: Frames, fps: float, lossless: bool) -> None:
    """Write (T, H, W, 3) uint8 as MP4: lossless RGB, or playable anywhere (odd sides gain an edge pixel)."""
    _put(target, encode_mp4(frames, fps, "lossless" if lossless else "view"))


def write_gif(target: str | Path | IO[bytes], frames: Frames, fps: float, scale: int = 1) -> None:
    """Write (T, H, W, 3) uint8 as a looping GIF, each pixel repeated `scale` times along both sides."""
    assert scale >= 1, scale
    large = frames.repeat(scale, axis=1).repeat(scale, axis=2)  # T H*scale W*scale 3
    first, *others = [Image.fromarray(frame) for frame in large]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
    _put(target, buffer.getvalue())


def _put(target: str | Path | IO[bytes], data: bytes) -> None:
    if isinstance(target, (str, Path)):
        Path(target).write_bytes(data)
    else:
        target.write(data)
