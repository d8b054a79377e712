"""A source: a folder of shards with their indexes, summed up so that a plan can be checked before the first step.

Memory is bounded by the number of shards and of distinct sizes, not by the number of samples.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import xxhash

from data_pipelines.config import Source
from data_pipelines.errors import UserError
from data_pipelines.foreign import index_foreign, summarise
from data_pipelines.index import ShardIndex, index_path, read_index
from data_pipelines.samples import Facts
from data_pipelines.storage import filesystem

_HOW = "`python -m data_pipelines ingest SRC OUT` makes shards"


@dataclass(frozen=True)
class Shard:
    """One shard of a source: address of the tar, name without folder and suffix, number of samples, digest of its index."""

    address: str
    name: str
    samples: int
    digest: str


@dataclass(frozen=True)
class SourceManifest:
    """What a folder holds. `hash` covers every index, so equal hashes mean equal samples.

    facts: how many samples of each kind, size and rate. problems: what is wrong with shards, or was left out of them.
    """

    name: str
    weight: float
    shards: tuple[Shard, ...]
    facts: Mapping[Facts, int]
    hash: str
    problems: tuple[str, ...]
    unwritable: Mapping[str, ShardIndex] = field(default_factory=dict, repr=False)

    @property
    def samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    def index(self, shard: Shard) -> ShardIndex:
        """The index of one shard. Raises UserError if it changed since the manifest was made."""
        index = self.unwritable.get(shard.address) or read_index(index_path(shard.address))
        if index.digest != shard.digest:
            raise UserError(f"{index_path(shard.address)} changed while the run was reading it; start the command again")
        return index


def read_source(folder: str, name: str = "", weight: float = 1.0, config_key: str = "data.sources[i].path") -> SourceManifest:
    """Read all indexes of a folder of shards; shards without one are indexed. Raises UserError if there is nothing to read.

    `name` begins the ids of its samples (the folder's own name if empty); `config_key` is for error texts.
    """
    shards, problems, unwritable = [], [], {}
    facts: Counter[Facts] = Counter()
    digest = xxhash.xxh3_128()
    for address, length in _tars(folder, config_key):
        index, on_disk = _index_of(address)
        if not on_disk:
            unwritable[address] = index
        if length != index.length:
            problems.append(f"{address}: {length} bytes, {index.length} when it was indexed; samples that are cut off will be holes")
        if index.problems:
            problems.append(f"{address}: left out {summarise(index.problems)}")
        shard = Shard(address, PurePosixPath(address).stem, len(index.entries), index.digest)
        shards.append(shard)
        facts.update(entry.facts for entry in index.entries)
        digest.update(f"{shard.name}\x1f{shard.digest}\n".encode())
    if not facts:
        raise UserError(f"{config_key} = {folder!r}: its {len(shards)} shards hold no usable sample ({'; '.join(problems) or 'all empty'})")
    return SourceManifest(name or _basename(folder), weight, tuple(shards), facts, digest.hexdigest(), tuple(problems), unwritable)


def read_sources(sources: Sequence[Source]) -> tuple[SourceManifest, ...]:
    """Read every source of a config. Folders of the same name are told apart by a number."""
    seen: Counter[str] = Counter()
    manifests = []
    for number, source in enumerate(sources):
        base = _basename(source.path)
        seen[base] += 1
        name = base if seen[base] == 1 else f"{base}#{seen[base]}"
        manifests.append(read_source(source.path, name, source.weight, f"data.sources[{number}].path"))
    return tuple(manifests)


def _tars(folder: str, config_key: str) -> list[tuple[str, int]]:
    """Address and length of every tar of a folder, by name."""
    fs, path = filesystem(folder)
    if not fs.exists(path):
        raise UserError(f"{config_key} = {folder!r}: no such folder; expected one with .tar shards ({_HOW})")
    if not fs.isdir(path):
        raise UserError(f"{config_key} = {folder!r}: a file; expected the folder that holds the .tar shards")
    found = {str(item["name"]): int(item["size"]) for item in fs.ls(path, detail=True) if item["type"] == "file"}
    prefix = folder.split("://", 1)[0] + "://" if "://" in folder else ""
    tars = [(prefix + name, size) for name, size in sorted(found.items()) if name.endswith(".tar") and not _basename(name).startswith(".")]
    if not tars:
        packed = any(name.endswith((".tar.gz", ".tgz", ".tar.zst")) for name in found)
        hint = "compressed tars cannot be read by offset: " if packed else ""
        raise UserError(f"{config_key} = {folder!r}: no .tar shard among its {len(found)} files; {hint}{_HOW}")
    return tars


def _index_of(address: str) -> tuple[ShardIndex, bool]:
    """The index of a shard, and whether it can be read from beside the shard again."""
    place = index_path(address)
    fs, path = filesystem(place)
    if fs.exists(path):
        return read_index(place), True
    if "://" in address:
        raise UserError(f"{place} is missing: index the shards where they are local, then upload them with their indexes")
    return index_foreign(Path(address)), Path(place).exists()


def _basename(folder: str) -> str:
    return PurePosixPath(folder.rstrip("/")).name or "source"
