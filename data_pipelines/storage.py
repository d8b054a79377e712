"""Files and objects by address: verified range reads, and files that appear whole or not at all.

The only module that knows where bytes live. Knows nothing of what they mean.
"""

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple

import xxhash

from data_pipelines import remote
from data_pipelines.errors import UserError
from data_pipelines.samples import BadSample

SCHEMES = ("file", "s3")
_PIECE, _BUFFER = 16 << 20, 1 << 20
_ALIGNMENT = 512  # of members in a tar, and so of the elements of an array in memory
_GAP = 64 * 1024  # bytes between wanted members that are cheaper to read than to skip


class Member(NamedTuple):
    """Where one file of a shard lies: byte range and xxh3_64 (hex) of its content."""

    offset: int
    length: int
    checksum: str


def checksum(data: bytes | memoryview) -> str:
    """xxh3_64 of `data`, hexadecimal."""
    return xxhash.xxh3_64_hexdigest(data)


@lru_cache(maxsize=4096)
def local_path(address: str) -> Path | None:
    """The path of a local address, None for an object of a store. Raises UserError for schemes that are not allowed."""
    scheme, separator, rest = address.partition("://")
    if not separator and not address.startswith("pipe:"):
        return Path(address)
    if scheme not in SCHEMES or "::" in address:
        allowed = ", ".join(f"{name}://" for name in SCHEMES)
        raise UserError(f"address {address!r}: expected a local path or one of {allowed}; change data.sources[i].path")
    return Path(rest) if scheme == "file" else None


def read_file(address: str) -> bytes:
    """The whole file or object. Raises FileNotFoundError and other OSErrors, AccessDenied, StorageUnavailable."""
    path = local_path(address)
    return remote.read_object(address) if path is None else path.read_bytes()


def write_file(address: str, data: bytes) -> None:
    """Write a file or object, whole or not at all. Raises OSError, AccessDenied, StorageUnavailable."""
    path = local_path(address)
    if path is None:
        remote.write_object(address, data)
        return
    with published(path) as file:
        file.write(data)


def folder_files(folder: str) -> dict[str, int]:
    """Address and length of the files directly in a folder. Raises FileNotFoundError, NotADirectoryError, and as `read_file`."""
    path = local_path(folder)
    if path is None:
        return remote.list_objects(folder)
    return {str(file): file.stat().st_size for file in path.absolute().iterdir() if file.is_file()}


def read_range(address: str, offset: int, length: int) -> bytes:
    """Read `length` bytes at `offset`. Raises BadSample if they are not there; AccessDenied or StorageUnavailable, which end the run."""
    data = bytearray(length)
    _read_at(address, [(offset, memoryview(data))])
    return bytes(data)


def _read_at(address: str, ranges: Sequence[tuple[int, memoryview]]) -> None:
    """Fill each view with what lies at its offset. Raises as `read_range`."""
    path = local_path(address)
    try:
        if path is None:
            done = [_copied(remote.read_object(address, offset, offset + len(view)), view) for offset, view in ranges]
        else:
            file = os.open(path, os.O_RDONLY)
            try:
                done = [_filled(file, offset, view) for offset, view in ranges]
            finally:
                os.close(file)
    except FileNotFoundError as error:
        raise BadSample("shard is missing") from error
    except OSError as error:
        raise BadSample(f"shard cannot be read ({type(error).__name__})") from error
    if not all(done):
        raise BadSample("shard is truncated")


def _copied(data: bytes, view: memoryview) -> bool:
    if whole := len(data) == len(view):
        view[:] = data
    return whole


def _filled(file: int, offset: int, view: memoryview) -> bool:
    while len(view) and (count := os.preadv(file, [view], offset)):  # at most 2 GiB a call
        view, offset = view[count:], offset + count
    return not len(view)


def pieces(address: str) -> Iterator[bytes]:
    """The content of a file or object in order, in pieces of 16 MiB. Raises as `read_file`."""
    path = local_path(address)
    if path is not None:
        with path.open("rb", buffering=0) as file:
            while piece := file.read(_PIECE):
                yield piece
        return
    offset, piece = 0, bytes(_PIECE)
    while len(piece) == _PIECE:
        piece = remote.read_object(address, offset, offset + _PIECE)
        offset += len(piece)
        yield piece


def read_members(address: str, members: Mapping[str, Member]) -> dict[str, bytes]:
    """Read and verify several members of one sample. Raises BadSample."""
    return {name: bytes(data) for name, data in read_into(address, members, memoryview(bytearray(room_for(members)))).items()}


def room_for(members: Mapping[str, Member]) -> int:
    """Bytes of memory that `read_into` takes for these members."""
    return sum(_aligned(length) for _, length in _ranges(members))


def read_into(address: str, members: Mapping[str, Member], memory: memoryview) -> dict[str, memoryview]:
    """Read several members of one sample into `memory`, in a single request where they lie together, and verify them: views of it.

    Raises BadSample.
    """
    ranges, at = [], 0
    for offset, length in _ranges(members):
        ranges.append((offset, memory[at : at + length]))
        at += _aligned(length)
    _read_at(address, ranges)
    found = {}
    for number, (name, member) in enumerate(members.items()):
        offset, view = ranges[number] if len(ranges) > 1 else ranges[0]
        data = view[member.offset - offset :][: member.length]
        if checksum(data) != member.checksum:
            raise BadSample("checksum mismatch: the shard is damaged or was changed after it was indexed")
        found[name] = data
    return found


def announce(address: str, members: Mapping[str, Member]) -> None:
    """Have the disk fetch what will be read, so that it serves several requests at once; nothing for what is remote or not there."""
    path = local_path(address)
    if path is None or not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError):  # whoever reads it will say so
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer must not hold the pack up
        try:
            for offset, length in _ranges(members):
                os.posix_fadvise(file, offset, length, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(file)


def _ranges(members: Mapping[str, Member]) -> list[tuple[int, int]]:
    """(offset, length) of all members together, or of each in order if they lie far apart."""
    first, last, total = 1 << 63, 0, 0
    for offset, length, _ in members.values():
        first, last, total = min(first, offset), max(last, offset + length), total + length
    if last - first > total + _GAP * len(members):
        return [(member.offset, member.length) for member in members.values()]
    return [(first, last - first)] if members else []


def _aligned(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT


@contextmanager
def published(path: Path) -> Iterator[IO[bytes]]:
    """Write a file under a temporary name and give it its own name once it is whole and on disk; drop it on failure."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")  # ids of processes repeat from host to host
    try:
        with partial.open("w+b", buffering=_BUFFER) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable: a directory entry has its own write-back."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
