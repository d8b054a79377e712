"""Shards: plain WebDataset tars, written once, byte for byte the same from the same samples, verified at any time.

Knows nothing of what the members mean; facts about a sample come from the caller.
"""

import tarfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import xxhash

from data_pipelines.index import Entry, ShardIndex, index_path, read_index, write_index
from data_pipelines.samples import CAPTION_EXTENSION, BadSample, Facts, check_key, read_caption
from data_pipelines.storage import Member, checksum, pieces, published, read_members


def shard_name(number: int) -> str:
    """File name of the shard with this number in a set that we write."""
    return f"shard-{number:06d}.tar"


_BATCH = 1 << 20


class _Hashed:
    """Hashes and counts what is written on its way to `file`, small pieces together: each by itself costs more than its bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash, self.length = file, xxhash.xxh3_128(), 0
        self._held: list[bytes] = []
        self._from = 0

    def write(self, *pieces: bytes) -> None:
        self._held += pieces
        self.length += sum(map(len, pieces))
        if self.length - self._from >= _BATCH:
            self.flush()

    def flush(self) -> None:
        for piece in self._held:
            self.hash.update(piece)
            self.file.write(piece)
        self._held.clear()
        self._from = self.length


class ShardWriter:
    """Write one shard and its index: `with ShardWriter(path) as shard: shard.add(key, members, facts, meta)`.

    The tar appears under its own name when the block ends without an error, its index after it: a shard whose index
    exists is complete. An error leaves nothing behind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, Entry] = {}
        self._problems: list[tuple[str, str]] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._out = _Hashed(stack.enter_context(published(self.path)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            ending = -(self._out.length + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE
            self._out.write(bytes(2 * tarfile.BLOCKSIZE + ending))
            self._out.flush()
            Path(index_path(str(self.path))).unlink(missing_ok=True)  # an old index must not vouch for the new tar
        self._stack.__exit__(kind, error, trace)
        if kind is None:
            write_index(Path(index_path(str(self.path))), self.index)

    @property
    def index(self) -> ShardIndex:
        """The index of what was written so far."""
        self._out.flush()
        entries = tuple(self._entries.values())
        return ShardIndex(self.path.name, self._out.length, self._out.hash.hexdigest(), entries, tuple(self._problems))

    def add(self, key: str, members: Mapping[str, bytes], facts: Facts, meta: Mapping[str, Any]) -> None:
        """Append a sample: `members` maps extensions to content. Raises ValueError for an unusable or repeated key."""
        check_key(key)
        if key in self._entries:
            raise ValueError(f"key {key!r} occurs twice in {self.path.name}")
        places = {extension: self._write(f"{key}.{extension}", data) for extension, data in sorted(members.items())}
        caption = read_caption(members.get(CAPTION_EXTENSION, b""))
        self._entries[key] = Entry(key, places, facts, len(caption), dict(meta))

    def leave_out(self, what: str, reason: str) -> None:
        """Record in the index that the input `what` gave no sample, and why."""
        self._problems.append((what, reason))

    def _write(self, name: str, data: bytes) -> Member:
        header = tar_header(name, len(data))
        offset = self._out.length + len(header)
        self._out.write(header, data, bytes(-len(data) % tarfile.BLOCKSIZE))
        return Member(offset, len(data), checksum(data))


def tar_header(name: str, size: int) -> bytes:
    """The header of a plain file of owner 0 and time 0, so that the same samples give the same bytes: ustar, PAX if it does not fit.

    The usual name, ASCII of at most 100 characters, is put into a ready header (POSIX.1-1988 ustar), five times as fast as tarfile.
    """
    if len(name) > tarfile.LENGTH_NAME or not name.isascii() or size >= 8**11:
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o644
        return info.tobuf(tarfile.PAX_FORMAT)
    path, length = name.encode(), b"%011o\0" % size
    total = _HEADER_SUM + sum(path) + sum(length)
    return b"".join((path.ljust(100, b"\0"), _HEADER[100:124], length, _HEADER[136:148], b"%06o\0 " % total, _HEADER[156:]))


_HEADER = tarfile.TarInfo("").tobuf()  # mode 0644
_HEADER_SUM = sum(_HEADER[100:124]) + sum(_HEADER[136:148]) + 8 * ord(" ") + sum(_HEADER[156:])  # the checksum counts as blanks


@dataclass(frozen=True)
class ShardReport:
    """What verification found: damage to the file as a whole, and the samples that it cost, with reasons."""

    shard: str
    samples: int
    damage: tuple[str, ...]
    bad: tuple[tuple[str, str], ...]

    @property
    def intact(self) -> bool:
        """Whether every byte is as it was written."""
        return not self.damage and not self.bad


def verify_shard(shard: str | Path, index: ShardIndex | None = None) -> ShardReport:
    """Compare every byte of the shard at an address with its index (read from beside it if None)."""
    address = str(shard)
    index = read_index(index_path(address)) if index is None else index
    damage = _file_damage(address, index)
    bad = []
    for entry in index.entries:
        try:
            read_members(address, entry.members)
        except BadSample as error:
            bad.append((entry.key, error.reason))
    return ShardReport(address, len(index.entries), damage, tuple(bad))


def _file_damage(address: str, index: ShardIndex) -> tuple[str, ...]:
    digest, length = xxhash.xxh3_128(), 0
    try:
        for piece in pieces(address):
            digest.update(piece)
            length += len(piece)
    except FileNotFoundError:
        return ("missing",)
    if length != index.length:
        return (f"{length} bytes, expected {index.length}",)
    return () if digest.hexdigest() == index.checksum else ("the file's checksum does not match",)
