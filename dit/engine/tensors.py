"""Tensors in files: written in the safetensors format with a checksum on the way, read by address from any number of files."""

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from safetensors import safe_open
from torch import Tensor

from dit.engine import durable
from dit.runtime import faults

BLOCK = 1 << 24
"""Bytes written at a time."""


def write(path: Path, tensors: Mapping[str, Tensor]) -> durable.Entry:
    """Write 1-D float32 `tensors` to `path` in the safetensors format, flush, and describe the file for the manifest.

    The checksum is of what was to be written, so that a file which the disk has changed is found.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh3_64(len(text).to_bytes(8, "little") + text)
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as hasher:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, tensor in enumerate(tensors.values()):
            if number == len(tensors) // 2:
                faults.point("save.half_written")
            array: Any = tensor.detach().cpu().contiguous().numpy()
            data = memoryview(array).cast("B")
            for start in range(0, len(data), BLOCK):
                block = data[start : start + BLOCK]
                hashed = hasher.submit(digest.update, block)  # beside the write; both let go of the interpreter
                written = file.write(block)
                hashed.result()
                if written != len(block):
                    raise OSError(f"{path}: only {written} of {len(block)} bytes could be written")
        os.fsync(file.fileno())
        return {"name": path.name, "length": file.tell(), "xxh3_64": digest.hexdigest()}


class Piece(NamedTuple):
    """Elements [start, start + size) of a flattened parameter, under `key` of an open file."""

    file: Any
    key: str
    start: int
    size: int


class Pieces:
    """All tensors of a checkpoint folder, found by kind and parameter. A context."""

    def __init__(self, folder: Path) -> None:
        self.files = [safe_open(path, framework="pt") for path in sorted(folder.glob("rank-*.safetensors"))]
        self.by_name: dict[tuple[str, str], list[Piece]] = {}

    def __enter__(self) -> "Pieces":
        for file in self.files:
            file.__enter__()
            for key in file.keys():  # noqa: SIM118 (not a dict)
                address, start = key.rsplit("@", 1)
                kind, name = address.split("/", 1)
                size = file.get_slice(key).get_shape()[0]
                self.by_name.setdefault((kind, name), []).append(Piece(file, key, int(start), size))
        return self

    def __exit__(self, *error: Any) -> None:
        for file in self.files:
            file.__exit__(*error)

    @property
    def kinds(self) -> set[str]:
        """The kinds that are here."""
        return {kind for kind, _ in self.by_name}

    def covered(self, kind: str, name: str, start: int, size: int) -> int:
        """How many elements of [start, start + size) of a flattened parameter are here."""
        pieces = self.by_name.get((kind, name), [])
        return sum(max(0, min(p.start + p.size, start + size) - max(p.start, start)) for p in pieces)

    def copy(self, kind: str, name: str, start: int, target: Tensor) -> int:
        """Fill `target` (size,), elements from `start` on of a flattened parameter; returns how many were here."""
        for p in self.by_name.get((kind, name), []):
            low, high = max(p.start, start), min(p.start + p.size, start + target.numel())
            if low < high:
                target[low - start : high - start].copy_(p.file.get_slice(p.key)[low - p.start : high - p.start])
        return self.covered(kind, name, start, target.numel())
