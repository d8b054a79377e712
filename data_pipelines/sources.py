"""A source: a folder of shards with their indexes, summed up so that a plan can be checked before the first step.

Memory is bounded by the number of shards and of distinct sizes, not by the number of samples.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import xxhash

from data_pipelines.config import Source
from data_pipelines.errors import UserError
from data_pipelines.foreign import index_all, summarise
from data_pipelines.index import ShardIndex, index_path, read_index, spare_index_path
from data_pipelines.samples import Facts
from data_pipelines.storage import folder_files

_REQUESTS = 16
_HOW = "`python -m data_pipelines ingest SRC OUT` makes shards"


@dataclass(frozen=True)
class Shard:
    """One shard of a source: address, name without folder and suffix, number of samples, digest and address of its index."""

    address: str
    name: str
    samples: int
    digest: str
    index: str = ""


@dataclass(frozen=True)
class SourceManifest:
    """What a folder holds. `hash` covers every index, so equal hashes mean equal samples.

    facts: how many samples of each kind, size and rate. problems: what is wrong with shards, or was left out of them.
    indexes: those that are held in memory, by the shard's address; the others are read when they are needed.
    """

    name: str
    weight: float
    shards: tuple[Shard, ...]
    facts: Mapping[Facts, int]
    hash: str
    problems: tuple[str, ...]
    indexes: Mapping[str, ShardIndex] = field(default_factory=dict, repr=False)

    @property
    def samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    def index(self, shard: Shard) -> ShardIndex:
        """The index of one shard. Raises UserError if it changed since the manifest was made."""
        index = self.indexes.get(shard.address) or read_index(shard.index)
        if index.digest != shard.digest:
            raise UserError(f"{shard.index} changed while the run was reading it; start the command again")
        return index


def read_source(folder: str, name: str = "", weight: float = 1.0, config_key: str = "data.sources[i].path") -> SourceManifest:
    """Read all indexes of a folder of shards; shards without one are indexed. Raises UserError if there is nothing to read.

    `name` begins the ids of its samples (the folder's own name if empty); `config_key` is for error texts.
    """
    shards, problems = [], []
    facts: Counter[Facts] = Counter()
    digest = xxhash.xxh3_128()
    tars, places = _tars(folder, config_key)
    for (address, length), index in zip(tars.items(), _read_indexes(list(places.values())), strict=True):
        if length != index.length:
            problems.append(f"{address}: {length} bytes, {index.length} when it was indexed; samples that are cut off will be holes")
        if index.problems:
            problems.append(f"{address}: left out {summarise(index.problems)}")
        shard = Shard(address, PurePosixPath(address).stem, len(index.entries), index.digest, places[address])
        shards.append(shard)
        facts.update(entry.facts for entry in index.entries)
        digest.update(f"{shard.name}\x1f{shard.digest}\n".encode())
    if not facts:
        raise UserError(f"{config_key} = {folder!r}: its {len(shards)} shards hold no usable sample ({'; '.join(problems) or 'all empty'})")
    return SourceManifest(name or _basename(folder), weight, tuple(shards), facts, digest.hexdigest(), tuple(problems))


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


def _tars(folder: str, config_key: str) -> tuple[dict[str, int], dict[str, str]]:
    """Length and index of every tar of a folder, by address in order; those without an index are indexed."""
    try:
        found = folder_files(folder)
    except FileNotFoundError as error:
        raise UserError(f"{config_key} = {folder!r}: no such folder; expected one with .tar shards ({_HOW})") from error
    except NotADirectoryError as error:
        raise UserError(f"{config_key} = {folder!r}: a file; expected the folder that holds the .tar shards") from error
    except OSError as error:
        raise UserError(f"{config_key} = {folder!r} cannot be read: {error.strerror}") from error
    tars = {name: size for name, size in sorted(found.items()) if name.endswith(".tar") and not _basename(name).startswith(".")}
    if not tars:
        packed = any(name.endswith((".tar.gz", ".tgz", ".tar.zst")) for name in found)
        hint = "compressed tars cannot be read by offset: " if packed else ""
        raise UserError(f"{config_key} = {folder!r}: no .tar shard among its {len(found)} files; {hint}{_HOW}")
    unknown = {name: size for name, size in tars.items() if index_path(name) not in found and not spare_index_path(name).is_file()}
    if unknown:
        index_all(unknown)
        found |= folder_files(folder)
    return tars, {name: index_path(name) if index_path(name) in found else str(spare_index_path(name)) for name in tars}


def _read_indexes(addresses: Sequence[str]) -> Iterator[ShardIndex]:
    """The indexes at `addresses` in order, a few requests at a time, so that many remote ones do not wait for each other."""
    with ThreadPoolExecutor(_REQUESTS) as pool:
        for start in range(0, len(addresses), _REQUESTS):
            yield from pool.map(read_index, addresses[start : start + _REQUESTS])


def _basename(folder: str) -> str:
    return PurePosixPath(folder.rstrip("/")).name or "source"
