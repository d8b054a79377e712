"""A bounded copy of remote shards on a disk of this node, shared by its processes, filled ahead of their use.

A shard is copied whole, verified by the checksum in its index, and only then given its name. Members are verified again when they
are read, so a copy that is stale or decayed costs one remote read, and a reader whose file is evicted keeps it until it closes it.
Two locks, which end with the process that holds them: a shared one pins a copy, as prefetching does with all shards of the windows
in use; an exclusive one on an unfinished copy says that its writer lives. What nobody has locked may be evicted, the oldest first.
"""

import fcntl
import logging
import os
import re
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO

import xxhash

from data_pipelines.config import CacheConfig
from data_pipelines.errors import UserError
from data_pipelines.index import ShardIndex
from data_pipelines.samples import BadSample
from data_pipelines.sources import Shard, SourceManifest
from data_pipelines.storage import Member, local_path, pieces, read_into

log = logging.getLogger(__name__)
AT_ONCE = 4
"""Shards that a rank copies at the same time."""
_FOLDER = "shard-copies"
"""Where the copies lie in data.cache.path, which may hold files of others."""
_COPY = re.compile(r"[0-9a-f]{32}-.+\.tar(\.partial)?", re.DOTALL)
_LOCK = ".lock"
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class ShardCache:
    """Copies in `folder`, of at most `limit` bytes together, unfinished ones included. Whatever else lies there is left alone."""

    folder: Path
    limit: int

    @classmethod
    def open(cls, config: CacheConfig) -> "ShardCache":
        """Make the folder of the copies if it does not exist. Raises UserError if it cannot be written."""
        folder = Path(config.path).expanduser().absolute() / _FOLDER
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _LOCK).touch()
        except OSError as error:
            raise UserError(f"data.cache.path = {config.path!r} cannot be written: {error.strerror}") from error
        return cls(folder, int(config.size_gb * 1e9))

    def place(self, address: str) -> Path:
        """Where the copy of a shard is, if there is one."""
        return _place(self.folder, address)

    def read_into(self, address: str, members: Mapping[str, Member], memory: memoryview) -> dict[str, memoryview]:
        """Read and verify members of one sample, from the copy if there is one, else from the shard. Raises BadSample."""
        found = self._from_copy(self.place(address), members, memory) if local_path(address) is None else None
        return read_into(address, members, memory) if found is None else found

    def _from_copy(self, place: Path, members: Mapping[str, Member], memory: memoryview) -> dict[str, memoryview] | None:
        """Members of a sample from the copy at `place`; None if there is none, or if it is damaged on this disk and so dropped."""
        try:
            copy = place.open("rb", buffering=0)
        except OSError:
            return None
        with copy:
            try:
                return read_into(str(place), members, memory)
            except BadSample:
                self._drop(place, copy)
        return None

    def _drop(self, place: Path, copy: IO[bytes]) -> None:
        """Delete the copy at `place` if it is the one that was opened, and not one that was published since."""
        with suppress(OSError), self._bookkeeping():
            if os.path.samestat(os.fstat(copy.fileno()), place.stat()):
                place.unlink()

    def pin(self, address: str, index: ShardIndex, stop: threading.Event) -> IO[bytes] | None:
        """Copy a shard unless it is there, and keep it there until the result is closed.

        None if all room is taken by pinned copies, or on `stop`. Raises BadSample if the shard is not what its index says.
        """
        while not stop.is_set():
            with self._bookkeeping():
                if (copy := self._existing(address, index)) is not None:
                    return copy
                partial = self._begin(address, index.length)
            if isinstance(partial, bool):
                if not partial:
                    return None
                stop.wait(_POLL_SECONDS)  # another process is at it
                continue
            try:
                self._copy(address, index, partial, stop)
                with self._bookkeeping():
                    os.replace(self._partial(address), self.place(address))
                    fcntl.flock(partial, fcntl.LOCK_SH)
                return partial
            except BaseException:
                with self._bookkeeping():
                    self._partial(address).unlink(missing_ok=True)
                    partial.close()
                raise
        return None

    def _partial(self, address: str) -> Path:
        place = self.place(address)
        return place.with_name(place.name + ".partial")

    def _existing(self, address: str, index: ShardIndex) -> IO[bytes] | None:
        place = self.place(address)
        try:
            copy = place.open("rb")
            if os.fstat(copy.fileno()).st_size == index.length:
                fcntl.flock(copy, fcntl.LOCK_SH)
                os.utime(copy.fileno())
                return copy
            copy.close()
            place.unlink()  # of a shard that was replaced
        except FileNotFoundError:
            pass
        return None

    def _begin(self, address: str, length: int) -> IO[bytes] | bool:
        """An unfinished copy to write, its room reserved; False if there is no room, True if another process writes it."""
        name = self._partial(address)
        partial = os.fdopen(os.open(name, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        if not _try_lock(partial):
            partial.close()
            return True
        partial.truncate(0)
        if not self._make_room(length):
            name.unlink()
            partial.close()
            return False
        partial.truncate(length)
        return partial

    def _copies(self) -> list[tuple[int, int, Path]]:
        """When each copy was last used, its length and its place, the oldest first."""
        copies = []
        for path in filter(lambda path: _COPY.fullmatch(path.name), self.folder.iterdir()):
            with suppress(FileNotFoundError):  # somebody tidies up
                found = path.stat()
                copies += [(found.st_mtime_ns, found.st_size, path)] if stat.S_ISREG(found.st_mode) else []
        return sorted(copies)

    def _make_room(self, length: int) -> bool:
        copies = self._copies()
        free = self.limit - sum(size for _, size, _ in copies)
        for _, size, path in copies:
            if free >= length:
                break
            with suppress(FileNotFoundError), path.open("rb") as file:
                if _try_lock(file):
                    path.unlink()
                    free += size
        return free >= length

    def _copy(self, address: str, index: ShardIndex, partial: IO[bytes], stop: threading.Event) -> None:
        digest, length = xxhash.xxh3_128(), 0
        for piece in pieces(address):
            if stop.is_set() or length + len(piece) > index.length:
                break
            partial.write(piece)
            digest.update(piece)
            length += len(piece)
        partial.flush()
        if stop.is_set():
            raise InterruptedError
        if digest.hexdigest() != index.checksum:
            raise BadSample("the shard is not what its index says; its samples are read one by one")

    @contextmanager
    def _bookkeeping(self) -> Iterator[None]:
        with (self.folder / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@lru_cache(maxsize=4096)  # a reader asks for every sample
def _place(folder: Path, address: str) -> Path:
    return folder / f"{xxhash.xxh3_128_hexdigest(address.encode())}-{PurePosixPath(address).name}"


def _try_lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Prefetch:
    """Threads that keep the shards of the windows in use in the cache. What fails here is left to the readers, who say so."""

    def __init__(self, cache: ShardCache) -> None:
        self.cache = cache
        self._wanted: dict[str, tuple[SourceManifest, Shard]] = {}
        self._pins: dict[str, IO[bytes] | None] = {}  # None: being copied, or left to the readers
        self._change = threading.Condition()
        self._stop = threading.Event()
        for _ in range(AT_ONCE):
            threading.Thread(target=self._work, daemon=True).start()

    def want(self, shards: Iterable[tuple[SourceManifest, Shard]]) -> None:
        """Copy and pin these, in this order, and let go of all others."""
        with self._change:
            self._wanted = {shard.address: (source, shard) for source, shard in shards if local_path(shard.address) is None}
            for address in self._pins.keys() - self._wanted.keys():
                if (pin := self._pins.pop(address)) is not None:
                    pin.close()
            self._change.notify_all()

    def close(self) -> None:
        """Let go of everything; a copy in the making is dropped at its next piece."""
        self._stop.set()
        self.want([])

    def _work(self) -> None:
        while (item := self._next()) is not None:
            source, shard = item
            pin = None
            try:
                pin = self.cache.pin(shard.address, source.index(shard), self._stop)
            except (UserError, BadSample, OSError) as error:
                if not self._stop.is_set():
                    log.warning("cache: %s is not copied: %s", shard.address, error)
            with self._change:
                if shard.address in self._wanted:
                    self._pins[shard.address] = pin
                elif pin is not None:
                    pin.close()

    def _next(self) -> tuple[SourceManifest, Shard] | None:
        with self._change:
            while not self._stop.is_set():
                for address, item in self._wanted.items():
                    if address not in self._pins:
                        self._pins[address] = None
                        return item
                self._change.wait()
        return None
