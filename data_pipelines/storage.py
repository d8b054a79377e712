"""Files and objects by address: verified range reads, and files that appear whole or not at all.

The only module that knows where bytes live. Knows nothing of what they mean.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple

import xxhash

from data_pipelines import remote
from data_pipelines.errors import UserError
from data_pipelines.samples import BadSample

SCHEMES = ("file", "s3")
_PIECE, _BUFFER = 16 << 20, 1 << 20
_GAP = 64 * 1024  # bytes between wanted members that are cheaper to read than to skip


class Member(NamedTuple):
    """Where one file of a shard lies: byte range and xxh3_64 (hex) of its content."""

    offset: int
    length: int
    checksum: str


def checksum(data: bytes) -> str:
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
    return _read_ranges(address, [(offset, length)])[0]


def _read_ranges(address: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """`read_range` of several (offset, length)."""
    path = local_path(address)
    try:
        if path is None:
            found = [remote.read_object(address, offset, offset + length) for offset, length in ranges]
        else:
            found = _read_local(path, ranges)
    except FileNotFoundError as error:
        raise BadSample("shard is missing") from error
    except OSError as error:
        raise BadSample(f"shard cannot be read ({type(error).__name__})") from error
    if any(len(data) != length for data, (_, length) in zip(found, ranges, strict=True)):
        raise BadSample("shard is truncated")
    return found


def pieces(address: str) -> Iterator[bytes]:
    """The content of a file or object in order, in pieces of 16 MiB. Raises as `read_file`."""
    path = local_path(address)
    offset, piece = 0, bytes(_PIECE)
    while len(piece) == _PIECE:
        piece = remote.read_object(address, offset, offset + _PIECE) if path is None else _read_local(path, [(offset, _PIECE)])[0]
        offset += len(piece)
        yield piece


def _read_local(path: Path, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Each (offset, length) as an object of its own: to cut them out of one read would copy them."""
    file = os.open(path, os.O_RDONLY)
    try:
        return [_read_at(file, offset, length) for offset, length in ranges]
    finally:
        os.close(file)


def _read_at(file: int, offset: int, length: int) -> bytes:
    data = os.pread(file, length, offset)
    while len(data) < length and (more := os.pread(file, length - len(data), offset + len(data))):  # at most 2 GiB a call
        data += more
    return data


def read_member(address: str, offset: int, length: int, expected: str) -> bytes:
    """Read one member of the shard at `address`. Raises BadSample unless its content has the checksum `expected`."""
    return _verified(read_range(address, offset, length), expected)


def read_members(address: str, members: Mapping[str, Member]) -> dict[str, bytes]:
    """Read and verify several members of one sample, in a single request where they lie together. Raises BadSample."""
    if not members:
        return {}
    if local_path(address) is not None:
        found = _read_ranges(address, [(member.offset, member.length) for member in members.values()])
        return {name: _verified(data, member.checksum) for (name, member), data in zip(members.items(), found, strict=True)}
    first = min(member.offset for member in members.values())
    last = max(member.offset + member.length for member in members.values())
    if last - first > sum(member.length for member in members.values()) + _GAP * len(members):
        return {name: read_member(address, m.offset, m.length, m.checksum) for name, m in members.items()}
    span = read_range(address, first, last - first)
    return {name: _verified(span[m.offset - first : m.offset - first + m.length], m.checksum) for name, m in members.items()}


def _verified(data: bytes, expected: str) -> bytes:
    if checksum(data) != expected:
        raise BadSample("checksum mismatch: the shard is damaged or was changed after it was indexed")
    return data


@contextmanager
def published(path: Path) -> Iterator[IO[bytes]]:
    """Write a file under a temporary name and give it its own name once it is whole and on disk; drop it on failure."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
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
