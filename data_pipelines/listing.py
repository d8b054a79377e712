"""What is in a source: a folder, an archive, a manifest or a folder of WebDataset tars, with classes and captions.

Nothing is ever extracted to a name that an archive chose.
"""

import gzip
import os
import re
import stat
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath

import xxhash

from data_pipelines.errors import UserError
from data_pipelines.foreign import Problems, scan_tar
from data_pipelines.manifests import list_manifest
from data_pipelines.raw_files import MEDIA_EXTENSIONS, Listing, Place, RawFile
from data_pipelines.samples import CAPTION_EXTENSION, LABEL_EXTENSION, MAX_CAPTION_BYTES, media_extension
from data_pipelines.sources import read_source
from data_pipelines.storage import published

ARCHIVES = (".tar", ".tar.gz", ".tgz")
MANIFESTS = (".csv", ".jsonl", ".parquet")
EXPECTED = f"expected a folder, an archive ({', '.join(ARCHIVES)}), a manifest ({', '.join(MANIFESTS)}) or a folder of WebDataset tars"
_MAX_RATIO = 100  # of an archive's unpacked to its packed size: real images and videos do not shrink
_MAX_RATIO_FREE = 256 << 20  # bytes unpacked before the ratio counts
_CHUNK = 1 << 20


def list_source(source: str, spool: Path) -> Listing:
    """List what is in a folder, archive, manifest or WebDataset. Compressed archives are unpacked to the file `spool`."""
    path, name = Path(source), source.lower()
    if "://" in source or (path.is_dir() and any(path.glob("*.tar"))):
        return _list_webdataset(source)
    if path.is_dir():
        return _list_folder(path)
    if not path.exists():
        raise UserError(f"SRC = {source!r}: no such file or folder; {EXPECTED}")
    if name.endswith(MANIFESTS):
        return list_manifest(path)
    if not name.endswith(ARCHIVES):
        raise UserError(f"SRC = {source!r}: {EXPECTED}")
    return _list_archive(unpacked(path, spool))


def identity(source: str) -> str:
    """A digest that differs for another source: names and lengths of a folder's files, or length and both ends of a file."""
    path = Path(source)
    if path.is_dir():
        found = "\n".join(f"{name}\x1f{place.stat().st_size}" for name, place in _walk(path) if place.is_file())
        return xxhash.xxh3_128_hexdigest(found.encode("utf-8", "surrogateescape"))
    if not path.is_file():
        return xxhash.xxh3_128_hexdigest(source.encode("utf-8", "surrogateescape"))
    with path.open("rb") as file:
        head = file.read(_CHUNK)
        file.seek(max(0, path.stat().st_size - _CHUNK))
        return xxhash.xxh3_128_hexdigest(f"{path.stat().st_size}".encode() + head + file.read(_CHUNK))


# --- folders ----------------------------------------------------------------------------------------------------


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of everything below a folder that is not a folder, in order. Links to folders are not followed."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        for name in sorted((*names, *links)):
            path = Path(root) / name
            yield path.relative_to(folder).as_posix(), path


def _list_folder(folder: Path) -> Listing:
    found: dict[str, Place] = {}
    problems: Problems = []
    for name, path in _walk(folder):
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
        if PurePosixPath(name).name.startswith("."):
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
    top = {PurePosixPath(name).parts[0] for name in files}
    shared = len(top) == 1 and all("/" in name for name in files)  # archives often hold one folder that holds all
    return _listing({name.partition("/")[2] if shared else name: place for name, place in sorted(files.items())}, problems)


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
    files = []
    problems: Problems = []
    for shard in source.shards:
        index = source.index(shard)
        problems += [(f"{shard.name}/{what}", reason) for what, reason in index.problems]
        for entry in index.entries:
            if entry.facts.kind == "latents":
                problems.append((f"{shard.name}/{entry.key}", "latents, not an image or video"))
                continue
            extension = media_extension(set(entry.members))
            places = {name: Place(shard.address, m.offset, m.length) for name, m in entry.members.items()}
            label = entry.meta.get("label")
            if label is None and LABEL_EXTENSION in places:
                text = places[LABEL_EXTENSION].read(MAX_CAPTION_BYTES).decode("ascii", "replace").strip()
                label = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None
            extra = {"json": asdict(places["json"])} if "json" in places else {}
            name = f"{shard.name}/{entry.key}.{extension}"
            files.append(RawFile(name, places[extension], places.get(CAPTION_EXTENSION), entry.meta.get("class"), label, None, extra))
    return Listing(tuple(files), (), {}, tuple(problems))
