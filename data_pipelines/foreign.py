"""Shards of others: find the samples of any WebDataset tar, whole ones only, and index it once.

Tar readers end silently at a damaged header and see nothing amiss in a file cut between two members; here both are
found. They also end at a block of zeros, which may be a page that was lost: what lies behind it is not read, but reported. A sample
next to damage may lack members without any sign of it, so it is left out and reported.
"""

import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import IO, Any

import xxhash

from data_pipelines.errors import AccessDenied
from data_pipelines.executors import LOCAL, Executor
from data_pipelines.index import Entry, ShardIndex, index_path, spare_index_path, write_index
from data_pipelines.probe import probe
from data_pipelines.progress import Progress
from data_pipelines.samples import CAPTION_EXTENSION, BadSample, media_extension, read_caption, split_name
from data_pipelines.storage import Member, checksum, local_path, pieces

MAX_MEMBERS = 5_000_000
MAX_MEMBER_BYTES = 4 << 30
_PARALLEL_BYTES = 512 << 20  # below it starting processes takes longer than it saves
_BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(_BLOCK)
_PIECE = 1 << 20
_DAMAGE = None  # stands between the members that a damaged place separates

_CUT = -1  # the length of a member whose content is not all there; damage follows it, so its sample is left out

Place = tuple[str, int, int]  # member name, offset, length
Problems = list[tuple[str, str]]


def scan_tar(file: IO[bytes], problems: Problems) -> Iterator[Place | None]:
    """Yield the regular members of an uncompressed tar in order, and None at every damaged place, up to the last block.

    What is left out is appended to `problems` as (name, reason).
    """
    end = file.seek(0, os.SEEK_END)
    offset, seen = 0, 0
    while True:
        file.seek(offset)
        tar = _open_at(file)
        for info in tar or ():
            seen += 1
            if seen > MAX_MEMBERS:
                problems.append((info.name, f"more than {MAX_MEMBERS} members"))
                yield _DAMAGE
                return
            if (place := _place(info, end, problems)) is not None:
                yield place
        stopped = offset if tar is None else int(tar.offset)
        if stopped + _BLOCK <= end and _read_block(file, stopped) == _ZEROS:
            if (behind := _behind_zeros(file, stopped, end)) < end:
                problems.append((f"byte {behind}", f"{end - behind} bytes behind the end mark of the archive are not read"))
                yield _DAMAGE
            return
        yield _DAMAGE
        found = _next_header(file, stopped + _BLOCK, end)
        problems.append((f"byte {stopped}", "truncated" if found is None else f"damaged header, the next one is at byte {found}"))
        if found is None:
            return
        offset = found


def _open_at(file: IO[bytes]) -> tarfile.TarFile | None:
    try:
        return _Tolerant(fileobj=file, mode="r")
    except tarfile.TarError:
        return None


class _Tolerant(tarfile.TarFile):
    """A tar whose iteration ends at damage, with `offset` where it was, instead of raising."""

    def next(self) -> tarfile.TarInfo | None:
        try:
            return super().next()
        except (tarfile.TarError, ValueError, OverflowError):
            return None


def _place(info: tarfile.TarInfo, end: int, problems: Problems) -> Place | None:
    if info.isdir():
        return None
    reason = ""
    if not info.isreg() or info.issparse():
        reason = "not a regular file"
    elif info.size > MAX_MEMBER_BYTES:
        reason = f"larger than {MAX_MEMBER_BYTES} bytes"
    if reason:
        problems.append((info.name, reason))
        return None
    return info.name, info.offset_data, info.size if info.offset_data + info.size <= end else _CUT


def _read_block(file: IO[bytes], offset: int) -> bytes:
    file.seek(offset)
    return file.read(_BLOCK)


def _behind_zeros(file: IO[bytes], offset: int, end: int) -> int:
    """Where the first block from `offset` on lies that is not all zeros; `end` if there is none."""
    for start in range(offset, end, _PIECE):
        file.seek(start)
        data = file.read(_PIECE)
        if rest := data.lstrip(b"\0"):
            return start + (len(data) - len(rest)) // _BLOCK * _BLOCK
    return end


def _next_header(file: IO[bytes], offset: int, end: int) -> int | None:
    """Where the next block lies that is a tar header by its own checksum."""
    while offset + _BLOCK <= end:
        try:
            tarfile.TarInfo.frombuf(_read_block(file, offset), "utf-8", "surrogateescape")
            return offset
        except tarfile.HeaderError:
            offset += _BLOCK
    return None


def _group(places: Iterator[Place | None], problems: Problems) -> dict[str, dict[str, Place]]:
    """Members by key and extension, in order of the keys; without the samples next to damage."""
    samples: dict[str, dict[str, Place]] = {}
    doubtful: set[str] = set()
    previous: str | None = None
    after_damage = False
    for place in places:
        if place is None:
            after_damage = True
            doubtful |= {previous} if previous is not None else set()
            continue
        try:
            key, extension = split_name(place[0])
        except BadSample as error:
            problems.append((place[0], error.reason))
            continue
        if after_damage:
            doubtful.add(key)
        after_damage, previous = False, key
        if extension in samples.setdefault(key, {}):
            problems.append((place[0], "the same member twice, the first is used"))
        else:
            samples[key][extension] = place
    for key in sorted(doubtful & samples.keys()):
        del samples[key]
        problems.append((key, "next to a damaged place, may be incomplete"))
    return samples


def index_foreign(shard: str | Path) -> ShardIndex:
    """Index a tar that has no index, local or remote, and store the index beside it, or where spare ones lie if that is forbidden."""
    address = str(shard)
    problems: Problems = []
    with _opened(address) as (file, length, digest):
        samples = _group(scan_tar(file, problems), problems)
        entries = []
        for key, places in samples.items():
            try:
                entries.append(_entry(file, key, places))
            except BadSample as error:
                problems.append((key, error.reason))
    index = ShardIndex(PurePosixPath(address).name, length, digest, tuple(entries), tuple(problems))
    try:
        write_index(index_path(address), index)
    except (OSError, AccessDenied):
        place = spare_index_path(address)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_index(place, index)
    return index


def index_all(shards: Mapping[str, int], done: Callable[[str], bool], executor: Executor = LOCAL) -> None:
    """Index the tars at these addresses (-> length), in parallel where it pays. What is done is kept if this is interrupted.

    done: whether a tar has an index by now. Raises WorkFailed.
    """
    total = sum(shards.values())
    progress, ready = Progress(max(1, round(total / 1e6)), "indexing", "MB"), 0
    for address in executor.run(index_foreign, list(shards), done, _logs(shards), pays=total > _PARALLEL_BYTES):
        ready += shards[address]
        progress.advance(max(1, round(ready / 1e6)) - progress.done)


def _logs(shards: Iterable[str]) -> Path:
    """Where the logs of an array lie that indexes these tars: below the current folder, and another place for each folder of tars."""
    folder = PurePosixPath(min(shards, default="")).parent
    return Path(f"index-{folder.name}-{xxhash.xxh3_64_hexdigest(str(folder).encode())}")


@contextmanager
def _opened(address: str) -> Iterator[tuple[IO[bytes], int, str]]:
    """A shard as a local file, copied if it is remote; its length and xxh3_128."""
    path, digest, length = local_path(address), xxhash.xxh3_128(), 0
    with TemporaryFile(prefix="dit-index-") if path is None else path.open("rb") as file:
        for piece in pieces(address):
            digest.update(piece)
            length += len(piece)
            if path is None:
                file.write(piece)
        yield file, length, digest.hexdigest()


def _entry(file: IO[bytes], key: str, places: dict[str, Place]) -> Entry:
    media = media_extension(set(places))
    members, contents = {}, {}
    for extension, (_, offset, length) in places.items():
        file.seek(offset)
        data = file.read(length)
        members[extension] = Member(offset, length, checksum(data))
        if extension in (media, CAPTION_EXTENSION):
            contents[extension] = data
    caption = read_caption(contents.get(CAPTION_EXTENSION, b""))
    meta: dict[str, Any] = {}
    return Entry(key, members, probe(contents), len(caption), meta)


def summarise(problems: tuple[tuple[str, str], ...]) -> str:
    """Count problems by reason, in one line."""
    counts = Counter(reason for _, reason in problems)
    return "; ".join(f"{count} x {reason}" for reason, count in counts.most_common())
