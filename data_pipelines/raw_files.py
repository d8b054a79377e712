"""The files that `ingest` takes in: found in a folder or a tar archive, with their classes and captions.

Nothing is ever extracted to a name that an archive chose. Knows nothing of shards.
"""

import gzip
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import IO

from data_pipelines.errors import UserError
from data_pipelines.foreign import Problems, scan_tar
from data_pipelines.samples import CAPTION_EXTENSION, IMAGE_EXTENSIONS, MAX_CAPTION_BYTES, VIDEO_EXTENSIONS, BadSample

MAX_IMAGE_BYTES = 512 << 20
MAX_ARCHIVED_BYTES = 4 << 30  # of one file in an archive, which is read into memory
_MAX_RATIO = 100  # of an archive's unpacked to its packed size: real images and videos do not shrink
_MAX_RATIO_FREE = 256 << 20  # bytes unpacked before the ratio counts
_CHUNK = 1 << 20


@dataclass(frozen=True)
class RawFile:
    """One image or video: its path below the source, and where its bytes are (a path, or a range of an open archive)."""

    name: str
    place: Path | tuple[IO[bytes], int, int]

    @property
    def extension(self) -> str:
        """Lower case, without the dot."""
        return self.name.rpartition(".")[2].lower()

    @property
    def is_image(self) -> bool:
        """Else it is a video."""
        return self.extension in IMAGE_EXTENSIONS

    @property
    def size(self) -> int:
        """Bytes."""
        return self.place.stat().st_size if isinstance(self.place, Path) else self.place[2]

    def source(self) -> bytes | Path:
        """What a video reader opens: the path, or the bytes of an archived file."""
        return self.place if isinstance(self.place, Path) else self.read(MAX_ARCHIVED_BYTES)

    def read(self, limit: int) -> bytes:
        """The bytes. Raises BadSample if they are more than `limit` or cannot be read."""
        try:
            if self.size > limit:
                raise BadSample(f"file larger than {limit} bytes")
            if isinstance(self.place, Path):
                return self.place.read_bytes()
        except OSError as error:
            raise BadSample(f"file cannot be read ({error.strerror})") from error
        archive, offset, length = self.place
        archive.seek(offset)
        return archive.read(length)


@dataclass(frozen=True)
class Listing:
    """Everything found. files: by name. captions: sidecar texts by name without extension. classes: sorted, or empty.

    ignored: files of other kinds, by extension. problems: (name, reason) of what could not even be listed.
    """

    files: tuple[RawFile, ...]
    captions: dict[str, RawFile]
    classes: tuple[str, ...]
    ignored: dict[str, int]
    problems: tuple[tuple[str, str], ...]

    def class_of(self, file: RawFile) -> str | None:
        """The class folder that a file is in."""
        return PurePosixPath(file.name).parts[0] if self.classes else None

    def keys(self) -> dict[str, str]:
        """A sample key for every file: its path without extension, made safe, and unique without regard to case."""
        taken: Counter[str] = Counter()
        keys = {}
        for file in self.files:
            parts = [_safe(part) for part in (*PurePosixPath(file.name).parts[:-1], PurePosixPath(file.name).name.rpartition(".")[0])]
            base = "/".join(parts)[-160:].strip("/")
            taken[base.lower()] += 1
            number = taken[base.lower()]
            keys[file.name] = base if number == 1 else f"{base}--{number}"
        return keys


def _safe(part: str) -> str:
    """A path component of ASCII letters, digits, '_' and '-' only: dots end a key, and other characters trip some reader."""
    plain = unicodedata.normalize("NFKD", part).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_-]+", "_", plain) or "_"


@contextmanager
def listed(source: Path, scratch: Path) -> Iterator[Listing]:
    """List a folder or a .tar, .tar.gz or .tgz archive. `scratch`: folder for the unpacked archive, gone afterwards."""
    if source.is_dir():
        found = {path.relative_to(source).as_posix(): path for path in sorted(source.rglob("*")) if path.is_file()}
        yield _listing([RawFile(name, path) for name, path in found.items()], [])
    elif not source.exists():
        raise UserError(f"SRC = {str(source)!r}: no such file or folder; expected a folder of images or videos, or a .tar.gz of one")
    elif not source.name.lower().endswith((".tar", ".tar.gz", ".tgz")):
        raise UserError(f"SRC = {str(source)!r}: expected a folder, or an archive named .tar, .tar.gz or .tgz")
    else:
        problems: Problems = []
        with TemporaryFile(dir=scratch) as archive:
            _unpack(source, archive)
            files = dict(_archived(archive, problems))
            top = {PurePosixPath(name).parts[0] for name in files}
            shared = len(top) == 1 and all("/" in name for name in files)  # archives often hold one folder that holds all
            named = {name.partition("/")[2] if shared else name: place for name, place in files.items()}
            yield _listing([RawFile(name, (archive, *place)) for name, place in sorted(named.items())], problems)


def _archived(archive: IO[bytes], problems: Problems) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name, offset and length of the whole files of a tar. Names are labels here, never paths; odd ones are refused all the same."""
    for place in scan_tar(archive, problems):
        if place is None:
            continue
        name, offset, length = place
        parts = PurePosixPath(name).parts
        if length < 0:
            problems.append((name, "truncated"))
        elif name.startswith("/") or ".." in parts:
            problems.append((name, "unsafe name"))
        else:
            yield "/".join(parts), (offset, length)


def _unpack(source: Path, archive: IO[bytes]) -> None:
    limit = max(_MAX_RATIO_FREE, _MAX_RATIO * source.stat().st_size)
    packed = source.name.lower().endswith("gz")
    try:
        with gzip.open(source, "rb") if packed else source.open("rb") as file:
            while chunk := file.read(_CHUNK):
                archive.write(chunk)
                if archive.tell() > limit:
                    raise UserError(f"SRC = {str(source)!r}: unpacks to more than {_MAX_RATIO} times its size, as no images or videos do")
    except EOFError as error:
        raise UserError(f"SRC = {str(source)!r}: the archive is truncated; fetch it again") from error
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"SRC = {str(source)!r}: cannot be read ({error})") from error


def _listing(found: list[RawFile], problems: Problems) -> Listing:
    files, captions, ignored = [], {}, Counter[str]()
    for file in found:
        if PurePosixPath(file.name).name.startswith("."):
            ignored["hidden"] += 1
        elif file.extension in (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS):
            files.append(file)
        elif file.extension == CAPTION_EXTENSION:
            captions[file.name.rpartition(".")[0]] = file
        else:
            ignored[PurePosixPath(file.name).suffix or "no extension"] += 1
    folders = {PurePosixPath(file.name).parts[0] for file in files if "/" in file.name}
    everywhere = bool(files) and all("/" in file.name for file in files)
    return Listing(tuple(files), captions, tuple(sorted(folders)) if everywhere else (), dict(ignored), tuple(problems))


def sidecar(listing: Listing, file: RawFile) -> str | None:
    """The caption in the text file of the same name, None if there is none. Raises BadSample."""
    text = listing.captions.get(file.name.rpartition(".")[0])
    if text is None:
        return None
    try:
        return text.read(MAX_CAPTION_BYTES).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample("caption is not UTF-8") from error
