"""The knobs of the data path. Torch-free, so that a config error costs no import."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

Size = tuple[PositiveInt, PositiveInt, PositiveInt]
"""Frames, height, width."""

Aspect = Annotated[str, Field(pattern=r"^[1-9]\d*:[1-9]\d*$")]
"""Width : height."""


class Section(BaseModel):
    """One closed section of a run: frozen, unknown keys are errors, attribute docstrings are the reference."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Source(Section):
    path: str
    """Folder of indexed shards: raw samples, or a latent cache that `dit encode` wrote."""
    weight: PositiveFloat = 1.0
    """How often this source's samples are drawn relative to the others (an epoch sees each sample `weight` times)."""
    filter: str | None = None
    """Which samples are used, by fields of the index: `height >= 256 and aesthetic > 5 and caption_length > 0`."""


class SizeRule(Section):
    """Allowed sizes by rule: every aspect at every area and number of frames, so that every sample has a place."""

    pixels: Annotated[list[PositiveInt], Field(min_length=1)]
    """Areas of a frame, each the most that a size may have."""
    aspects: Annotated[list[Aspect], Field(min_length=1)] = ["16:9", "4:3", "1:1", "3:4", "9:16"]
    """Width : height of each."""
    max_frames: PositiveInt = 1
    """Frames are 1, 1 + frame_step, ... up to this."""
    frame_step: PositiveInt | None = None
    """None: what one latent frame of the codec covers."""
    multiple: PositiveInt | None = None
    """Sides are multiples of this. None: what codec and patch need."""


class CacheConfig(Section):
    """Copies of remote (s3://) shards on a disk of each node, made ahead of their use."""

    path: str
    """Folder on a local disk; the ranks of a node share it, and so may other runs."""
    size_gb: PositiveFloat = 100.0
    """Bound in 10^9 bytes. The least recently used copy makes room; two windows of shards should fit, what does not is read remotely."""


class ExecutorConfig(Section):
    """Where shards are made. Every executor makes the same bytes, and goes on where another was interrupted."""

    name: Literal["local", "slurm-array", "ray"] = "local"
    """local: processes of this machine; slurm-array: an array of Slurm; ray: the cluster at RAY_ADDRESS, or one of this machine."""
    processes: PositiveInt | None = None
    """Processes of this machine, or of each task of an array; null: one for each core that it may use."""
    tasks: PositiveInt = 8
    """Tasks of an array, or shards that Ray makes at a time."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of each task of Ray. Slurm takes them from slurm_options."""
    slurm_options: list[str] = []
    """Options of sbatch, such as [--partition=gpu, --gpus=1, --time=4:00:00]."""
    share: Annotated[str, Field(pattern=r"^\d+/[1-9]\d*$")] | None = None
    """I/N: make only the shards whose number is I modulo N, in this process. Tasks of an array do so."""


class DataConfig(Section):
    sources: Annotated[list[Source], Field(min_length=1)]
    """Where samples come from; several sources are mixed in one stream."""
    token_budget: PositiveInt
    """Tokens of one pack, the micro-batch of a rank: memory and step time follow from it."""
    packs_per_step: PositiveInt
    """Packs of one optimizer step over all ranks; the world size must divide it."""
    sizes: list[Size] = []
    """Allowed [frames, height, width] of raw samples; each takes the longest, then nearest in aspect. Caches carry their own."""
    size_rule: SizeRule | None = None
    """More allowed sizes, by rule; those of more tokens than token_budget are left out."""
    window_shards: PositiveInt = 16
    """Shards whose samples are shuffled together: bounds the memory of the plan."""
    cache: CacheConfig | None = None
    """Keep copies of remote shards on a local disk; null reads every sample from its remote shard."""
    num_workers: NonNegativeInt = 1
    """Loader processes of a rank; the stream does not depend on it."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Unusable samples tolerated, as a fraction of those read, before the run stops with a report (exit code 3)."""
    skip_list: str | None = None
    """Samples to leave out: the `bad_samples.jsonl` of a run, or any file of JSON lines with an `id` ("source/shard/key")."""
    sample_seconds: PositiveFloat = 30.0
    """A sample that takes longer to read and decode counts as unusable."""
    worker_gib: PositiveFloat = 4.0
    """Memory that a loader process may take; a sample that needs more counts as unusable."""
