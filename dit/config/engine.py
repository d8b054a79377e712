"""Optimizer, precision, sharding, averaging, and the rhythm of a run."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

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
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What is sharded over the ranks: 0 nothing; 1 optimizer states and EMA; 2 gradients as well; 3 weights as well."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 keeps fp32 master weights, optimizer states and EMA."""
    offload: Literal["none", "optimizer"] = "none"
    """optimizer: master weights, optimizer states and EMA stay in host memory, and the step is taken there. Stages 2 and 3."""
    whole_below: NonNegativeInt = 10_000
    """Under stage 3, parameters of fewer elements stay whole on every rank: a message would cost more than it saves."""
    gather_within: PositiveInt = 1
    """Under stage 3, neighbouring ranks that keep a second copy of the weights among them, such as those of one node, from which the
    backward pass gathers (hpZ of ZeRO++, arXiv:2306.10209, 3.2). Costs 1 / gather_within of the weights in memory; 1 keeps none."""
    compile: bool = False
    """Compile the blocks by torch.compile, attention aside. The first steps take longer; not under stage 3."""
    sequence_parallel: PositiveInt = 1
    """Neighbouring ranks that compute a pack together, each a part of its tokens and, in self-attention, of the heads (Ulysses). Divides
    the number of processes and backbone.num_heads; data.packs_per_step is dealt to world size / sequence_parallel groups."""

    @model_validator(mode="after")
    def _options_fit_the_stage(self) -> "EngineConfig":
        if self.offload != "none" and self.zero_stage < 2:
            raise ValueError(f"offload={self.offload} needs zero_stage 2 or 3, got {self.zero_stage}")
        if self.gather_within > 1 and self.zero_stage < 3:
            raise ValueError(
                f"gather_within={self.gather_within} needs zero_stage 3, got {self.zero_stage}: below, every rank has all weights"
            )
        if self.compile and self.zero_stage == 3:
            raise ValueError("compile=true needs zero_stage 0, 1 or 2, got 3: its weights are gathered inside what would be compiled")
        return self


MAX_SIGMA_REL = 0.28
"""No power function has a profile that is wider by much."""


class EMAConfig(Section):
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Average of the weights: ema <- decay ema + (1 - decay) weights, after each step; shorter in the first steps."""
    sigma_rel: tuple[Annotated[float, Field(gt=0, lt=MAX_SIGMA_REL)], ...] = ()
    """Further averages, with power-function profiles of these widths, as fractions of the time trained (such as [0.05, 0.1]). From
    two of them, and checkpoints kept along the run, `weights: sigma_rel=0.07` reconstructs any width after training."""


class GuardConfig(Section):
    """What happens to a step whose loss or gradients cannot be trusted. Decided by all ranks before any state changes."""

    on_nonfinite: Literal["skip", "rollback", "stop"] = "skip"
    """Loss or gradients are infinite or no number. skip: drop the step. rollback: return to the last checkpoint and go on with the
    data behind this step. stop: end the run."""
    on_spike: Literal["ignore", "clip", "skip", "rollback", "stop"] = "clip"
    """A gradient norm (for skip, rollback and stop also a loss) far above its running median. clip: scale the gradient to the limit."""
    spike_deviations: PositiveFloat = 12.0
    """The limit is the median plus this many robust standard deviations (1.48 times the median absolute deviation)."""
    window: Annotated[int, Field(ge=8)] = 128
    """Steps that the median is taken over; the guard against spikes begins when a quarter of them are done."""
    max_bad_steps: NonNegativeInt = 5
    """The run stops when this many steps within one window were skipped or rolled back, and another comes."""


class TrainConfig(Section):
    samples: NonNegativeInt
    """The run ends with the step that reaches this many samples. 0, with `init`: a run of those weights, untrained, as for a teacher."""
    seed: NonNegativeInt = 0
    log_every_steps: PositiveInt = 10
    save_every_steps: PositiveInt = 500
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints kept; the newest valid one is never deleted."""
    keep_every_steps: PositiveInt | None = None
    """Checkpoints whose step is a multiple of this are kept for ever."""
    checkpoint_store: Annotated[str, Field(pattern=r"^s3://[^/\s]+(/[^/\s]+)*$")] | None = None
    """Such as s3://bucket/runs/a: every checkpoint is also uploaded there while training goes on, and a run whose directory has none
    newer goes on from there. Of one run alone."""
    async_save: bool = True
    """Copy the state to host memory and write it while training goes on; at most one checkpoint is being written at a time."""


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
