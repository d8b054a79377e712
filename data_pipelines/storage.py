"""Files and objects by address: verified range reads, and files that appear whole or not at all.

The only module that knows where bytes live. Knows nothing of what they mean.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
import xxhash

from data_pipelines.errors import UserError
from data_pipelines.samples import BadSample

SCHEMES = ("file", "s3")
_GAP = 64 * 1024  # bytes between wanted members that are cheaper to read than to skip


@dataclass(frozen=True)
class Member:
    """Where one file of a shard lies: byte range and xxh3_64 (hex) of its content."""

    offset: int
    length: int
    checksum: str


def checksum(data: bytes) -> str:
    """xxh3_64 of `data`, hexadecimal."""
    return xxhash.xxh3_64_hexdigest(data)


def filesystem(address: str) -> tuple[Any, str]:
    """The fsspec filesystem of `address` and the path in it. Raises UserError for schemes that are not allowed."""
    scheme = address.split("://", 1)[0] if "://" in address else "file"
    if scheme not in SCHEMES or "::" in address or address.startswith("pipe:"):
        allowed = ", ".join(f"{name}://" for name in SCHEMES)
        raise UserError(f"address {address!r}: expected a local path or one of {allowed}; change data.sources[i].path")
    fs, path = fsspec.core.url_to_fs(address)
    return fs, str(path)


def read_range(address: str, offset: int, length: int) -> bytes:
    """Read `length` bytes at `offset`. Raises BadSample if they cannot be had."""
    fs, path = filesystem(address)
    try:
        data: bytes = fs.cat_file(path, start=offset, end=offset + length)
    except FileNotFoundError as error:
        raise BadSample("shard is missing") from error
    except OSError as error:
        raise BadSample(f"shard cannot be read ({type(error).__name__})") from error
    if len(data) != length:
        raise BadSample("shard is truncated")
    return data


def read_member(address: str, offset: int, length: int, expected: str) -> bytes:
    """Read one member of the shard at `address`. Raises BadSample unless its content has the checksum `expected`."""
    return _verified(read_range(address, offset, length), expected)


def read_members(address: str, members: Mapping[str, Member]) -> dict[str, bytes]:
    """Read and verify several members of one sample, in a single request where they lie together. Raises BadSample."""
    if not members:
        return {}
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
        with partial.open("w+b") as file:
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
