"""What a sample is: the members it may have, how they are named, and the facts a planner needs of it.

Knows nothing of tars, folders, decoding or plans.
"""

import codecs
import re
from dataclasses import dataclass
from typing import Literal

VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "mov", "avi", "gif")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
LATENTS_EXTENSION = "latents.npy"
TEXT_EXTENSION = "text.npy"
CAPTION_EXTENSION = "txt"
LABEL_EXTENSION = "cls"

MAX_CAPTION_BYTES = 1 << 20
_MAX_KEY_BYTES = 200
_NAME = re.compile(r"((?:.*/|)[^./]+)[.]([^/]+)")  # the WebDataset rule: the key ends at the first dot of the basename
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\\]")

Kind = Literal["image", "video", "latents"]


class BadSample(Exception):
    """A sample that cannot be used. It costs its own place, never the run; `reason` is counted and reported."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Facts:
    """What the bytes of a sample hold: pixels, or for kind "latents" the latents' own frames, height and width."""

    kind: Kind
    frames: int
    height: int
    width: int
    fps: float | None


def check_key(key: str) -> None:
    """Raise ValueError unless `key` is safe as a member name and survives the WebDataset naming rule."""
    parts = key.split("/")
    if not key or _FORBIDDEN.search(key) or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"key {key!r}: expected a relative name without empty, '.' or '..' parts and control characters")
    if "." in parts[-1]:
        raise ValueError(f"key {key!r}: a dot ends the key of a WebDataset sample; replace it")
    if len(key.encode()) > _MAX_KEY_BYTES:
        raise ValueError(f"key {key[:40]!r}...: {len(key.encode())} bytes, expected at most {_MAX_KEY_BYTES}")


def split_name(name: str) -> tuple[str, str]:
    """Split a member name into (key, lower-case extension). Raises BadSample for names that are unsafe or hold no key."""
    match = _NAME.fullmatch(name.removeprefix("./"))
    if match is None:
        raise BadSample("member name without key or extension")
    key, extension = match.group(1), match.group(2).lower()
    try:
        check_key(key)
    except ValueError as error:
        raise BadSample("unsafe member name") from error
    return key, extension


def media_extension(extensions: set[str]) -> str:
    """The member that holds a sample's content: latents before video before image. Raises BadSample if there is none."""
    for extension in (LATENTS_EXTENSION, *VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS):
        if extension in extensions:
            return extension
    raise BadSample("no image, video or latents member")


def read_caption(data: bytes) -> str:
    """Decode a caption member. Raises BadSample for what is not UTF-8 text of at most 1 MiB."""
    if len(data) > MAX_CAPTION_BYTES:
        raise BadSample("caption larger than 1 MiB")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode().strip()
    except UnicodeDecodeError as error:
        raise BadSample("caption is not UTF-8") from error
