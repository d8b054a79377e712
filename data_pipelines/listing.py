"""What is in a source: a folder, an archive, a manifest or a folder of WebDataset tars, with classes and captions.

Nothing is ever extracted to a name that an archive chose.
"""

import gzip
import os
import re
import stat
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath

import xxhash

from data_pipelines.errors import UserError
from data_pipelines.foreign import Problems, scan_tar
from data_pipelines.index import SUFFIX, Entry
from data_pipelines.manifests import list_manifest
from data_pipelines.raw_files import MEDIA_EXTENSIONS, Listing, Place, RawFile, named_class
from data_pipelines.samples import CAPTION_EXTENSION, LABEL_EXTENSION, MAX_CAPTION_BYTES, BadSample, media_extension
from data_pipelines.sources import Shard, read_source
from data_pipelines.storage import folder_files, published

ARCHIVES = (".tar", ".tar.gz", ".tgz")
MANIFESTS = (".csv", ".jsonl", ".parquet")
EXPECTED = f"expected a folder, an archive ({', '.join(ARCHIVES)}), a manifest ({', '.join(MANIFESTS)}) or a folder of WebDataset tars"
_MAX_RATIO = 100  # of an archive's unpacked to its packed size: real images and videos do not shrink
_MAX_RATIO_FREE = 256 << 20  # bytes unpacked before the ratio counts
_CHUNK = 1 << 20


def list_source(source: str, spool: Path, out: Path | None = None) -> Listing:
    """List what is in a folder, archive, manifest or WebDataset. Compressed archives are unpacked to the file `spool`.

    out: a folder that does not belong to the source if it lies in it.
    """
    path, name = Path(source), source.lower()
    if "://" in source or (path.is_dir() and any(path.glob("*.tar"))):
        return _list_webdataset(source)
    if path.is_dir():
        return _list_folder(path, out)
    if not path.exists():
        raise UserError(f"SRC = {source!r}: no such file or folder; {EXPECTED}")
    if name.endswith(MANIFESTS):
        return list_manifest(path)
    if not name.endswith(ARCHIVES):
        raise UserError(f"SRC = {source!r}: {EXPECTED}")
    return _list_archive(unpacked(path, spool))


def identity(source: str, out: Path | None = None) -> str:
    """A digest that differs for another source: names and lengths of a folder's files, or length and both ends of a file.

    Left out is what ingest itself writes into a folder: the indexes of tars, and the folder `out`.
    """
    path = Path(source)
    if path.is_dir():
        files = [(name, place) for name, place in _walk(path, out) if place.is_file() and f".tar{SUFFIX}" not in place.name]
        found = "\n".join(f"{name}\x1f{place.stat().st_size}" for name, place in files)
        return xxhash.xxh3_128_hexdigest(found.encode("utf-8", "surrogateescape"))
    if not path.is_file():
        return xxhash.xxh3_128_hexdigest(source.encode("utf-8", "surrogateescape"))
    with path.open("rb") as file:
        head = file.read(_CHUNK)
        file.seek(max(0, path.stat().st_size - _CHUNK))
        return xxhash.xxh3_128_hexdigest(f"{path.stat().st_size}".encode() + head + file.read(_CHUNK))


# --- folders ----------------------------------------------------------------------------------------------------


def _walk(folder: Path, out: Path | None) -> Iterator[tuple[str, Path]]:
    """Name and path of everything below a folder that is not a folder, in order, without `out`. Links to folders are not followed."""
    left_out = None if out is None else out.resolve()
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if left_out is None or (Path(root) / name).resolve() != left_out)
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        for name in sorted((*names, *links)):
            path = Path(root) / name
            yield path.relative_to(folder).as_posix(), path


def _list_folder(folder: Path, out: Path | None) -> Listing:
    found: dict[str, Place] = {}
    problems: Problems = []
    for name, path in _walk(folder, out):
        if path.is_file():
            found[name] = Place(str(path))
        elif name.lower().endswith(MEDIA_EXTENSIONS) or path.is_dir():
            problems.append((name, _not_a_file(path)))
    return _listing(found, problems)


def _not_a_file(path: Path) -> str:
    if path.is_dir():
        return "link to a folder, not followed"
    try:
        mode = path.stat().st_mode
    except OSError:
        return "link that leads nowhere"
    kinds = {stat.S_ISCHR: "device", stat.S_ISBLK: "device", stat.S_ISFIFO: "pipe", stat.S_ISSOCK: "socket"}
    return f"not a regular file but a {next((kind for test, kind in kinds.items() if test(mode)), 'something else')}"


def _listing(found: Mapping[str, Place], problems: Problems) -> Listing:
    """Files with the captions beside them, and with their class folders if all of them lie in some."""
    ignored = Counter[str]()
    media, captions = [], {}
    for name, place in found.items():
        base, _, extension = name.rpartition(".")
        if _hidden(name):
            ignored["hidden"] += 1
        elif extension.lower() in MEDIA_EXTENSIONS:
            media.append(RawFile(name, place))
        elif extension.lower() == CAPTION_EXTENSION:
            captions[base] = place
        else:
            ignored[PurePosixPath(name).suffix or "no extension"] += 1
    classes = tuple(sorted({file.name.partition("/")[0] for file in media})) if all("/" in file.name for file in media) else ()
    files = [replace(file, caption=captions.get(file.name.rpartition(".")[0])) for file in media]
    if classes:
        labels = {name: number for number, name in enumerate(classes)}
        named = [(file, file.name.partition("/")[0]) for file in files]
        files = [replace(file, class_name=name, label=labels[name]) for file, name in named]
    return Listing(tuple(files), classes, dict(ignored), tuple(problems))


def _hidden(name: str) -> bool:
    return PurePosixPath(name).name.startswith(".")


# --- archives and WebDatasets -----------------------------------------------------------------------------------


def _list_archive(tar: Path) -> Listing:
    """The whole files of a tar. Names are labels here, never paths; odd ones are refused all the same."""
    problems: Problems = []
    files: dict[str, Place] = {}
    with tar.open("rb") as archive:
        for item in scan_tar(archive, problems):
            if item is None:
                continue
            name, offset, length = item
            parts = PurePosixPath(name).parts
            if length < 0:
                problems.append((name, "truncated"))
            elif name.startswith("/") or ".." in parts:
                problems.append((name, "unsafe name"))
            elif "/".join(parts) in files:
                problems.append((name, "the same name twice, the first is used"))
            else:
                files["/".join(parts)] = Place(str(tar.absolute()), offset, length)
    prefix = _shared_folder([name for name in files if not _hidden(name)])
    return _listing({name.removeprefix(prefix): place for name, place in sorted(files.items())}, problems)


def _shared_folder(names: Sequence[str]) -> str:
    """The folder that all the names begin with, and its slash, as archives often hold one that holds all; else nothing."""
    top = {name.partition("/")[0] for name in names}
    return f"{top.pop()}/" if len(top) == 1 and all("/" in name for name in names) else ""


def unpacked(source: Path, spool: Path) -> Path:
    """The plain tar of an archive: itself, or `spool`, made if it is missing. Raises UserError for what is damaged or explodes."""
    if not source.name.lower().endswith("gz"):
        return source
    if spool.exists():
        return spool
    limit = max(_MAX_RATIO_FREE, _MAX_RATIO * source.stat().st_size)
    try:
        with gzip.open(source, "rb") as packed, published(spool) as archive:
            while chunk := packed.read(_CHUNK):
                archive.write(chunk)
                if archive.tell() > limit:
                    raise UserError(f"SRC = {str(source)!r}: unpacks to more than {_MAX_RATIO} times its size, as no images or videos do")
    except EOFError as error:
        raise UserError(f"SRC = {str(source)!r}: the archive is truncated; fetch it again") from error
    except (gzip.BadGzipFile, tarfile.TarError, OSError) as error:
        raise UserError(f"SRC = {str(source)!r}: cannot be unpacked ({error})") from error
    return spool


def _list_webdataset(folder: str) -> Listing:
    """Every sample of a folder of tars, with its caption, label and JSON."""
    source = read_source(folder, config_key="SRC")
    lengths = folder_files(folder)
    files = []
    problems: Problems = []
    for shard in source.shards:
        index, length = source.index(shard), lengths.get(shard.address)
        if length is None:
            problems.append((f"{shard.name}.tar", "missing, but its index is there"))
        elif length != index.length:
            problems.append((f"{shard.name}.tar", f"{length} bytes, {index.length} when it was indexed"))
        problems += [(f"{shard.name}/{what}", reason) for what, reason in index.problems]
        for entry in index.entries:
            try:
                files.append(_of_entry(shard, entry, problems))
            except BadSample as error:
                problems.append((f"{shard.name}/{entry.key}", error.reason))
    return Listing(tuple(files), (), {}, tuple(problems))


def _of_entry(shard: Shard, entry: Entry, problems: Problems) -> RawFile:
    """A sample of a shard. Raises BadSample; a label that is none is a problem, and the sample has no label."""
    if entry.facts.kind == "latents":
        raise BadSample("latents, not an image or video")
    extension = media_extension(set(entry.members))
    places = {name: Place(shard.address, *member) for name, member in entry.members.items()}
    label = entry.meta.get("label")
    if label is None and LABEL_EXTENSION in places:
        text = places[LABEL_EXTENSION].read(MAX_CAPTION_BYTES).decode("ascii", "replace").strip()
        label = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None
        if label is None:
            problems.append((f"{shard.name}/{entry.key}.{LABEL_EXTENSION} ({text[:20]!r})", "label is no whole number, left out"))
    extra = {"json": asdict(places["json"])} if "json" in places else {}
    name = f"{shard.name}/{entry.key}.{extension}"
    return RawFile(name, places[extension], places.get(CAPTION_EXTENSION), named_class(entry.meta.get("class")), label, None, extra)
