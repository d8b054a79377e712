"""The five roots of the configuration, one a verb. Every knob of the system is in this folder or in data_pipelines/config.py."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from data_pipelines.config import DataConfig, ExecutorConfig, Section, Size, SizeRule, Source
from dit.config.backbone import SpatioTemporalDiTConfig
from dit.config.distillation import DiagnosisConfig, MethodConfig, TeacherConfig
from dit.config.editing import EditConfig
from dit.config.encoders import EncodersConfig
from dit.config.engine import (
    MAX_SIGMA_REL,
    EMAConfig,
    EngineConfig,
    GuardConfig,
    OptimizerConfig,
    PreviewConfig,
    TrainConfig,
    ValidationConfig,
)
from dit.config.evaluation import AdherenceConfig, Metric, ShapesClips, StoredClips
from dit.config.objective import DDPMConfig, ObjectiveConfig, RectifiedFlowConfig, SamplingConfig
from dit.config.path import VPPath


def known_weights(text: str) -> str:
    """`text`, if it names weights of a checkpoint. Raises ValueError."""
    width = re.fullmatch(r"sigma_rel=(0?\.\d+)", text)
    if text not in ("ema", "model") and not (width and 0 < float(width[1]) < MAX_SIGMA_REL):
        raise ValueError(f"got {text}, expected ema, model, or sigma_rel=S with 0 < S < {MAX_SIGMA_REL}")
    return text


Weights = Annotated[str, AfterValidator(known_weights)]


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


class InitConfig(Section):
    """Weights that a run begins with, in place of random ones. They become its checkpoint of step 0."""

    run: str | None = None
    """Run directory of a training or a distillation with the same backbone and encoders."""
    step: NonNegativeInt | None = None
    """Which checkpoint of it; None for the newest valid one."""
    weights: Weights = "ema"
    """ema, model, or sigma_rel=S: the average of that width, reconstructed from those of ema.sigma_rel and the checkpoints kept."""
    diffusers: str | None = None
    """Folder of a WanTransformer3DModel of diffusers, such as that of a public model; its VAE and text encoder belong in `encoders`."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.run is None) == (self.diffusers is None):
            raise ValueError(f"run={self.run}, diffusers={self.diffusers}: give exactly one of them")
        return self


class TrainRun(FitRun):
    data: DataConfig
    init: InitConfig | None = None
    encoders: EncodersConfig = EncodersConfig()
    backbone: SpatioTemporalDiTConfig
    objective: ObjectiveConfig = RectifiedFlowConfig()

    @field_validator("objective", mode="before")
    @classmethod
    def _objective_has_a_name(cls, value: object) -> object:
        if not isinstance(value, dict) or "name" in value:
            return value
        return {"name": "diffusion" if "path" in value else "rectified_flow", **value}

    @model_validator(mode="after")
    def _has_something_to_do(self) -> Self:
        if self.train.samples == 0 and self.init is None:
            raise ValueError("train.samples=0 makes a run of the weights that `init` names, and there is no init: expected 1 or more")
        return self

    @model_validator(mode="after")
    def _variance_has_channels(self) -> Self:
        learned = isinstance(self.objective, DDPMConfig) and self.objective.variance == "learned"
        if learned != self.backbone.learned_variance:
            raise ValueError(
                f"backbone.learned_variance={self.backbone.learned_variance} does not fit objective.variance: "
                "a network with channels for the variance is trained by objective {name: ddpm, variance: learned}, and by no other"
            )
        return self

    @model_validator(mode="after")
    def _can_be_sampled(self) -> Self:
        path, prediction = self.objective.path, self.objective.prediction
        ends_in_noise = path.name in ("rectified_flow", "trigflow") or (isinstance(path, VPPath) and path.zero_terminal_snr)
        if ends_in_noise and prediction in ("noise", "score"):
            raise ValueError(
                f"objective.prediction={prediction} says nothing of the data at t = 1, where objective.path={path.name} holds noise alone "
                "and sampling begins; predict velocity, v, latents or edm, or take another path"
            )
        return self


class DistillRun(FitRun):
    teacher: TeacherConfig
    method: MethodConfig
    data: DataConfig | None = None
    """None reuses the teacher's data."""
    diagnosis: DiagnosisConfig | None = DiagnosisConfig()
    """At previews: without `preview` there is none. null draws previews alone."""

    @model_validator(mode="after")
    def _has_something_to_do(self) -> Self:
        if self.train.samples == 0:
            raise ValueError("train.samples=0: expected 1 or more")
        return self

    @model_validator(mode="after")
    def _gradients_of_the_teacher_are_whole(self) -> Self:
        engine, by_weights = self.engine, self.method.name == "moment_matching" and self.method.critic is None
        if by_weights and (engine.sequence_parallel > 1 or engine.zero_stage == 3 or engine.precision == "bf16"):
            raise ValueError(
                f"method.name=moment_matching, engine.zero_stage={engine.zero_stage}, engine.sequence_parallel={engine.sequence_parallel}, "
                f"engine.precision={engine.precision}: each rank differentiates a whole teacher by its weights; set stage 2 at most, "
                "sequence_parallel: 1 and fp32, or train a critic (method.critic)"
            )
        return self

    @model_validator(mode="after")
    def _differences_are_resolved(self) -> Self:
        if self.engine.precision == "bf16" and getattr(self.method, "derivative", None) == "difference":
            raise ValueError(
                "engine.precision=bf16 and method.derivative=difference: a difference of bf16 answers is rounding alone; "
                "set method.derivative: forward, or engine.precision: fp32"
            )
        return self


class Contestant(Section):
    run: str
    """Run directory of a training or a distillation."""
    step: NonNegativeInt | None = None
    """Which checkpoint; None for the newest valid one."""
    steps: PositiveInt | None = None
    """Another number of steps than the run's own sampler takes."""
    sampling: SamplingConfig | None = None
    """Another sampler than the run's own: a student ships its sampler, steps and guidance; a teacher takes its preview's."""


class Drawn(Contestant):
    """Latents that a trained model draws for captions: data that a guided teacher made."""

    weights: Weights = "ema"
    """ema, model, or sigma_rel=S: the average of that width, reconstructed from those of ema.sigma_rel and the checkpoints kept."""
    seed: NonNegativeInt = 0
    """Of the noise, which the id of a sample decides with it."""


class EncodeRun(Section):
    sources: Annotated[list[Source], Field(min_length=1)]
    sizes: tuple[Size, ...] = ()
    """Allowed [frames, height, width]; each sample takes the longest, then nearest in aspect."""
    size_rule: SizeRule | None = None
    """More allowed sizes, by rule; give its `multiple` if the backbone's patches need more than the codec."""
    encoders: EncodersConfig = EncodersConfig()
    drawn: Drawn | None = None
    """Take of each sample its caption, class and size alone, and store what this model draws for them, with the encoders of its run."""
    out: str
    """Folder of the latent cache. Shards that are complete are not made again."""
    batch_size: PositiveInt = 32
    num_workers: NonNegativeInt = 1
    dtype: Literal["float16", "float32"] = "float16"
    """How latents and text are stored."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.001
    executor: ExecutorConfig = ExecutorConfig()
    """local: this process, or the ranks of a launcher."""

    @model_validator(mode="after")
    def _some_size(self) -> Self:
        if not self.sizes and self.size_rule is None:
            raise ValueError("no size is allowed: give sizes, size_rule, or both")
        return self

    @model_validator(mode="after")
    def _every_sample_once(self) -> Self:
        for number, source in enumerate(self.sources):
            if source.weight != 1:
                raise ValueError(f"sources.{number}.weight={source.weight:g}: every sample is encoded once; weights are for training")
        return self

    @model_validator(mode="after")
    def _encoders_of_the_model(self) -> Self:
        if self.drawn and "encoders" in self.model_fields_set:
            raise ValueError(f"drawn.run={self.drawn.run} says which encoders its model has: remove `encoders`")
        return self


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
    edit: EditConfig | None = None
    """Start from a picture or a video; None starts from noise alone."""


class EvaluateRun(Section):
    """Figures of one or more runs, each with a 95 % interval, and of the reference clips themselves: the floor."""

    contestants: Annotated[list[Contestant], Field(min_length=1)]
    """What is compared: one column of the table each."""
    weights: Weights = "ema"
    """ema, model, or sigma_rel=S: the average of that width, reconstructed from those of ema.sigma_rel and the checkpoints kept."""
    clips: Annotated[ShapesClips | StoredClips, Field(discriminator="name")] = ShapesClips()
    """Where captions and reference clips come from. Twice `samples` are read: the reference, and as many that are judged against it."""
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] = (AdherenceConfig(),)
    samples: PositiveInt = 256
    """Clips drawn for each split of the captions (shapes: trained ones and held-out ones)."""
    per_caption: PositiveInt = 1
    """Clips of each caption, from different noise."""
    out: str
    seed: NonNegativeInt = 1
    batch_size: PositiveInt = 64

    @model_validator(mode="after")
    def _metrics_fit(self) -> Self:
        if self.samples % self.per_caption:
            raise ValueError(f"samples={self.samples} is no multiple of per_caption={self.per_caption}: change either")
        names = {metric.name for metric in self.metrics}
        of_shapes = names & {"adherence", "positions"} | {getattr(m, "features", m).name for m in self.metrics} & {"attributes"}
        if of_shapes and self.clips.name != "shapes":
            raise ValueError(f"metrics: {', '.join(sorted(of_shapes))} judges moving shapes alone: leave it out, or set clips.name: shapes")
        if "diversity" in names and self.per_caption == 1:
            raise ValueError("metrics: diversity compares clips of one caption: set per_caption to 2 or more")
        if "fidelity" in names and len(self.contestants) == 1:
            raise ValueError("metrics: fidelity compares with the first contestant: give a second one, or leave it out")
        if (sets := names & {"frechet", "kernel", "precision_recall"}) and self.samples < 40:
            raise ValueError(f"metrics: {', '.join(sorted(sets))} needs at least 40 samples, got samples={self.samples}")
        for number, metric in enumerate(self.metrics):
            if (k := getattr(metric, "k", 0)) >= self.samples:
                raise ValueError(f"metrics.{number}.k={k}: a clip has {self.samples - 1} neighbours among samples={self.samples}")
        return self


__all__ = ["Contestant", "DistillRun", "EncodeRun", "EvaluateRun", "FitRun", "InitConfig", "SampleRun", "TrainRun"]
