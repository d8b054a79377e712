"""The five roots of the configuration, one a verb. Every knob of the system is in this folder or in data_pipelines/config.py."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from data_pipelines.config import DataConfig, Section, Size, Source
from dit.config.backbone import SpatioTemporalDiTConfig
from dit.config.distillation import ConsistencyConfig, TeacherConfig
from dit.config.encoders import EncodersConfig
from dit.config.engine import EMAConfig, EngineConfig, GuardConfig, OptimizerConfig, PreviewConfig, TrainConfig, ValidationConfig
from dit.config.objective import RectifiedFlowConfig, SamplingConfig

Weights = Annotated[str, Field(pattern=r"^(ema|model|sigma_rel=0?\.\d+)$")]


class FitRun(Section):
    """What training and distilling share."""

    out: str
    """Run directory. The same command resumes from it."""
    optimizer: OptimizerConfig
    engine: EngineConfig = EngineConfig()
    ema: EMAConfig = EMAConfig()
    guard: GuardConfig = GuardConfig()
    train: TrainConfig
    validation: ValidationConfig | None = None
    preview: PreviewConfig | None = None


class TrainRun(FitRun):
    data: DataConfig
    encoders: EncodersConfig = EncodersConfig()
    backbone: SpatioTemporalDiTConfig
    objective: RectifiedFlowConfig = RectifiedFlowConfig()


class DistillRun(FitRun):
    teacher: TeacherConfig
    method: ConsistencyConfig
    data: DataConfig | None = None
    """None reuses the teacher's data."""


class EncodeRun(Section):
    sources: Annotated[list[Source], Field(min_length=1)]
    sizes: Annotated[list[Size], Field(min_length=1)]
    """Allowed [frames, height, width]; each sample takes the longest, then nearest in aspect."""
    encoders: EncodersConfig = EncodersConfig()
    out: str
    """Folder of the latent cache. Shards that are complete are not made again."""
    batch_size: PositiveInt = 32
    num_workers: NonNegativeInt = 1
    dtype: Literal["float16", "float32"] = "float16"
    """How latents and text are stored."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.001


class Contestant(Section):
    run: str
    """Run directory of a training or a distillation."""
    step: PositiveInt | None = None
    """Which checkpoint; None for the newest valid one."""
    steps: PositiveInt | None = None
    """Another number of steps than the run's own sampler takes."""
    sampling: SamplingConfig | None = None
    """Another sampler than the run's own: a student ships its sampler, steps and guidance; a teacher takes its preview's."""


class SampleRun(Section):
    contestants: Annotated[list[Contestant], Field(min_length=1)]
    """The run to sample from; or several, which then start from the same noise and are shown beside each other."""
    weights: Weights = "ema"
    """ema, model, or sigma_rel=S: the average of that width, reconstructed from those of ema.sigma_rel and the checkpoints kept."""
    prompts: Annotated[list[str], Field(min_length=1)]
    labels: list[NonNegativeInt] | None = None
    """Class of each prompt, for class-conditional models."""
    size: Size
    """Frames, height, width in pixels."""
    out: str
    """Folder for the pictures."""
    seed: NonNegativeInt = 0
    batch_size: PositiveInt = 16


class EvaluateRun(Section):
    """Caption adherence on moving shapes, measured by an exact checker."""

    contestants: Annotated[list[Contestant], Field(min_length=1)]
    """What is compared: one row of the table each."""
    weights: Weights = "ema"
    """ema, model, or sigma_rel=S: the average of that width, reconstructed from those of ema.sigma_rel and the checkpoints kept."""
    samples: PositiveInt = 256
    """Clips for trained captions, and as many for held-out ones."""
    out: str
    seed: NonNegativeInt = 1
    batch_size: PositiveInt = 64


__all__ = ["Contestant", "DistillRun", "EncodeRun", "EvaluateRun", "FitRun", "SampleRun", "TrainRun"]
