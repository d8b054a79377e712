"""A folder of shards that we make: claimed for one set of settings, shard by shard, resumable, with a record at the end.

The unit of work is one shard with a fixed number: made anew whole, or left alone if it is complete.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines.errors import UserError
from data_pipelines.index import ShardIndex, index_path, read_index
from data_pipelines.shards import shard_name
from data_pipelines.storage import published

SETTINGS = "settings.json"


def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder `out` the place of shards made with `settings`. Raises UserError if it holds others."""
    wanted = json.loads(json.dumps(settings))
    record = out / SETTINGS
    if out.exists() and not out.is_dir():
        raise UserError(f"OUT = {str(out)!r} is a file; expected a folder, which may not exist yet")
    if record.is_file():
        if (found := _read_json(record)) != wanted:
            differing = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
            shown = "; ".join(f"{key}: there {found.get(key)!r}, now {wanted.get(key)!r}" for key in differing)
            raise UserError(f"OUT = {str(out)!r} holds shards made with other settings ({shown}); choose another folder or remove it")
        return
    if out.is_dir() and any(out.glob("*.tar")):
        raise UserError(f"OUT = {str(out)!r} holds shards that this command did not make; choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"OUT = {str(out)!r} cannot be made: {error.strerror}") from error
    write_json(record, wanted)


def complete(out: Path, number: int) -> ShardIndex | None:
    """The index of shard `number` if the shard is complete, else None."""
    shard = out / shard_name(number)
    place = Path(index_path(str(shard)))
    if not place.is_file() or not shard.is_file():
        return None
    try:
        index = read_index(str(place))
    except UserError:  # a damaged index vouches for nothing: the shard is made again
        return None
    return index if shard.stat().st_size == index.length else None


def conclude(out: Path, name: str, record: Mapping[str, Any]) -> None:
    """Write the record of a set whose shards are all complete; what killed processes left unfinished goes.

    Equal whoever writes it, so several may find the last shard complete at once.
    """
    write_json(out / name, record)
    for partial in out.glob(f".{shard_name(0)[:5]}*.partial"):
        partial.unlink(missing_ok=True)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write `record` as JSON, whole or not at all."""
    with published(path) as file:
        file.write((json.dumps(record, indent=2) + "\n").encode())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove the folder and start again") from error
    return record if isinstance(record, dict) else {}
