"""The moving-shapes set as shards: clips of `moving_shapes.draw`, lossless, with captions and the truth behind them."""

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from data_pipelines import moving_shapes
from data_pipelines.errors import UserError
from data_pipelines.executors import LOCAL, Executor
from data_pipelines.progress import Progress
from data_pipelines.samples import Facts
from data_pipelines.shard_set import claim, complete, conclude
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


def render(out: Path, settings: ShapesSet, executor: Executor = LOCAL) -> bool:
    """Write the shards of `settings` to `out`; complete ones are left alone. Ends with a record, `manifest.json`.

    Returns whether all are complete: a share of them may be left to others.
    """
    if settings.clips < 1 or settings.shard_samples < 1 or settings.seed < 0:
        got = f"--clips {settings.clips}, --shard-samples {settings.shard_samples}, --seed {settings.seed}"
        raise UserError(f"{got}: expected at least 1, 1 and 0")
    claim(out, {"made_by": "shapes", **asdict(settings)})
    own = [number for number in range(settings.shards) if executor.owns(number)]
    missing = [number for number in own if complete(out, number) is None]
    progress = Progress(sum(len(settings.numbers(number)) for number in own), "rendering", "clips")
    progress.advance(sum(len(settings.numbers(number)) for number in set(own) - set(missing)))
    work, pays = partial(render_shard, out, settings), settings.clips >= _PARALLEL_CLIPS
    for number in executor.run(work, missing, lambda number: complete(out, number) is not None, out, pays=pays):
        progress.advance(len(settings.numbers(number)))
    if any(complete(out, number) is None for number in range(settings.shards)):
        return False
    conclude(out, RECORD, {**asdict(settings), "shards": settings.shards, "samples": settings.clips})
    return True


def render_shard(out: Path, settings: ShapesSet, shard: int) -> None:
    """Write one shard."""
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
