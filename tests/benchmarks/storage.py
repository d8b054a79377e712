"""Shards against plain tools, side by side in one run: `python -m tests.benchmarks.storage [--megabytes 200] [--rounds 5]`.

Writing against `tar` from the same files, indexing against reading, remote reads with and without the cache against local ones (needs
rclone, `python -m tests.rclone`). Rounds alternate; the table has medians. All files are in the page cache.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import webdataset

from data_pipelines.cache import ShardCache
from data_pipelines.decode import encode_png
from data_pipelines.foreign import index_all, index_foreign
from data_pipelines.index import index_path, read_index
from data_pipelines.samples import Facts
from data_pipelines.shards import ShardWriter
from data_pipelines.sources import read_source
from data_pipelines.storage import read_into
from tests.rclone import BINARY, KEY, SECRET, S3Server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dit-benchmark-") as folder:
        for size in (20_000, 200_000, 2_000_000):
            writing(Path(folder) / f"files-{size}", size, options.megabytes, options.rounds)
        indexing(Path(folder), options.megabytes, options.rounds)
        if BINARY.is_file():
            remote(Path(folder), options.rounds)


def table(title: str, work: dict[str, Callable[[], float]], rounds: int, before: Sequence[Path] = ()) -> None:
    """Print the median MB/s of each, and its ratio to the first; each function returns MB. The files `before` are removed each time."""
    rates: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, function in work.items():
            for stale in before:
                stale.unlink(missing_ok=True)
            start = time.perf_counter()
            amount = function()
            rates[name].append(amount / (time.perf_counter() - start))
    print(f"\n{title}\n\n| | MB/s | ratio |\n|---|---|---|")
    first = statistics.median(next(iter(rates.values())))
    for name, values in rates.items():
        print(f"| {name} | {statistics.median(values):.4g} | {statistics.median(values) / first:.2f} |", flush=True)


def writing(files: Path, size: int, megabytes: int, rounds: int) -> None:
    """Write samples of one file of `size` bytes and a caption from a folder of files."""
    files.mkdir()
    draw, count = np.random.default_rng(0), max(10, megabytes * 1_000_000 // size)
    for i in range(count):
        (files / f"{i:06d}.png").write_bytes(draw.bytes(size))
        (files / f"{i:06d}.txt").write_text(f"caption {i}")
    listing = files.parent / "names"
    listing.write_text("".join(f"{i:06d}.{x}\n" for i in range(count) for x in ("png", "txt")))
    total = count * size / 1e6
    out = files.parent / "written.tar"

    def tar(*sync: str) -> float:
        subprocess.run(["tar", "-C", str(files), "-cf", str(out), "-T", str(listing)], check=True)
        if sync:
            subprocess.run([*sync, str(out)], check=True)
        return total

    def ours() -> float:
        with ShardWriter(out) as shard:
            for i in range(count):
                members = {x: (files / f"{i:06d}.{x}").read_bytes() for x in ("png", "txt")}
                shard.add(f"{i:06d}", members, Facts("image", 1, 8, 8, None), {})
        return total

    def theirs() -> float:
        with webdataset.TarWriter(str(out)) as writer:
            for i in range(count):
                writer.write({"__key__": f"{i:06d}", **{x: (files / f"{i:06d}.{x}").read_bytes() for x in ("png", "txt")}})
        return total

    held = [{x: (files / f"{i:06d}.{x}").read_bytes() for x in ("png", "txt")} for i in range(count)]

    def from_memory() -> float:
        with ShardWriter(out) as shard:
            for i, members in enumerate(held):
                shard.add(f"{i:06d}", members, Facts("image", 1, 8, 8, None), {})
        return total

    work = {
        "`tar`, then sync (ours does)": lambda: tar("sync"),
        "`tar`": tar,
        "ShardWriter": ours,
        "ShardWriter, of what is in memory": from_memory,
        "webdataset.TarWriter": theirs,
    }
    table(f"Writing {count} samples of {size // 1000} kB and a caption from files", work, rounds, [out])
    shutil.rmtree(files)
    out.unlink()


def indexing(folder: Path, megabytes: int, rounds: int) -> None:
    """Index foreign tars of PNG pictures."""
    picture = encode_png(np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8))
    shards = [folder / f"theirs-{i}.tar" for i in range(4)]
    for shard in shards:
        with webdataset.TarWriter(str(shard)) as writer:
            for i in range(megabytes * 1_000_000 // len(picture) // len(shards)):
                writer.write({"__key__": f"{i:06d}", "png": picture, "txt": f"caption {i}"})
    sizes = {str(shard): shard.stat().st_size for shard in shards}
    more = {shutil.copy(shard, f"{shard}-{i}.tar"): size for shard, size in sizes.items() for i in range(3)}
    total = sum(sizes.values()) / 1e6

    def each(function: Callable[[Path], object]) -> Callable[[], float]:
        return lambda: [function(shard) for shard in shards] and total

    def members(shard: Path) -> int:
        with tarfile.open(shard) as tar:
            return len(tar.getmembers())

    def parallel() -> float:
        index_all({**sizes, **more}, lambda address: Path(index_path(address)).is_file())
        return total * 4

    work = {
        "read": each(lambda shard: len(shard.read_bytes())),
        "tarfile: names only": each(members),
        "index, one process": each(index_foreign),
        f"index, {len(os.sched_getaffinity(0))} processes and their start, 4 times the data": parallel,
    }
    table(f"Indexing 4 foreign tars, {total:.0f} MB of PNGs of {len(picture) // 1000} kB", work, rounds)


def remote(folder: Path, rounds: int) -> None:
    """Read 500 samples of 50 kB at random from a shard."""
    buckets = folder / "buckets"
    (buckets / "b").mkdir(parents=True)
    path = buckets / "b" / "shard.tar"
    draw = np.random.default_rng(0)
    with ShardWriter(path) as shard:
        for i in range(500):
            shard.add(f"{i:04d}", {"png": draw.bytes(50_000), "txt": b"caption"}, Facts("image", 1, 8, 8, None), {})
    os.environ |= {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    with S3Server(buckets, "1h") as server:
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.port}"
        source = read_source("s3://b")
        address = source.shards[0].address
        index = read_index(index_path(str(path)))
        entries = [index.entries[i] for i in draw.permutation(len(index.entries))]
        cache = ShardCache(folder / "cache", 10**10)
        cache.folder.mkdir()
        (cache.folder / ".lock").touch()

        def copy() -> float:
            shutil.rmtree(cache.folder)
            cache.folder.mkdir()
            (cache.folder / ".lock").touch()
            pin = cache.pin(address, index, threading.Event())
            assert pin is not None
            pin.close()
            return index.length / 1e6

        memory = memoryview(bytearray(1 << 20))

        def read(function: Callable[..., object], place: str) -> Callable[[], float]:
            return lambda: [function(place, entry.members, memory) for entry in entries] and len(entries) * 50_000 / 1e6

        work = {
            "local shard": read(read_into, str(path)),
            "copy of the shard into the cache, verified": copy,
            "remote shard, in the cache": read(cache.read_into, address),
            "remote shard, one request a sample": read(read_into, address),
        }
        table("Reading 500 verified samples of 50 kB at random, S3 server on loopback", work, rounds)


if __name__ == "__main__":
    main()
