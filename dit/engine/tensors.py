"""Tensors in files: written in the safetensors format with a checksum on the way, read by address from any number of files."""

import errno
import json
import os
from collections.abc import Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import xxhash
from torch import Tensor

from data_pipelines.errors import NoValidCheckpoint
from dit.engine import durable
from dit.runtime import faults

BLOCK, FLUSH = 1 << 24, 1 << 25
"""Bytes written at a time, and bytes after which the disk begins to take them, while more are written."""


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
    with durable.naming(path), path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as disk:
        out = _Out(file, hasher, disk)
        out.write(memoryview(len(text).to_bytes(8, "little") + text))
        for number, tensor in enumerate(tensors.values()):
            if number == len(tensors) // 2:
                faults.point("save.half_written")
            data = _bytes_of(tensor.detach().cpu().contiguous())
            for start in range(0, len(data), BLOCK):
                out.write(data[start : start + BLOCK])
        out.flushed.result()
        os.fsync(file.fileno())
        return {"name": path.name, "length": file.tell(), "xxh3_64": out.digest.hexdigest()}


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous `tensor` on the CPU."""
    array: Any = tensor.numpy()
    return memoryview(array).cast("B")


class _Out:
    """A file that is hashed and flushed by two threads while a third writes on; all three let go of the interpreter."""

    def __init__(self, file: Any, hasher: Executor, disk: Executor) -> None:
        self.file, self.hasher, self.disk, self.digest = file, hasher, disk, xxhash.xxh3_64()
        self.unflushed = 0
        self.flushed: Future[None] = disk.submit(lambda: None)

    def write(self, data: memoryview) -> None:
        """Write all of `data`. Raises OSError if the disk does not take it, or has not taken what was written before."""
        hashed = self.hasher.submit(self.digest.update, data)
        written = 0
        while written < len(data):
            written += self.file.write(data[written:])
        hashed.result()
        self.unflushed += written
        if self.unflushed >= FLUSH and self.flushed.done():
            self.flushed.result()  # an error is told once: not by the last fsync again
            self.flushed, self.unflushed = self.disk.submit(os.fdatasync, self.file.fileno()), 0


class Piece(NamedTuple):
    """Elements [start, start + size) of a flattened parameter, from byte `place` of `file` on."""

    file: BinaryIO
    place: int
    start: int
    size: int


class Pieces:
    """All tensors of a checkpoint folder, which must be valid, found by kind and parameter. A context."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("rank-*.safetensors"))
        self.by_name: dict[tuple[str, str], list[Piece]] = {}

    def __enter__(self) -> "Pieces":
        with ExitStack() as files:
            for path in self.paths:
                file = files.enter_context(path.open("rb"))
                try:
                    self._note(file, path.stat().st_size)
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    raise NoValidCheckpoint(f"{path} is as its manifest says, but no safetensors file of a checkpoint: {error!r}") from None
            self._files = files.pop_all()
        return self

    def _note(self, file: BinaryIO, size: int) -> None:
        """Note what is in a file of `size` bytes."""
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        for key, entry in json.loads(file.read(length)).items():
            address, start = key.rsplit("@", 1)
            kind, name = address.split("/", 1)
            piece = Piece(file, 8 + length + entry["data_offsets"][0], int(start), entry["shape"][0])
            self.by_name.setdefault((kind, name), []).append(piece)

    def __exit__(self, *error: Any) -> None:
        self._files.close()

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
                _read(p.file, p.place + 4 * (low - p.start), target[low - start : high - start])
        return self.covered(kind, name, start, target.numel())


def _read(file: BinaryIO, place: int, target: Tensor) -> None:
    """Fill the float32 vector `target` from byte `place` of `file` on: straight into its memory, if the CPU can reach it."""
    is_here = target.device.type == "cpu" and target.is_contiguous() and target.dtype == torch.float32
    host = target.detach() if is_here else torch.empty(target.shape)
    data, done = _bytes_of(host), 0
    with durable.naming(Path(file.name)):
        while done < len(data):  # a call reads 2 GiB at most
            if (count := os.preadv(file.fileno(), [data[done:]], place + done)) == 0:
                raise OSError(errno.EIO, "it ends too early, though it was verified")
            done += count
    if not is_here:
        target.copy_(host)
