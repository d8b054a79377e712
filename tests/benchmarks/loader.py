"""Throughput of the stream, each figure beside what it is compared with, in one run: `python tests/benchmarks/loader.py [PART ...]`.

Latents: every byte verified, checked and copied into a pack, against reading the same bytes and nothing else, and against webdataset,
which shuffles among as many samples, decodes the same members to the same tensors and yields as many at a time.
Decoding: the stream of rendered clips against the same decoder in a bare loop. Resume: time to the first step at several places.
Parts: latents, decoding, resuming, single_costs; all if none is named. Shards are written to a temporary folder (in --folder) and read
from the page cache, latents also from the disk.
"""

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
import webdataset

from data_pipelines.config import DataConfig
from data_pipelines.deadline import alarm, deadline
from data_pipelines.decode import decode
from data_pipelines.index import index_path, read_index
from data_pipelines.loader import StepStream
from data_pipelines.plan import START, Plan, Position, open_plan
from data_pipelines.raw import read_sample
from data_pipelines.rendered import ShapesSet, render
from data_pipelines.samples import Facts
from data_pipelines.shards import ShardWriter, shard_name
from data_pipelines.storage import read_into, read_members
from data_pipelines.workers import InOrder

ROUNDS = 5
SHARDS, SAMPLES = 16, 32
LATENTS, TEXT = (16, 9, 32, 32), (64, 2048)


def write_latents(folder: Path, shards: int, samples: int, shape: tuple[int, ...], text: tuple[int, ...]) -> Path:
    """Shards of latents and text embeddings in half precision."""
    folder.mkdir()
    draws = np.random.default_rng(0)
    members = {}
    for name, size in (("latents.npy", shape), ("text.npy", text)):
        buffer = io.BytesIO()
        np.save(buffer, draws.normal(size=size).astype(np.float16))
        members[name] = buffer.getvalue()
    for number in range(shards):
        with ShardWriter(folder / shard_name(number)) as shard:
            for i in range(samples):
                shard.add(f"{number}-{i}", {**members, "txt": b"a caption"}, Facts("latents", *shape[1:], None), {})
    return folder


def plan_of(folder: Path, samples_of_pack: int, tokens: int, **changes: object) -> Plan:
    """Packs of a fixed number of samples, one pack a step."""
    values = {"sources": [{"path": str(folder)}], "token_budget": samples_of_pack * tokens, "packs_per_step": 1, "num_workers": 0}
    return open_plan(DataConfig.model_validate({**values, **changes}), lambda facts: (1, 1, tokens), 0)


def stream(plan: Plan, packs: int) -> Callable[[], object]:
    """Take `packs` packs of the stream, by workers that run already where there are any."""
    steps = StepStream(plan, 0, 1)
    next(steps)
    return lambda: [len(step.packs[0].samples) for step in islice(steps, packs)]


def raw_read(tars: list[Path]) -> None:
    """Read whole files, a mebibyte at a time, and drop what was read."""
    for tar in tars:
        with tar.open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass


def raw_read_into(tars: list[Path], memory: memoryview) -> None:
    """The same into `memory`, all of it in turn, as packs need it."""
    at = 0
    for tar in tars:
        with tar.open("rb", buffering=0) as file:
            while count := file.readinto(memory[at : at + (1 << 20)]):
                at = at + count if at + count < len(memory) - (1 << 20) else 0


def read_verified(plan: Plan) -> None:
    """Ranged reads and checksums alone, in planned order, into the same memory, without arrays or packs."""
    memory = memoryview(bytearray(1 << 20))
    for sample in chain.from_iterable(chain.from_iterable(plan.packs(0, window) for window in range(plan.windows))):
        read_into(sample.shard, sample.entry.members, memory)


def array(data: bytes) -> torch.Tensor:
    """What a .npy file holds, as our stream yields it."""
    return torch.from_numpy(np.load(io.BytesIO(data)))


def web_dataset(tars: list[Path], batch: int, shuffle: int, workers: int) -> Callable[[], object]:
    """The same tensors and captions by webdataset, as lists of `batch` samples, without end; `shuffle`: samples that it shuffles among."""
    data = webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=len(tars) if shuffle else False, empty_check=False)
    decoded = (data.repeat().shuffle(shuffle) if shuffle else data.repeat()).map_dict(
        **{"latents.npy": array, "text.npy": array, "txt": lambda data: data.decode()}
    )
    packs = decoded.batched(batch, collation_fn=list, partial=False)
    loader = iter(webdataset.WebLoader(packs, batch_size=None, num_workers=workers))
    next(loader)
    return lambda: [len(pack) for pack in islice(loader, len(tars) * SAMPLES // batch)]


def forget(files: list[Path]) -> None:
    """Have the system drop its copies of the files in memory, so that whoever reads them next waits for the disk."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(
    subjects: dict[str, Callable[[], object]], before: Callable[[], object] = lambda: None
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each subject in every round, taken in turn, on the clock and of this process on a processor. before: each turn."""
    times: dict[str, list[float]] = {name: [] for name in subjects}
    worked: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(ROUNDS):
        for name, subject in subjects.items():
            before()
            began, used = time.perf_counter(), time.process_time()
            subject()
            times[name].append(time.perf_counter() - began)
            worked[name].append(time.process_time() - used)
    return times, worked


def compare(
    subjects: dict[str, Callable[[], object]], unit: str, amount: float, samples: int, before: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """`measure`, and print the medians as amounts a second, and the least processor time of this process, which other work moves less."""
    times, worked = measure(subjects, before)
    for name, seconds in times.items():
        print(f"  {name:44} {amount / statistics.median(seconds):10.1f} {unit} {1e6 * min(worked[name]) / samples:8.0f} us a sample")
    return times


def ratio(times: dict[str, list[float]], ours: str, other: str, target: str) -> None:
    """Print how many times as fast as `other` ours is, the median over rounds."""
    print(f"  {ours} / {other}: {statistics.median(b / a for a, b in zip(times[ours], times[other], strict=True)):.2f} (target {target})")


def latents(folder: Path) -> None:
    """The loader against raw reads and webdataset."""
    tars = sorted(write_latents(folder / "latents", SHARDS, SAMPLES, LATENTS, TEXT).glob("*.tar"))
    megabytes = sum(tar.stat().st_size for tar in tars) / 1e6
    packs = SHARDS * SAMPLES // 8
    inline = plan_of(folder / "latents", 8, 1)
    memory = memoryview(bytearray(int(16e6 * megabytes / SHARDS / SAMPLES)))
    print(f"latents and text, {SHARDS * SAMPLES} samples of {megabytes / SHARDS / SAMPLES:.2f} MB")
    subjects = {
        "raw read": lambda: raw_read(tars),
        "raw read, into memory of two packs in turn": lambda: raw_read_into(tars, memory),
        "ranged reads and checksums": lambda: read_verified(inline),
        "stream, no worker": stream(inline, packs),
        "stream, 1 worker": stream(plan_of(folder / "latents", 8, 1, num_workers=1), packs),
        "stream, 2 workers": stream(plan_of(folder / "latents", 8, 1, num_workers=2), packs),
        "webdataset, shuffled, no worker": web_dataset(tars, 8, SHARDS * SAMPLES, 0),
        "webdataset, shuffled, 1 worker": web_dataset(tars, 8, SHARDS * SAMPLES, 1),
        "webdataset, shuffled, 2 workers": web_dataset(tars, 8, SHARDS * SAMPLES, 2),
        "webdataset, in order, no worker": web_dataset(tars, 8, 0, 0),
    }
    times = compare(subjects, "MB/s", megabytes, SHARDS * SAMPLES)
    for workers in ("no worker", "1 worker", "2 workers"):
        ratio(times, f"stream, {workers}", "raw read", ">= 0.6")
        ratio(times, f"stream, {workers}", f"webdataset, shuffled, {workers}", ">= 3")
    ratio(times, "stream, no worker", "webdataset, in order, no worker", ">= 3")
    print("the same from the disk: the system's copies are dropped before each turn")
    readers = ("raw read", "stream, no worker", "stream, 1 worker", "stream, 2 workers", "webdataset, shuffled, 1 worker")
    times = compare({name: subjects[name] for name in readers}, "MB/s", megabytes, SHARDS * SAMPLES, lambda: forget(tars))
    for workers in ("no worker", "1 worker", "2 workers"):
        ratio(times, f"stream, {workers}", "raw read", ">= 0.6")
    ratio(times, "stream, 1 worker", "webdataset, shuffled, 1 worker", ">= 3")


def decoding(folder: Path) -> None:
    """The loader against the decoder in a bare loop over bytes in memory."""
    clips = 192
    render(folder / "clips", ShapesSet(clips, 0, "train", 64))
    entries = [(tar, e) for tar in sorted((folder / "clips").glob("*.tar")) for e in read_index(index_path(str(tar))).entries]
    media = next(name for name in entries[0][1].members if name not in ("txt", "json"))
    encoded = [read_members(str(tar), {media: entry.members[media]})[media] for tar, entry in entries]
    size = (9, 64, 64)
    plan = plan_of(folder / "clips", 8, 1, sizes=[size])
    print(f"decoding, {clips} clips of 9 x 32 x 32 ({media}), enlarged to 64 x 64")
    subjects = {
        "bare loop": lambda: [decode(data, media, size, number) for number, data in enumerate(encoded)],
        "stream, no worker": stream(plan, clips // 8),
        "stream, 1 worker": stream(plan_of(folder / "clips", 8, 1, sizes=[size], num_workers=1), clips // 8),
    }
    times = compare(subjects, "clips/s", clips, clips)
    for ours in ("stream, no worker", "stream, 1 worker"):
        ratio(times, ours, "bare loop", ">= 0.95")


def resuming(folder: Path) -> None:
    """Time from a position to its first step, with nothing planned yet: 128,000 samples, windows of 16 shards."""
    made = write_latents(folder / "many", 64, 2000, (1, 1, 1, 1), (1, 1))
    plan = plan_of(made, 32, 1, packs_per_step=4)
    began = time.perf_counter()
    plan_of(made, 32, 1, packs_per_step=4)
    print(f"resume, 128,000 samples in 64 shards: sources opened in {time.perf_counter() - began:.2f} s, then to the first step")
    last = len(plan.packs(0, plan.windows - 1))
    places = {
        "1 %": Position(0, 0, 40),
        "50 %": Position(0, 2, 0),
        "99 %": Position(0, plan.windows - 1, last - 40),
        "epoch 9": Position(9, 1, 7),
    }
    subjects: dict[str, Callable[[], object]] = {}
    for name, position in {"beginning": START, **places}.items():

        def first_step(position: Position = position) -> None:
            plan.packs.cache_clear()
            with StepStream(plan, 0, 1, position) as steps:
                next(steps)

        subjects[name] = first_step
    for name, seconds in measure(subjects)[0].items():
        print(f"  {name:44} {statistics.median(seconds):10.2f} s (fastest {min(seconds):.2f})")


def single_costs(folder: Path) -> None:
    """What a sample pays for its deadline, and what one costs that is damaged."""
    (tar,) = write_latents(folder / "damaged", 1, 200, (4, 1, 8, 8), (8, 64)).glob("*.tar")
    planned = list(chain.from_iterable(plan_of(tar.parent, 8, 1).packs(0, 0)))
    data = bytearray(tar.read_bytes())
    for sample in planned:
        data[sample.entry.members["latents.npy"].offset + 150] ^= 1
    tar.write_bytes(data)
    began = time.perf_counter()
    assert all(read_sample(sample, 30.0).error for sample in planned)
    print(f"a damaged sample: {(time.perf_counter() - began) * 1e6 / len(planned):.0f} us")
    began = time.perf_counter()
    with alarm():
        for _ in range(10_000):
            with deadline(30.0):
                pass
    print(f"deadline of one sample: {(time.perf_counter() - began) * 100:.1f} us")
    lost_process()


def lost_process() -> None:
    """From the moment at which a task ends its process to the result of the task that is done instead, by another process."""
    items = InOrder(lambda _: ending, [0, -1], 1, 2, lambda _, when: when, lambda *_: 0, preload="data_pipelines.parcels")
    next(items)
    began = time.monotonic()
    next(items)
    print(f"a task that ends its process: {(time.monotonic() - began) * 1e3:.0f} ms, the start of another one included")
    items.close()


def ending(task: int) -> int:
    """End the process at a negative task."""
    return os._exit(3) if task < 0 else task


def main() -> None:
    parts: dict[str, Callable[[Path], None]] = {part.__name__: part for part in (latents, decoding, resuming, single_costs)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--folder")
    options = parser.parse_args()
    for part in options.parts or parts:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            parts[part](Path(name))


if __name__ == "__main__":
    main()
