"""Bytes to arrays: a pure function of (bytes, size, key), with every bound checked before memory is taken.

Knows nothing of shards or plans. Letters: T frames, H rows, W columns, C latent channels.
"""

import ast
import io
import math
import struct
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipelines import randomness
from data_pipelines.config import Size
from data_pipelines.samples import IMAGE_EXTENSIONS, BadSample
from data_pipelines.video import MAX_PIXELS, Frames, examine, frames_at

VERSION = 1
"""Part of every latent cache. Raise it when the same bytes, size and key give other pixels."""

_MAX_CROPPED = 4  # of an enlarged picture's area to what is left of it, where that alone is more than MAX_PIXELS
_FORMATS = ("JPEG", "PNG", "WEBP")
_IMAGE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
_BITS = {"<f2": ("<i2", "<u2", 0x7C00, 0xFC00), "<f4": ("<i4", "<u4", 0x7F800000, 0xFF800000)}
"""Of each element type that is read: integers of as many bits, and both infinities; NaNs are above."""


def decode(data: bytes, extension: str, size: Size, key: int, out: Frames | None = None) -> Frames:
    """Decode an image or video to exactly `size`: (T, H, W, 3) uint8, into `out` if it is given. Raises BadSample.

    The window of frames and the crop are drawn from `key`; the picture is scaled, aspect kept, until it just covers
    the size (antialiased bicubic), and not at all where it already has that size.
    """
    frames, height, width = size
    if extension in IMAGE_EXTENSIONS:
        if frames != 1:
            raise BadSample(f"an image for {frames} frames")
        pictures = [decode_image(data)]
    else:
        have = len(examine(data, extension).times)
        if have < frames:
            raise BadSample(f"video of {have} frames, {frames} needed")
        first = _draw(key, "window", have - frames + 1)
        pictures = list(frames_at(data, extension, range(first, first + frames)))
    return np.stack([fit(picture, height, width, key) for picture in pictures], out=out)  # T H W 3


def fit(picture: Frames, height: int, width: int, key: int | None) -> Frames:
    """Scale (h, w, 3) to cover (height, width) and crop: at a place drawn from `key`, or in the middle if None.

    Raises BadSample for a picture so narrow that it had to be enlarged to more than MAX_PIXELS, nearly all of which are cropped.
    """
    scale = max(height / picture.shape[0], width / picture.shape[1])
    scaled = (max(height, round(picture.shape[0] * scale)), max(width, round(picture.shape[1] * scale)))
    if scaled != picture.shape[:2]:
        if scaled[0] * scaled[1] > max(MAX_PIXELS, _MAX_CROPPED * height * width):
            raise BadSample(f"picture of {picture.shape[1]} x {picture.shape[0]} pixels, too narrow to fill {width} x {height}")
        picture = np.asarray(Image.fromarray(picture).resize(scaled[::-1], Image.Resampling.BICUBIC))  # scaled 3
    spare_y, spare_x = scaled[0] - height, scaled[1] - width
    top = spare_y // 2 if key is None else _draw(key, "top", spare_y + 1)
    left = spare_x // 2 if key is None else _draw(key, "left", spare_x + 1)
    return picture[top : top + height, left : left + width]  # height width 3


def _draw(key: int, purpose: str, count: int) -> int:
    """One of 0 .. count - 1, uniformly."""
    return randomness.key(key, purpose) % count


# --- images -----------------------------------------------------------------------------------------------------


def image_size(data: bytes) -> tuple[int, int]:
    """Upright height and width of an encoded image, from its header. Raises BadSample."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check(image)
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
    except _IMAGE_ERRORS as error:
        raise BadSample(_image_reason(error)) from error


def is_plain(data: bytes) -> bool:
    """Whether an image is an upright 8-bit RGB or grey JPEG or PNG, which every reader shows alike."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            return image.mode in ("RGB", "L") and image.getexif().get(0x0112, 1) == 1
    except _IMAGE_ERRORS:
        return False


def decode_image(data: bytes) -> Frames:
    """Decode a JPEG, PNG or WebP to upright RGB: (h, w, 3) uint8. Raises BadSample."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check(image)
            return np.array(_rgb(ImageOps.exif_transpose(image)))  # h w 3
    except _IMAGE_ERRORS as error:
        raise BadSample(_image_reason(error)) from error


def encode_png(picture: Frames) -> bytes:
    """Encode (h, w, 3) uint8 as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def _check(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise BadSample(f"image of {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
    if image.format in ("WEBP", "PNG") and getattr(image, "n_frames", 1) > 1:
        raise BadSample("animated image: all but its first frame would be lost; make it a GIF or video")


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: 16-bit greys are scaled, transparency lies on white."""
    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
        image = Image.fromarray((grey / 257 + 0.5).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _image_reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not a {', '.join(_FORMATS)} image"
    if isinstance(error, Image.DecompressionBombError):
        return "image with too many pixels"
    return f"image cannot be decoded ({type(error).__name__})"


# --- arrays -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NpyHeader:
    """Element type (little-endian code), shape, and where the elements begin."""

    dtype: str
    shape: tuple[int, ...]
    start: int


def npy_header(data: bytes | memoryview) -> NpyHeader:
    """Parse the header of a .npy file of floats in C order. Raises BadSample for anything else, Python objects included."""
    if data[:6] != b"\x93NUMPY" or len(data) < 12 or data[6] not in (1, 2, 3):
        raise BadSample("not a .npy array")
    width = 2 if data[6] == 1 else 4
    start = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    if start > min(len(data), 4096):
        raise BadSample("not a .npy array")
    dtype, shape = _npy_fields(bytes(data[8 + width : start]))
    if len(data) - start != math.prod(shape) * int(dtype[2]):
        raise BadSample(".npy whose length does not match its shape")
    return NpyHeader(dtype, shape, start)


@lru_cache(maxsize=1024)  # the samples of a cache have few sizes
def _npy_fields(header: bytes) -> tuple[str, tuple[int, ...]]:
    try:
        fields = ast.literal_eval(header.decode("latin-1").strip())
        dtype, shape = fields["descr"], tuple(int(side) for side in fields["shape"])
        fortran = fields["fortran_order"]
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError) as error:
        raise BadSample("not a .npy array") from error
    if dtype not in _BITS or fortran or any(side < 0 for side in shape):
        raise BadSample(f".npy of {dtype!r}, expected float16 or float32 in C order")
    return dtype, shape


def decode_npy(data: bytes | memoryview) -> NDArray[np.floating]:
    """Decode a .npy file of float16 or float32, C order, to a view of it. Raises BadSample, also for NaN and infinity."""
    header = npy_header(data)
    values = np.frombuffer(data, header.dtype, offset=header.start).reshape(header.shape)
    signed, unsigned, infinity, negative = _BITS[header.dtype]
    # np.isfinite of halves is thirty times slower
    if values.size and (values.view(signed).max() >= infinity or values.view(unsigned).max() >= negative):
        raise BadSample("array with NaN or infinite values")
    return values
