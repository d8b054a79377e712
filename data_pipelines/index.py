"""The index beside a shard: where every sample lies, its checksums, and the facts a plan is made of.

JSON, one sample a line, with a checksum of its own. Knows nothing of how shards are written or decoded.
"""

import gc
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import xxhash

from data_pipelines.errors import UserError
from data_pipelines.samples import Facts, Kind
from data_pipelines.storage import Member, read_file, write_file

SCHEMA = 1
SUFFIX = ".index.json"
_KINDS = get_args(Kind)


@dataclass(frozen=True)
class Entry:
    """One sample of a shard. `caption_length` in characters; `meta` is free (label, attributes, scores)."""

    key: str
    members: Mapping[str, Member]
    facts: Facts
    caption_length: int
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class ShardIndex:
    """All of a shard: file name, length in bytes, xxh3_128 of the whole file, its samples, what was left out and why."""

    shard: str
    length: int
    checksum: str
    entries: tuple[Entry, ...]
    problems: tuple[tuple[str, str], ...] = ()

    @cached_property
    def digest(self) -> str:
        """xxh3_128 (hex) of the content of the index: equal digests mean equal samples in equal places."""
        return _digest(_body(self).encode())


@contextmanager
def uncollected() -> Iterator[None]:
    """Pause the collector of cycles: it would go through all entries, which are in none, again and again, for half of the time."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def index_path(shard: str) -> str:
    """Address of the index of the shard at address `shard`."""
    return shard + SUFFIX


def spare_index_path(shard: str) -> Path:
    """Where the index of a shard lies if it cannot lie beside it, because others own the folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "dit" / "indexes" / f"{xxhash.xxh3_128_hexdigest(shard.encode())}-{index_path(PurePosixPath(shard).name)}"


def write_index(address: str | Path, index: ShardIndex) -> None:
    """Write the index to a local path or an object, whole or not at all. Raises OSError, AccessDenied, StorageUnavailable."""
    body = _body(index).encode()
    write_file(str(address), b"%b%b}\n" % (_head(body), body))


def read_index(address: str) -> ShardIndex:
    """Read the index at `address` (local path or object). Raises UserError if it is damaged or of another schema."""
    return parse_index(read_file(address), address)


def parse_index(data: bytes, address: str) -> ShardIndex:
    """Parse and verify the bytes of an index; `address` is for the error text."""
    mend = "delete this file and the shard is indexed anew"
    try:
        record = json.loads(data)
        if record["schema"] != SCHEMA:
            raise UserError(f"{address}: schema {record['schema']}, expected {SCHEMA}; {mend}")
        index = ShardIndex(
            shard=record["shard"],
            length=int(record["length"]),
            checksum=record["xxh3_128"],
            entries=tuple(_entry(sample) for sample in record["samples"]),
            problems=tuple((str(what), str(why)) for what, why in record["problems"]),
        )
    except UserError:
        raise
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:  # an integer of 5000 digits is a ValueError
        raise UserError(f"{address}: not a whole shard index ({type(error).__name__}: {error}); {mend}") from error
    body = data[len(_head(b"")) : -2]
    if data != b"%b%b}\n" % (_head(body), body):
        raise UserError(f"{address}: the index is damaged (its digest does not match its content); {mend}")
    vars(index)["digest"] = _digest(body)  # to write the body anew costs as much as to parse it
    return index


def _digest(body: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(body)


def _head(body: bytes) -> bytes:
    """What stands before the body in the file."""
    return f'{{"digest": "{_digest(body)}",\n'.encode()


def _body(index: ShardIndex) -> str:
    head = {"schema": SCHEMA, "shard": index.shard, "length": index.length, "xxh3_128": index.checksum, "problems": index.problems}
    lines = ",\n".join(json.dumps(_record(entry), sort_keys=True) for entry in index.entries)
    return f'{json.dumps(head, sort_keys=True)[1:-1]},\n"samples": [\n{lines}]'


def _record(entry: Entry) -> dict[str, Any]:
    facts = entry.facts
    return {
        "key": entry.key,
        "kind": facts.kind,
        "frames": facts.frames,
        "height": facts.height,
        "width": facts.width,
        "fps": facts.fps,
        "caption_length": entry.caption_length,
        "members": {name: [m.offset, m.length, m.checksum] for name, m in entry.members.items()},
        "meta": dict(entry.meta),
    }


_facts = lru_cache(maxsize=4096)(Facts)  # of which a shard has few


def _entry(record: dict[str, Any]) -> Entry:
    if record["kind"] not in _KINDS:
        raise TypeError(f"kind {record['kind']!r} is none of {_KINDS}")
    return Entry(
        key=record["key"],
        members={name: Member(*place) for name, place in record["members"].items()},
        facts=_facts(record["kind"], record["frames"], record["height"], record["width"], record["fps"]),
        caption_length=record["caption_length"],
        meta=record["meta"],
    )
