"""The files that `ingest` takes in, as plain data (names and byte ranges), so that any process can read them.

Knows nothing of how they are found, nor of how shards are written.
"""

import os
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self

from data_pipelines.samples import IMAGE_EXTENSIONS, MAX_CAPTION_BYTES, VIDEO_EXTENSIONS, BadSample, read_caption
from data_pipelines.storage import Member, read_members, read_range

MAX_IMAGE_BYTES = 512 << 20
MAX_ARCHIVED_BYTES = 4 << 30  # of one file in an archive, which is read into memory
MEDIA_EXTENSIONS = (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS)


@dataclass(frozen=True)
class Place:
    """Where bytes are: a whole file if `length` is None, else a range of a file or object, with its checksum where an index has one."""

    address: str
    offset: int = 0
    length: int | None = None
    checksum: str | None = None

    def read(self, limit: int) -> bytes:
        """The bytes. Raises BadSample if they are more than `limit`, cannot be read or are not those of the checksum."""
        if self.length is not None:
            if self.length > limit:
                raise BadSample(f"file larger than {limit} bytes")
            if self.checksum is None:
                return read_range(self.address, self.offset, self.length)
            return read_members(self.address, {"": Member(self.offset, self.length, self.checksum)})[""]
        try:
            with open(self.address, "rb") as file:
                data = file.read(limit + 1) if os.fstat(file.fileno()).st_size <= limit else None
        except OSError as error:
            raise BadSample(f"file cannot be read ({error.strerror})") from error
        if data is None or len(data) > limit:
            raise BadSample(f"file larger than {limit} bytes")
        return data


@dataclass(frozen=True)
class RawFile:
    """One image or video. name: its path below the source. caption: its own, as text or where the text is.

    span: seconds of a video to take, None for all. extra: what else a manifest or WebDataset says of it.
    """

    name: str
    place: Place
    caption: str | Place | None = None
    class_name: str | None = None
    label: int | None = None
    span: tuple[float, float] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def extension(self) -> str:
        """Lower case, without the dot."""
        return self.name.rpartition(".")[2].lower()

    @property
    def is_image(self) -> bool:
        """Else it is a video."""
        return self.extension in IMAGE_EXTENSIONS

    def source(self) -> bytes | Path:
        """What a video reader opens: the path, or the bytes of an archived file."""
        return Path(self.place.address) if self.place.length is None else self.place.read(MAX_ARCHIVED_BYTES)

    def own_caption(self) -> str | None:
        """The caption that came with it, None if there is none. Raises BadSample."""
        if isinstance(self.caption, Place):
            return read_caption(self.caption.read(MAX_CAPTION_BYTES))
        return None if self.caption is None else read_caption(self.caption.encode("utf-8", "surrogatepass"))

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """The inverse of `as_dict`."""
        caption = record["caption"]
        caption = Place(**caption) if isinstance(caption, dict) else caption
        span = record["span"] and tuple(record["span"])
        return cls(**{**record, "place": Place(**record["place"]), "caption": caption, "span": span})


def named_class(value: Any) -> str | None:
    """The name of a class that a table or an index gives, also as a number; None if it gives none."""
    return None if value is None or value == "" else str(value)


@dataclass(frozen=True)
class Listing:
    """Everything found. classes: sorted, or empty. ignored: files of other kinds, by extension.

    problems: (name, reason) of what could not even be listed.
    """

    files: tuple[RawFile, ...]
    classes: tuple[str, ...]
    ignored: dict[str, int]
    problems: tuple[tuple[str, str], ...]

    def keys(self) -> dict[str, str]:
        """A sample key for every file: its path without extension, made safe, and unique without regard to case."""
        taken: set[str] = set()
        keys = {}
        for file in self.files:
            parts = [_safe(part) for part in (*PurePosixPath(file.name).parts[:-1], PurePosixPath(file.name).name.rpartition(".")[0])]
            base = "/".join(parts)[-160:].strip("/")
            key, number = base, 1
            while key.lower() in taken:
                number += 1
                key = f"{base}--{number}"
            taken.add(key.lower())
            keys[file.name] = key
        return keys


def _safe(part: str) -> str:
    """A path component of ASCII letters, digits, '_' and '-' only: dots end a key, and other characters trip some reader."""
    plain = unicodedata.normalize("NFKD", part).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_-]+", "_", plain) or "_"
