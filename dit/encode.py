"""`dit encode`: shards of pixels and captions -> shards of latents and text embeddings, each made once."""

import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
from torch import Tensor

from data_pipelines.errors import DataBudgetExceeded, UserError
from data_pipelines.executors import Executor, Failure
from data_pipelines.index import Entry
from data_pipelines.packed import InStep
from data_pipelines.parcels import RawPack, Task
from data_pipelines.plan import START, PlannedSample
from data_pipelines.progress import Progress
from data_pipelines.readers import read_packs
from data_pipelines.samples import Facts
from data_pipelines.shard_set import complete, conclude, write_json
from data_pipelines.shards import ShardWriter, shard_name
from data_pipelines.sizes import choose_size, expand
from data_pipelines.sources import SourceManifest, read_sources
from dit.config import Drawn, EncodeRun
from dit.config.encoders import EncodersConfig
from dit.drawn import Drawer
from dit.encoders.prepare import encode_samples
from dit.runs import Encoders, make_folder
from dit.runtime import distributed
from dit.stream import CACHE_FILE, DONE_FILE, preprocessing

TOO_SHORT = "shorter than any of `sizes`"
"""Why a sample is left out that can be read."""


def main(run: EncodeRun) -> int:
    """Write one latent shard for each shard of the sources; complete ones are kept, and ranks and tasks share the rest.

    Whoever finds the last shard complete writes the record.
    """
    if run.executor.name == "local":
        distributed.init()  # and not else: what it puts into the environment would reach the tasks
    out = make_folder(run.out, "out")
    executor = Executor(run.executor, (sys.executable, "-m", "dit", *sys.argv[1:], "executor.name=local", "executor.share="))
    shards = [shard for source in _sources(run) for shard in source.shards]
    own = [number for number in range(len(shards)) if executor.owns(number)]
    if run.executor.name == "local":
        try:
            encode_shards(run, own)
        except UserError as error:
            executor.note(out, [Failure(str(number), error.exit_code, str(error)) for number in own if complete(out, number) is None])
            raise
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"executor.name={run.executor.name} starts processes of its own: start it in one process, without a launcher")
    else:
        missing = [number for number in own if complete(out, number) is None]
        if not missing:
            encode_shards(run, [])  # whether the cache that is complete is the one asked for
        progress = Progress(len(missing), "encoding", "shards")
        for _ in executor.run(partial(encode_shard, run), missing, lambda number: complete(out, number) is not None, out):
            progress.advance()
    indexes = (complete(out, number) for number in range(len(shards)))
    made = [index for index in takewhile(bool, indexes) if index]  # looks no further than the first that is missing
    if len(made) == len(shards):
        summary = {"shards": len(made), "samples": sum(len(index.entries) for index in made)}
        conclude(out, DONE_FILE, summary | {"left_out": sum(len(index.problems) for index in made)})
    return 0


def encode_shard(run: EncodeRun, number: int) -> None:
    """Write the latent shard with this number. Processes that make several load the encoders once."""
    encode_shards(run, [number])


def encode_shards(run: EncodeRun, numbers: Sequence[int]) -> None:
    """Write the latent shards with these numbers that are not complete; processes share them, and none waits for another at the end.

    Raises UserError if the cache was begun otherwise.
    """
    out, sources, drawer = Path(run.out), _sources(run), _drawer(run.drawn) if run.drawn else None
    encoders = drawer.encoders if drawer else _encoders(run.encoders)
    check_size = drawer.check_size if drawer else encoders.latent_size
    for index, size in enumerate(run.sizes):
        check_size(size, f"sizes.{index}")
    if run.size_rule is not None:
        group, *sides = encoders.latents.stride
        by_rule = expand(run.size_rule, (1, group), (sides[0], sides[1]), "size_rule")
        for size in by_rule:
            check_size(size, "size_rule")
        run = run.model_copy(update={"sizes": sorted({*run.sizes, *by_rule})})
    shards = [(source, shard) for source in sources for shard in source.shards]
    _claim(out, run, encoders, drawer, sources)
    missing = distributed.on_first(lambda: [number for number in numbers if complete(out, number) is None])
    rest = [(number, *shards[number]) for number in missing[distributed.rank() :: distributed.world_size()]]
    is_first = distributed.rank() == 0
    distributed.shutdown()  # shards may take hours, and one process far longer than another
    if is_first and len(missing) < len(numbers):
        print(f"{len(numbers) - len(missing)} of {len(numbers)} shards are complete in {out}")
    for source in sources if is_first and rest else ():
        for reason, count in source.dropped.items():
            print(f"{source.name}: {count} samples left out by {reason}")
    if is_first and drawer and rest:
        print(f"latents are drawn by {drawer.opened.trained.path}, step {drawer.opened.step}: {drawer.opened.sampling}")
    plans = [_plan(run, source.name, shard.name, shard.address, source.entries(shard)) for _, source, shard in rest]
    progress = Progress(sum(map(len, plans)), "encoding", "samples of this process", silent=not is_first)
    packs = read_packs(_tasks(plans, run.batch_size), run.num_workers if rest else 0)
    bad: list[tuple[str, str]] = []
    for (number, _, _), plan in zip(rest, plans, strict=True):
        bad += _encode_shard(run, encoders, drawer, plan, packs, out / shard_name(number), progress)
        unreadable = [(name, reason) for name, reason in bad if reason != TOO_SHORT]
        if len(unreadable) > run.max_bad_fraction * max(progress.done, 1000):
            raise DataBudgetExceeded(
                f"{len(unreadable)} of {progress.done} samples could not be read (max_bad_fraction={run.max_bad_fraction}), "
                f"the last: {unreadable[-1]}"
            )
    packs.close()
    for name, reason in bad[:10]:
        print(f"left out {name}: {reason}")
    if bad:
        print(f"left out {len(bad)} samples in all; the index of each shard names them")


@cache
def _drawer(config: Drawn) -> Drawer:
    return Drawer.load(config)


@cache
def _encoders(config: EncodersConfig) -> Encoders:
    return Encoders.load(config, distributed.device())


def _sources(run: EncodeRun) -> tuple[SourceManifest, ...]:
    """Raises UserError for a source that holds latents already."""
    sources = read_sources(run.sources, config_key="sources")
    for number, source in enumerate(sources):
        if any(facts.kind == "latents" for facts in source.facts):
            raise UserError(f"sources[{number}].path={run.sources[number].path} is a latent cache: expected shards of pictures or videos")
    return sources


def _tasks(plans: Sequence[Sequence[PlannedSample]], batch: int) -> Iterator[Task]:
    """The samples that have a size, shard by shard, as packs of at most `batch`; each task has its own number."""
    number = 0
    for plan in plans:
        readable = iter([planned for planned in plan if planned.size])
        while pack := tuple(islice(readable, batch)):
            yield Task(number, pack, InStep(0, len(pack), 0), START, {})
            number += 1


def _plan(run: EncodeRun, source: str, shard: str, address: str, entries: Iterable[Entry]) -> list[PlannedSample]:
    """What to read of a shard, in its order; a sample without a size fits none of `sizes`."""
    return [
        PlannedSample(
            f"{source}/{shard}/{entry.key}",
            address,
            entry,
            choose_size(entry.facts.frames, entry.facts.height, entry.facts.width, run.sizes),
            (0, 0, 0),
            0,
            0,
            0,
        )
        for entry in entries
    ]


def _encode_shard(
    run: EncodeRun,
    encoders: Encoders,
    drawer: Drawer | None,
    plan: list[PlannedSample],
    packs: Iterator[tuple[Task, RawPack]],
    path: Path,
    progress: Progress,
) -> list[tuple[str, str]]:
    """Encode one shard; returns (id, reason) of the samples that are left out."""
    dtype = np.dtype(run.dtype)
    bad = [(planned.id, TOO_SHORT) for planned in plan if planned.size is None]
    readable = sum(planned.size is not None for planned in plan)
    with ShardWriter(path) as writer:
        for task, pack in islice(packs, -(-readable // run.batch_size)):
            progress.advance(len(pack.samples))
            bad += [(sample.id, sample.error) for sample in pack.samples if sample.error]
            good = [(item, sample) for item, sample in zip(task.pack, pack.samples, strict=True) if not sample.error]
            if not good:
                continue
            samples = [sample for _, sample in good]
            texts = encoders.text.encode([sample.caption for sample in samples])
            sizes = [item.size for item, _ in good if item.size is not None]
            latents = drawer(samples, texts, sizes) if drawer else encode_samples(samples, encoders.latents)
            for (item, sample), array, text in zip(good, latents, texts, strict=True):
                assert array is not None
                members = {"latents.npy": _npy(array, dtype), "text.npy": _npy(text, dtype), "txt": sample.caption.encode()}
                _, t, h, w = array.shape
                writer.add(
                    item.entry.key, members, Facts("latents", t, h, w, None), {} if sample.label is None else {"label": sample.label}
                )
        for name, reason in bad:
            writer.leave_out(name, reason)
    return bad


def _claim(out: Path, run: EncodeRun, encoders: Encoders, drawer: Drawer | None, sources: Sequence[SourceManifest]) -> None:
    """Write what the cache depends on, or check that the cache which exists was begun with the same."""
    claim = {
        "latents": encoders.latents.fingerprint(),
        "text": encoders.text.fingerprint(),
        "drawn": drawer and drawer.fingerprint(),
        "preprocessing": preprocessing(),
        "sizes": [list(size) for size in run.sizes],
        "dtype": run.dtype,
        "sources": [[source.path, manifest.hash] for source, manifest in zip(run.sources, sources, strict=True)],  # shards are numbered on
    }
    path = out / CACHE_FILE
    begun = json.loads(path.read_text()) if path.is_file() else None
    if begun and isinstance(begun["sources"], dict):  # as it was written before
        begun["sources"] = [list(pair) for pair in begun["sources"].items()]
    distributed.barrier()  # every rank has looked before one writes
    if begun is not None:
        different = [key for key, value in claim.items() if begun.get(key) != value]
        if different:
            lines = "\n".join(f"  {key}: {begun.get(key)} there, {claim[key]} here" for key in different)
            raise UserError(f"out={out} holds a cache that was made differently:\n{lines}\nGive another `out`, or delete that folder")
    elif distributed.rank() == 0:
        write_json(path, claim)


def _npy(tensor: Tensor, dtype: np.dtype) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, tensor.cpu().numpy().astype(dtype))
    return buffer.getvalue()
