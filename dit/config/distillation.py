"""Few-step students: one class a method."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from data_pipelines.config import Section
from dit.config.engine import OptimizerConfig
from dit.config.evaluation import NetworkFeatures, RandomConvFeatures
from dit.config.objective import Guidance, LogitNormalTimes, UniformTimes
from dit.config.path import Rising

StudentTimes = Annotated[UniformTimes | LogitNormalTimes, Field(discriminator="name")]


class _Method(Section):
    guidance: Guidance
    """Guidance of the teacher that the student bakes in; the student then needs one call a step."""
    student_steps: PositiveInt = 4
    """Steps that the student's sampler takes by default; stored with the student."""


class _Flow(_Method):
    flow: Literal["teacher", "data"] = "teacher"
    """What moves x_t: the guided teacher; or the straight line to the sample's own latents, which needs no teacher but its weights, to
    start from, and many more steps for the same student."""

    @model_validator(mode="after")
    def _data_are_not_guided(self) -> Self:
        if self.flow == "data" and self.guidance.scale != 1:
            raise ValueError(f"flow=data and guidance {self.guidance}: data cannot be guided; set guidance {{s: 1}} or flow: teacher")
        return self


class ConsistencyConfig(_Flow):
    """Discrete guided consistency distillation on the rectified-flow path (Luo et al. 2023, arXiv:2310.04378; the (t, r)
    schedule of Geng et al. 2024, arXiv:2406.14548; phases of Wang et al. 2024, arXiv:2405.18407), or training, without a teacher."""

    name: Literal["consistency"]
    times: StudentTimes = UniformTimes(name="uniform")
    """Distribution of t."""
    phases: PositiveInt = 1
    """1: the student jumps from any t to the data, and is sampled by noising afresh. M > 1: [0, 1] is cut into M phases, it jumps
    to the lower end e of its phase only, and is sampled without fresh noise in M steps: easier to learn, no fewer steps. `student_steps`
    is then M."""
    stages: PositiveInt = 4
    """The gap shrinks in this many stages of equal length: r = e + (t - e) (1 - 1 / q^stage)."""
    q: Annotated[float, Field(gt=1)] = 2.0
    """Factor by which the relative gap (t - r) / (t - e) shrinks from stage to stage."""
    skip: Annotated[float, Field(gt=0, le=1)] | None = None
    """A fixed gap instead: r = max(t - skip, e + (t - e) / 1000); Luo et al. skip 0.02."""
    solver: Literal["euler", "heun"] = "heun"
    """How the teacher steps from t to r."""
    solver_steps: PositiveInt = 1
    """Teacher steps between t and r."""
    guidance_range: tuple[Annotated[float, Field(ge=1)], Annotated[float, Field(ge=1)]] | None = None
    """[low, high]: the student is told the scale s, drawn for each sample between these, instead of baking one in (Luo et al. 2023). It is
    sampled at any s of the range, one call a step; `guidance` then says at which by default."""
    huber: Annotated[float, Field(ge=0)] = 0.0
    """Constant of the pseudo-Huber loss for unit-variance data, relative to sqrt(dimension); 0 is squared error."""

    @model_validator(mode="after")
    def _a_step_a_phase(self) -> Self:
        if self.phases not in (1, self.student_steps):
            raise ValueError(f"phases={self.phases} and student_steps={self.student_steps}: a student of phases takes one step in each")
        return self

    @model_validator(mode="after")
    def _default_is_in_range(self) -> Self:
        if self.guidance_range is None:
            return self
        low, high = self.guidance_range
        if self.flow == "data" or not low < high or not low <= self.guidance.scale <= high or self.guidance.scale == 1:
            raise ValueError(
                f"guidance_range={[low, high]}, guidance {self.guidance}, flow={self.flow}: expected low < high, a default s > 1 between "
                "them, and flow: teacher, for data cannot be guided"
            )
        return self


class _Derived(_Flow):
    derivative: Literal["forward", "difference"] = "forward"
    """How the student is differentiated along the flow: in forward mode, exact in bf16 too; or by a central difference, which takes any
    attention kernel and only fp32 resolves."""
    step: PositiveFloat = 1e-4
    """Half of the difference in t. Time is embedded at up to 1000 radians a unit: 1e-3 is off by 10 % and more, and a stretch of many
    waves, 0.05, is a slope without them, which keeps `mean_flow` steady on such a network."""


class MeanFlowConfig(_Derived):
    """A student of two times: the mean velocity from any t to any r < t (Geng et al. 2025, arXiv:2505.13447). Sampled without fresh
    noise in any number of steps."""

    name: Literal["mean_flow"]
    times: StudentTimes = UniformTimes(name="uniform")
    """Distribution of the two times, of which t is the later."""
    plain_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Fraction of samples with r = t, where the student learns the velocity itself; Geng et al. train from data with 0.75."""
    power: Annotated[float, Field(ge=0)] = 0.0
    """The error e^2 of a sample weighs (e^2 + constant)^-power, per dimension; Geng et al. train from data with 1."""
    constant: PositiveFloat = 1e-2


class _Continuous(_Derived):
    times: StudentTimes = LogitNormalTimes()
    """Distribution of t; Lu & Song take a normal ln(t / (1 - t)) with mean -1 and std 1.4."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Part of the run over which the derivative of the student comes in; before, it learns the velocity of the flow."""
    constant: PositiveFloat = 0.1
    """c of the normalised tangent g / (rms(g) + c)."""


class ContinuousConsistencyConfig(_Continuous):
    """Consistency in continuous time: no gap and no target network (Lu & Song 2024, arXiv:2410.11081)."""

    name: Literal["continuous_consistency"]


class ProgressiveConfig(_Method):
    """One step of the student for two of the teacher (Salimans & Ho 2022, arXiv:2202.00512). A run is one stage: the teacher of the next
    is its student, with `guidance: {s: 1}`."""

    name: Literal["progressive"]
    teacher_steps: PositiveInt = 2
    """Euler steps of the teacher that one of `student_steps` stands for; 1 only bakes the guidance in, which goes first
    (Meng et al. 2022, arXiv:2210.03142)."""


class CriticConfig(Section):
    steps: PositiveInt = 5
    """Steps of the critic before each of the student. Both are steps of the run, with samples of their own."""
    optimizer: OptimizerConfig
    """The critic's own; `optimizer` is the student's."""


class MomentCriticConfig(CriticConfig):
    """A network that starts as the teacher and learns its answer and what the student draws, one as much as the other."""

    steps: PositiveInt = 1
    """Steps of the critic before each of the student. Both are steps of the run, with samples of their own."""


class MomentMatchingConfig(_Method):
    """A student of few noisy steps whose latents have the teacher's moments (Salimans et al. 2024, arXiv:2406.04103). Sampled by
    `ancestral` in `student_steps` steps."""

    name: Literal["moment_matching"]
    critic: MomentCriticConfig | None = None
    """Learns the mean of what the student draws, in turns with it, as far as it can tell (their 4.1). None: the moments are those that
    gradients of the teacher's own weights tell (4.2), by products of halves of a pack, so it wants large packs."""


class HeadsConfig(Section):
    """Small heads on the tokens of some blocks, which tell noised samples of the student from noised data."""

    blocks: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    """Blocks of the backbone, from 0, whose tokens the heads see. Blocks behind the last of them are not called."""
    width: PositiveInt = 64
    """Of the hidden layer of a head."""
    times: StudentTimes = LogitNormalTimes(mean=1.0)
    """Levels at which samples are told apart, before the shift: the more noise, the more a head looks at the whole."""


class CriticHeadsConfig(HeadsConfig):
    weight: PositiveFloat = 5e-3
    """Of the heads' judgement in the student's loss, beside the gradient of matched distributions, which has size 1."""
    critic_weight: PositiveFloat = 1e-2
    """Of what the heads learn from, in the critic's loss."""


class ScoreCriticConfig(CriticConfig):
    """A network that starts as the teacher, is never guided, and learns the velocity of what the student makes at the time."""

    times: StudentTimes = UniformTimes(name="uniform")
    """Distribution of the levels at which critic and teacher are compared, before the shift, and which the critic learns."""
    ends: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]], Rising] = (0.02, 0.98)
    """They are scaled into this interval: at t = 0 there is nothing to compare."""
    heads: CriticHeadsConfig | None = None
    """Also tell the student's samples from the data, by the critic's own tokens. The teacher must be on rectified flow."""


class TeacherFeatures(Section):
    """Tokens of the frozen teacher, which sees noised latents and the caption: LADD."""

    name: Literal["teacher"] = "teacher"


class DiscriminatorConfig(CriticConfig, HeadsConfig):
    """Heads on what a frozen network sees: the teacher in noised latents; or another one in the decoded clips, and then the heads are told
    the caption or class, and `blocks` are layers of that network."""

    features: Annotated[TeacherFeatures | RandomConvFeatures | NetworkFeatures, Field(discriminator="name")] = TeacherFeatures()
    """Anything but `teacher` judges pixels: ADD, with DINOv2 as `network`. Gradients go through it and through the latent decoder."""
    frames: PositiveInt | None = None
    """Of a decoded clip, frames that the network sees: as many, evenly spaced, from one that the sample's key draws. None: all."""
    steps: PositiveInt = 1
    """Steps of the heads before each of the student."""
    mismatched: bool = True
    """Data under the caption of another sample of the pack are to be told apart as well, so that captions count."""
    smoothness: NonNegativeFloat = 0.1
    """Weight of |D(x + s n) - D(x)|^2 / s^2 on data, which stands for the squared gradient of the heads (R1; Lin et al. 2025,
    arXiv:2501.08316); 0 for none."""
    smoothness_step: PositiveFloat = 0.1
    """s, in latents."""

    @property
    def in_pixels(self) -> bool:
        """Whether decoded clips are judged."""
        return not isinstance(self.features, TeacherFeatures)

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> Self:
        if not self.in_pixels and self.frames is not None:
            raise ValueError(f"frames={self.frames} and features {{name: teacher}}: the teacher sees latents; leave frames out")
        if self.in_pixels and self.times != type(self).model_fields["times"].default:
            raise ValueError(f"times={self.times} and features {{name: {self.features.name}}}: pixels are not noised; leave times out")
        if isinstance(self.features, NetworkFeatures) and self.features.pool != "cls":
            raise ValueError(f"features.pool={self.features.pool}: heads see every place, so nothing is pooled; leave pool out")
        return self


class DistributionMatchingConfig(_Method):
    """Match the distribution of what the student makes to the guided teacher's (DMD2, Yin et al. 2024, arXiv:2405.14867). Of the data,
    captions and sizes alone are used, unless `critic.heads` are given."""

    name: Literal["distribution_matching"]
    critic: ScoreCriticConfig


class ScoreRegularisedConfig(_Continuous):
    """Continuous consistency, which covers all of the distribution, and matched distributions, which sharpen it (rCM, Zheng et al.
    2025, arXiv:2510.08431)."""

    name: Literal["score_regularised"]
    critic: ScoreCriticConfig
    weight: PositiveFloat = 1.0
    """Of matched distributions beside consistency; the gradients of both have size 1."""


class AdversarialConfig(_Method):
    """A student that heads cannot tell from data: latent adversarial distillation (LADD, Sauer et al. 2024, arXiv:2403.12015); with
    `critic.features` in pixels and `distillation_weight: 2.5`, ADD (Sauer et al. 2023, arXiv:2311.17042). The student denoises the data
    from the levels of its sampler; best are data that the guided teacher made. For `features: {name: teacher}` it must be on rectified
    flow."""

    name: Literal["adversarial"]
    critic: DiscriminatorConfig
    distillation_weight: NonNegativeFloat = 0.0
    """Of (1 - t) |x - what the guided teacher sees in x noised to t|^2, x the student's latents, beside the heads' sum as published;
    all of it is divided by their number. 0: no teacher's answer. It draws samples to the modes: too much of it makes them alike."""


Method = (
    ConsistencyConfig
    | MeanFlowConfig
    | ContinuousConsistencyConfig
    | ProgressiveConfig
    | MomentMatchingConfig
    | DistributionMatchingConfig
    | ScoreRegularisedConfig
    | AdversarialConfig
)
MethodConfig = Annotated[Method, Field(discriminator="name")]


class TeacherConfig(Section):
    run: str
    """Run directory of the teacher, a training or a distillation; its config, data and encoders are reused. Or one of its checkpoints:
    RUN/checkpoints/step-00000500."""
    step: NonNegativeInt | None = None
    """Which checkpoint; None for the newest valid one."""
    weights: Literal["ema", "model"] = "ema"

    @model_validator(mode="before")
    @classmethod
    def _checkpoint_is_a_run_and_a_step(cls, values: object) -> object:
        found = re.fullmatch(r"(.+)/checkpoints/step-0*(\d+)/?", str(values.get("run"))) if isinstance(values, dict) else None
        if not isinstance(values, dict) or found is None:
            return values
        run, step = found[1], int(found[2])
        if values.get("step") not in (None, step):
            raise ValueError(f"run names the checkpoint of step {step}, and step is {values['step']}: give one of them")
        return values | {"run": run, "step": step}


class DiagnosisConfig(Section):
    """Student against teacher from the same noise, at previews and with their prompts: docs/guides/distill.md says how to read it."""

    steps: tuple[PositiveInt, ...] = (1, 2, 4, 8)
    """Numbers of steps in which both are drawn; a student that takes `student_steps` steps alone is drawn in those."""
    noises: Annotated[int, Field(ge=2)] = 4
    """Clips of each of preview.prompts, from different noise."""
    teacher_steps: PositiveInt = 32
    """Euler steps of the teacher whose result counts as right; rounded up to a multiple of 2 x student_steps."""
    share: PositiveFloat = 0.05
    """Most of the run's network calls that may go into diagnoses of the student; as many previews as need be are drawn without one."""
