"""A source: a folder of shards with their indexes, summed up so that a plan can be checked before the first step.

Memory is bounded by the number of shards and of distinct sizes, not by the number of samples.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import xxhash

from data_pipelines import filters
from data_pipelines.config import Source
from data_pipelines.errors import UserError
from data_pipelines.executors import Executor
from data_pipelines.foreign import index_all, summarise
from data_pipelines.index import SUFFIX, Entry, ShardIndex, index_path, read_index, spare_index_path, uncollected
from data_pipelines.samples import Facts
from data_pipelines.storage import folder_files, read_file

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
class Selection:
    """Which samples of a source are used: those that its filter lets pass and that are not on the skip list."""

    filter: filters.Filter | None = None
    skip: frozenset[str] = frozenset()

    def refuses(self, name: str, entry: Entry) -> str | None:
        """Why the sample with the id `name` is left out, None if it is not."""
        if name in self.skip:
            return "on the skip list"
        reason = self.filter.refuses(entry) if self.filter else None
        return f"filter: {reason}" if reason else None


@dataclass(frozen=True)
class SourceManifest:
    """What a folder holds and is used. `hash` covers every index and what is left out, so equal hashes mean equal samples.

    facts: how many samples of each kind, size and rate are used. dropped: how many are not, by reason.
    problems: what is wrong with shards, or was left out of them when they were indexed.
    indexes: those that are held in memory, by the shard's address; the others are read when they are needed.
    """

    name: str
    weight: float
    shards: tuple[Shard, ...]
    facts: Mapping[Facts, int]
    hash: str
    problems: tuple[str, ...]
    indexes: Mapping[str, ShardIndex] = field(default_factory=dict, repr=False)
    dropped: Mapping[str, int] = field(default_factory=dict)
    selection: Selection = field(default=Selection(), repr=False)

    @property
    def samples(self) -> int:
        """Samples of all shards, used or not."""
        return sum(shard.samples for shard in self.shards)

    def entries(self, shard: Shard) -> Iterator[Entry]:
        """The samples of one shard that are used."""
        return (entry for entry in self.index(shard).entries if not self.selection.refuses(f"{self.name}/{shard.name}/{entry.key}", entry))

    def index(self, shard: Shard) -> ShardIndex:
        """The index of one shard. Raises UserError if it changed since the manifest was made."""
        index = self.indexes.get(shard.address) or read_index(shard.index)
        if index.digest != shard.digest:
            raise UserError(f"{shard.index} changed while the run was reading it; start the command again")
        return index


@uncollected()
def read_source(
    folder: str,
    name: str = "",
    weight: float = 1.0,
    config_key: str = "data.sources[i].path",
    selection: Selection = Selection(),
) -> SourceManifest:
    """Read all indexes of a folder of shards; shards without one are indexed. Raises UserError if there is nothing to use.

    `name` begins the ids of its samples (the folder's own name if empty); `config_key` is for error texts.
    """
    name = name or _basename(folder)
    shards, problems, known = [], [], set[str]()
    facts: Counter[Facts] = Counter()
    dropped: Counter[str] = Counter()
    digest = xxhash.xxh3_128(selection.filter.text.encode() if selection.filter else b"")
    tars, places = _indexed_tars(folder, config_key)
    for address, index in zip(places, _read_indexes(list(places.values())), strict=True):
        if (length := tars.get(address)) is None:
            problems.append(f"{address} is missing, but its index is there; its samples will be holes")
        elif length != index.length:
            problems.append(f"{address}: {length} bytes, {index.length} when it was indexed; samples that are cut off will be holes")
        if index.problems:
            problems.append(f"{address}: left out {summarise(index.problems)}")
        shard = Shard(address, PurePosixPath(address).stem, len(index.entries), index.digest, places[address])
        shards.append(shard)
        digest.update(f"{shard.name}\x1f{shard.digest}\n".encode())
        for entry in index.entries:
            if selection.filter:
                known.update(filters.fields_of(entry))
            if reason := selection.refuses(sample := f"{name}/{shard.name}/{entry.key}", entry):
                dropped[reason] += 1
                if sample in selection.skip:
                    digest.update(f"{sample}\n".encode())
            else:
                facts[entry.facts] += 1
    if selection.filter:
        selection.filter.check_names(known)
    if dropped and not facts:
        counts = "; ".join(f"{count} x {reason}" for reason, count in dropped.items())
        raise UserError(f"{config_key} = {folder!r}: no sample is left: {counts}; change its filter or data.skip_list")
    if not facts:
        raise UserError(f"{config_key} = {folder!r}: its {len(shards)} shards hold no usable sample ({'; '.join(problems) or 'all empty'})")
    return SourceManifest(name, weight, tuple(shards), facts, digest.hexdigest(), tuple(problems), {}, dropped, selection)


def read_sources(sources: Sequence[Source], skip_list: str | None = None, config_key: str = "data.sources") -> tuple[SourceManifest, ...]:
    """Read every source of a config, without the samples of its skip list. Folders of the same name are told apart by a number."""
    skip = read_skip_list(skip_list) if skip_list else frozenset[str]()
    seen: Counter[str] = Counter()
    manifests = []
    for number, source in enumerate(sources):
        base = _basename(source.path)
        seen[base] += 1
        name = base if seen[base] == 1 else f"{base}#{seen[base]}"
        key = f"{config_key}[{number}]"
        selection = Selection(filters.Filter.parse(source.filter, f"{key}.filter") if source.filter else None, skip)
        manifests.append(read_source(source.path, name, source.weight, f"{key}.path", selection))
    return tuple(manifests)


def read_skip_list(path: str) -> frozenset[str]:
    """Ids of the samples in a file of JSON lines, `{"id": "source/shard/key", ...}`. Raises UserError if it is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.skip_list = {path!r}: cannot be read ({error}); expected the bad_samples.jsonl of a run") from None
    ids = set()
    for number, line in enumerate(lines, 1):
        try:
            ids.add(str(json.loads(line)["id"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f'{path}:{number}: got {line[:60]!r}, expected a JSON object with an "id"; change data.skip_list') from None
    return frozenset(ids)


def index_source(folder: str, executor: Executor, config_key: str) -> None:
    """Index the tars of a folder that have no index, or this process's share of them. Raises UserError, WorkFailed."""
    tars, _ = _tars(folder, config_key)
    mine = {name: size for number, (name, size) in enumerate(tars.items()) if executor.owns(number)}
    if unknown := {name: size for name, size in mine.items() if not _has_index(name)}:
        index_all(unknown, _has_index, executor)


def _has_index(address: str) -> bool:
    try:
        return spare_index_path(address).is_file() or bool(read_file(index_path(address)))
    except FileNotFoundError:
        return False


def _indexed_tars(folder: str, config_key: str) -> tuple[dict[str, int], dict[str, str]]:
    """Length of every tar of a folder, and index of each and of those that are gone, by address in order.

    Tars without an index are indexed.
    """
    tars, found = _tars(folder, config_key)
    if unknown := {name: size for name, size in tars.items() if not (index_path(name) in found or spare_index_path(name).is_file())}:
        index_all(unknown, _has_index)
        found |= folder_files(folder)
    return tars, {
        name: index_path(name) if index_path(name) in found else str(spare_index_path(name)) for name in sorted(tars.keys() | _gone(found))
    }


def _gone(found: Mapping[str, int]) -> set[str]:
    """Addresses of the tars whose index is among the files of a folder, and they are not: half a copy, or half a deletion."""
    indexed = {name.removesuffix(SUFFIX) for name in found if name.endswith(f".tar{SUFFIX}")}
    return {name for name in indexed - found.keys() if not _basename(name).startswith(".")}


def _tars(folder: str, config_key: str) -> tuple[dict[str, int], dict[str, int]]:
    """Length of every tar of a folder, by address in order; and of every file."""
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
    return tars, found


def _read_indexes(addresses: Sequence[str]) -> Iterator[ShardIndex]:
    """The indexes at `addresses` in order, a few requests at a time, so that many remote ones do not wait for each other."""
    with ThreadPoolExecutor(_REQUESTS) as pool:
        for start in range(0, len(addresses), _REQUESTS):
            yield from pool.map(read_index, addresses[start : start + _REQUESTS])


def _basename(folder: str) -> str:
    return PurePosixPath(folder.rstrip("/")).name or "source"
