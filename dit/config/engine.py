"""Optimizer, precision, sharding, averaging, and the rhythm of a run."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from data_pipelines.config import Section
from dit.config.objective import SamplingConfig


class OptimizerConfig(Section):
    """AdamW; the schedule is counted in samples, so it does not depend on how they are batched."""

    lr: PositiveFloat
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Applied to matrices only; biases, norms, tables and embeddings are exempt."""
    warmup_samples: NonNegativeInt = 0
    """Linear warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Where the cosine ends, at train.samples."""
    max_grad_norm: PositiveFloat = 1.0
    """Global gradient norm above this is scaled down to it."""


class EngineConfig(Section):
    zero_stage: Literal[1, 2] = 1
    """What DeepSpeed shards over the ranks: 1 optimizer states and EMA; 2 gradients as well."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 keeps fp32 master weights, optimizer states and EMA."""


class EMAConfig(Section):
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Average of the weights: ema <- decay ema + (1 - decay) weights, after each step; shorter in the first steps."""


class TrainConfig(Section):
    samples: PositiveInt
    """The run ends with the step that reaches this many samples."""
    seed: NonNegativeInt = 0
    log_every_steps: PositiveInt = 10
    save_every_steps: PositiveInt = 500
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints kept; the newest valid one is never deleted."""


class ValidationConfig(Section):
    """Held-out loss at fixed noise on a fixed grid of t."""

    source: str
    """Folder of indexed shards that training does not see."""
    samples: PositiveInt = 64
    times: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    every_steps: PositiveInt = 500


class PreviewConfig(Section):
    """Samples of fixed prompts at fixed noise, drawn with the averaged weights; the first before step 1."""

    prompts: Annotated[list[str], Field(min_length=1)]
    labels: list[NonNegativeInt] | None = None
    """Class of each prompt, for class-conditional models."""
    size: tuple[PositiveInt, PositiveInt, PositiveInt]
    """Frames, height, width in pixels."""
    every_steps: PositiveInt = 1000
    sampling: SamplingConfig = SamplingConfig()
