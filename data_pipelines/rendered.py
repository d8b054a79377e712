"""The moving-shapes set as shards: clips of `moving_shapes.draw`, lossless, with captions and the truth behind them."""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from data_pipelines import moving_shapes
from data_pipelines.errors import UserError
from data_pipelines.progress import Progress
from data_pipelines.samples import Facts
from data_pipelines.shard_set import claim, complete, write_json
from data_pipelines.shards import ShardWriter, shard_name
from data_pipelines.video import encode_mp4

FPS = 8.0
RECORD = "manifest.json"
_PARALLEL_CLIPS = 2000  # from here on starting a second process pays


@dataclass(frozen=True)
class ShapesSet:
    """Settings of a set: clips 0 .. clips - 1 of the stream `seed`, cut into shards."""

    clips: int
    seed: int
    split: moving_shapes.Split
    shard_samples: int

    @property
    def shards(self) -> int:
        """How many shards the set has."""
        return -(-self.clips // self.shard_samples)

    def numbers(self, shard: int) -> range:
        """The clips of one shard."""
        return range(shard * self.shard_samples, min(self.clips, (shard + 1) * self.shard_samples))


def render(out: Path, settings: ShapesSet, processes: int) -> None:
    """Write the shards of `settings` to `out`; complete ones are left alone. Ends with a record, `manifest.json`."""
    if settings.clips < 1 or settings.shard_samples < 1 or settings.seed < 0:
        got = f"--clips {settings.clips}, --shard-samples {settings.shard_samples}, --seed {settings.seed}"
        raise UserError(f"{got}: expected at least 1, 1 and 0")
    claim(out, {"made_by": "shapes", **asdict(settings)})
    missing = [number for number in range(settings.shards) if complete(out, number) is None]
    progress = Progress(settings.clips, "rendering", "clips")
    progress.advance(settings.clips - sum(len(settings.numbers(number)) for number in missing))
    work = partial(render_shard, out, settings)
    if processes > 1 and len(missing) > 1 and settings.clips >= _PARALLEL_CLIPS:
        with ProcessPoolExecutor(processes, mp_context=get_context("forkserver")) as pool:
            for count in pool.map(work, missing):
                progress.advance(count)
    else:
        for number in missing:
            progress.advance(work(number))
    write_json(out / RECORD, {**asdict(settings), "shards": settings.shards, "samples": settings.clips})


def render_shard(out: Path, settings: ShapesSet, shard: int) -> int:
    """Write one shard; returns how many clips it has."""
    with ShardWriter(out / shard_name(shard)) as writer:
        for number in settings.numbers(shard):
            clip = moving_shapes.draw(settings.seed, number, settings.split)
            frames, height, width, _ = clip.video.shape
            truth = {**asdict(clip.attributes), "start": clip.start}
            members = {
                "mp4": encode_mp4(clip.video, FPS, "lossless"),
                "txt": clip.caption.encode(),
                "json": json.dumps(truth, sort_keys=True).encode(),
            }
            writer.add(f"{number:08d}", members, Facts("video", frames, height, width, FPS), {})
    return len(settings.numbers(shard))
