"""Manifests: tables of files with captions, in CSV, JSON lines or Parquet.

A row names a file by `path`, relative to the manifest or absolute, and may have `caption`, `class`, `label` (a whole number),
`start` and `end` (seconds of a video). Other columns are kept with the sample.
"""

import csv
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipelines.errors import UserError
from data_pipelines.extras import optional
from data_pipelines.foreign import Problems
from data_pipelines.raw_files import MEDIA_EXTENSIONS, Listing, Place, RawFile, named_class
from data_pipelines.samples import MAX_CAPTION_BYTES, BadSample

_NAMES = {"path": ("path", "file", "video", "image"), "caption": ("caption", "text")}
_MAX_EXTRA_BYTES = 1 << 16  # of all further columns of a row
_MAX_SHOWN = 40  # characters of a value in a reason
_FOREVER = 1e9  # seconds; JSON has no infinity
_MAX_LINE = 4 << 20  # characters; a longer line is read in parts, none of which is JSON

Row = Mapping[str, Any]


def list_manifest(path: Path) -> Listing:
    """The files of a manifest; a row that cannot be used is a problem that names its number. Raises UserError."""
    readers = {".csv": _csv, ".jsonl": _json_lines, ".parquet": _parquet}
    rows = readers[path.suffix.lower()](path)
    problems: Problems = []
    files: dict[str, RawFile] = {}
    try:
        for number, row in enumerate(rows, 1):
            try:
                file = _file(path.absolute().parent, row)
                if file.name in files:
                    raise BadSample("the same file and span twice, the first is used")
                files[file.name] = file
            except BadSample as error:
                problems.append((f"{path.name} row {number}", error.reason))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"SRC = {str(path)!r}: cannot be read ({error}); expected UTF-8 text") from error
    if not files and any("no path" in reason for _, reason in problems):
        raise UserError(f"SRC = {str(path)!r}: no row names a file; expected a column named {' or '.join(_NAMES['path'])}")
    return Listing(tuple(files.values()), (), {}, tuple(problems))


def _file(folder: Path, row: Row) -> RawFile:
    named = {field: next((row[name] for name in names if row.get(name) not in (None, "")), None) for field, names in _NAMES.items()}
    if not isinstance(named["path"], str) or "\0" in named["path"]:
        raise BadSample("row with no path")
    path = folder / named["path"]
    if path.suffix[1:].lower() not in MEDIA_EXTENSIONS:
        raise BadSample(f"file of another kind ({path.suffix or 'no extension'})")
    if not path.is_file():
        raise BadSample("no such file" if not path.exists() else "not a regular file")
    caption, label = named["caption"], row.get("label")
    if caption is not None and (not isinstance(caption, str) or len(caption) > MAX_CAPTION_BYTES):
        raise BadSample("caption is not a text of at most 1 MiB")
    start, end = _seconds(row.get("start"), 0.0), _seconds(row.get("end"), math.inf)
    span = None if (start, end) == (0.0, math.inf) else (start, min(end, _FOREVER))
    if span and not span[0] < span[1]:
        raise BadSample(f"start {start} is not before end {end}")
    taken = {*_NAMES["path"], *_NAMES["caption"], "class", "label", "start", "end"}
    extra = {key: value for key, value in row.items() if isinstance(key, str) and key not in taken and value not in (None, "")}
    if len(json.dumps(extra, default=str)) > _MAX_EXTRA_BYTES:
        raise BadSample("further columns of more than 64 KiB")
    name = named["path"]
    if span is not None:
        until = "end" if span[1] == _FOREVER else f"{span[1]:g}"
        name = f"{name.rpartition('.')[0]}@{span[0]:g}-{until}{path.suffix}"
    number = None if label in (None, "") else _whole(label)
    further = json.loads(json.dumps(extra, default=str))
    return RawFile(name, Place(str(path)), caption, named_class(row.get("class")), number, span, further)


def _seconds(value: Any, default: float) -> float:
    try:
        number = default if value in (None, "") else float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadSample(f"start or end is {_shown(value)}, expected seconds") from error
    if math.isnan(number) or number < 0:
        raise BadSample(f"start or end is {_shown(value)}, expected seconds")
    return number


def _whole(value: Any) -> int:
    try:
        number = int(value)
        whole = number >= 0 and number == float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadSample(f"label is {_shown(value)}, expected a whole number") from error
    if not whole:
        raise BadSample(f"label is {_shown(value)}, expected a whole number from 0")
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(MAX_CAPTION_BYTES)
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        while line := file.readline(_MAX_LINE):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):  # also an integer of 5000 digits
                    row = None
                yield row if isinstance(row, dict) else {}


def _parquet(path: Path) -> Iterator[Row]:
    parquet = optional("pyarrow.parquet", "a parquet manifest")
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except optional("pyarrow", "a parquet manifest").ArrowException as error:
        raise UserError(f"SRC = {str(path)!r}: not a readable parquet file ({error})") from error
