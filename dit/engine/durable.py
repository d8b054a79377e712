"""Folders that are either complete or not there, and that prove their contents: `step-00000500/` with a manifest written last.

Owns names, checksums, publishing and retention. Knows nothing of what the files hold. Files of a folder are written into a hidden one
beside it and flushed; then the manifest; then one rename publishes them all. A folder is valid if every file that its manifest
names has the length and the checksum that it says, and the manifest its own.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from data_pipelines.errors import UserError
from dit.runtime import faults

MANIFEST = "manifest.json"
FORMAT = 1
"""Of manifest, state and names of tensors. Whoever changes it keeps reading what tests/dit/engine/format-1 holds."""
Entry = dict[str, Any]
"""One file of a manifest: name, length, xxh3_64."""


def step_folder(root: Path, step: int) -> Path:
    """Where `root` keeps `step`."""
    return root / f"step-{step:08d}"


def published(root: Path) -> list[int]:
    """Steps that have a folder in `root`, newest first, valid or not. Found by scan: a pointer file can lie."""
    if not root.is_dir():
        return []
    names = (re.fullmatch(r"step-(\d{8,})", entry.name) for entry in root.iterdir())
    return sorted((int(match[1]) for match in names if match), reverse=True)


def stage(root: Path, step: int) -> Path:
    """An empty hidden folder for the files of `step`; what crashed saves have left is deleted."""
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(".*step-*"):
        shutil.rmtree(left)
    folder = root / staging_name(step)
    folder.mkdir()
    return folder


def recover(root: Path) -> None:
    """Give back its name to a folder that was being replaced when the writer was killed. For the one writer of `root`."""
    for replaced in root.glob(".replaced-step-*"):
        if not (final := root / replaced.name.removeprefix(".replaced-")).exists():
            replaced.rename(final)


def staging_name(step: int) -> str:
    """Name of the hidden folder in which `step` is written."""
    return f".writing-step-{step:08d}"


def seal(path: Path) -> Entry:
    """Flush the file at `path` to the disk and describe it for the manifest."""
    _flush(path)
    return {"name": path.name, "length": path.stat().st_size, "xxh3_64": checksum(path)}


def publish(staged: Path, root: Path, step: int, entries: Sequence[Entry]) -> Path:
    """Write the manifest of the sealed files of `staged`, flush, and make the folder appear under its name in one rename."""
    faults.point("save.sealed")
    with naming(staged / MANIFEST):
        files = sorted(entries, key=lambda entry: str(entry["name"]))
        (staged / MANIFEST).write_bytes(_sealed({"format": FORMAT, "step": step, "files": files}))
    _flush(staged / MANIFEST)
    _flush(staged)
    faults.point("save.manifested")
    return appear(staged, root, step)


def appear(staged: Path, root: Path, step: int) -> Path:
    """Give the complete folder `staged` its name, in place of any that has it; returns its path."""
    final = step_folder(root, step)
    if final.exists():  # left by an earlier run of the same step: an invalid one, or a resume behind it
        final.rename(root / f".replaced-{final.name}")
    staged.rename(final)
    _flush(root)
    faults.point("save.published")
    shutil.rmtree(root / f".replaced-{final.name}", ignore_errors=True)
    hint = root / ".latest"
    hint.write_text(final.name + "\n")
    hint.replace(root / "latest")
    return final


def problems(folder: Path, share: int = 0, shares: int = 1) -> list[str]:
    """Why `folder` is not valid: one line a file, nothing if it is. Reads every `shares`-th file from number `share` on.

    Raises UserError if it is intact and of another format: neither damage nor a reason to take an older one.
    """
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as error:
        return [f"{path}: {error.strerror}"]
    try:
        manifest = json.loads(data)
        canonical = _sealed({name: value for name, value in manifest.items() if name != "xxh3_64"})
    except (ValueError, AttributeError, RecursionError) as error:
        return [f"{path}: unreadable ({error})"]
    if data != canonical:
        return [f"{path}: its checksum does not match its contents"]
    if (found := manifest.get("format")) != FORMAT:
        raise UserError(
            f"{path}: a checkpoint of format {found}, expected format {FORMAT}, which this release reads and writes. It is intact: go on "
            "with the release that wrote it, or give another `out`"
        )
    try:
        step, entries = int(manifest["step"]), [{key: entry[key] for key in ("name", "length", "xxh3_64")} for entry in manifest["files"]]
        if outside := [entry["name"] for entry in entries if Path(entry["name"]).name != entry["name"]]:
            return [f"{path}: names files of other folders: {outside}"]
    except (ValueError, KeyError, TypeError) as error:
        return [f"{path}: unreadable ({error})"]
    if folder.name not in (step_folder(folder, step).name, staging_name(step)):
        return [f"{path}: written for step {step}"]
    return [problem for entry in entries[share::shares] if (problem := _file_problem(folder / str(entry["name"]), entry))]


def retain(root: Path, keep: int, newest_valid: int, every: int | None = None) -> list[int]:
    """Delete all but the newest `keep` steps of `root` and multiples of `every`, and never `newest_valid`; returns what was deleted."""
    doomed = superfluous(published(root), keep, newest_valid, every)
    for step in doomed:
        folder = step_folder(root, step)
        hidden = folder.rename(root / f".deleting-{folder.name}")  # never half a folder under a name that counts
        shutil.rmtree(hidden)
    return doomed


def superfluous(steps: Sequence[int], keep: int, newest_valid: int, every: int | None) -> list[int]:
    """Which of `steps`, newest first, retention deletes."""
    return [step for step in steps[keep:] if step != newest_valid and (every is None or step % every)]


def checksum(path: Path) -> str:
    """xxh3_64 of a file, as hexadecimal digits."""
    digest, block = xxhash.xxh3_64(), memoryview(bytearray(1 << 20))  # as much as stays in the processor's cache
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def _sealed(body: dict[str, Any]) -> bytes:
    """The only bytes that say this: a manifest with any bit changed is not one. The same in every format."""
    sealed = body | {"xxh3_64": xxhash.xxh3_64_hexdigest(json.dumps(body, sort_keys=True).encode())}
    return (json.dumps(sealed, sort_keys=True, indent=1) + "\n").encode()


def _file_problem(path: Path, entry: Entry) -> str | None:
    try:
        length = path.stat().st_size
        if length != entry["length"]:
            return f"{path}: {length} bytes, its manifest says {entry['length']}"
        return None if checksum(path) == entry["xxh3_64"] else f"{path}: its checksum does not match"
    except OSError as error:
        return f"{path}: {error.strerror}"


def _flush(path: Path) -> None:
    """Have a file or a folder on the disk."""
    with naming(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Say of errors of the disk inside that they are of `path`: those of a descriptor do not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
