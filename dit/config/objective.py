"""What is learned: the path from data to noise, what the network predicts of it, the loss, and the times drawn."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from data_pipelines.config import Section
from dit.config.path import LearnedPath, PathConfig, Quantity, RectifiedFlowPath, Rising, Sigmas, VPPath
from dit.config.weighting import ConstantWeighting, WeightingConfig


class UniformTimes(Section):
    name: Literal["uniform"]


class LogitNormalTimes(Section):
    name: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: PositiveFloat = 1.0


class ModeTimes(Section):
    """t = 1 - u - scale (cos^2(pi u / 2) - 1 + u) (Esser et al. 2024, arXiv:2403.03206, eq. 20)."""

    name: Literal["mode"]
    scale: Annotated[float, Field(ge=-1, le=1.75)] = 0.5
    """Above 0 more times from the middle, below 0 more from the ends."""


class LogNormalTimes(Section):
    """ln(b / a) is normal (Karras et al. 2022, arXiv:2206.00364, table 1)."""

    name: Literal["log_normal"]
    mean: float = -1.2
    std: PositiveFloat = 1.2


TimesConfig = Annotated[UniformTimes | LogitNormalTimes | ModeTimes | LogNormalTimes, Field(discriminator="name")]


class TokenShift(Section):
    """t' = k t / (1 + (k - 1) t) with k = sqrt(tokens / base_tokens), frames included (Esser et al. 2024, arXiv:2403.03206, eq. 23)."""

    name: Literal["tokens"] = "tokens"
    base_tokens: PositiveInt
    """Tokens of a sample at which times are not shifted."""


class ExponentialShift(Section):
    """The same with k = exp(m), m linear in the number of tokens (Flux)."""

    name: Literal["exponential"]
    low_tokens: PositiveInt = 256
    high_tokens: PositiveInt = 4096
    low: float = 0.5
    """m at low_tokens."""
    high: float = 1.15
    """m at high_tokens."""

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if not self.low_tokens < self.high_tokens:
            raise ValueError(f"low_tokens = {self.low_tokens} must be below high_tokens = {self.high_tokens}")
        return self


ShiftConfig = Annotated[TokenShift | ExponentialShift, Field(discriminator="name")]


class CleanTokens(Section):
    """Samples that keep a part of their tokens clean, at t = 0, so that edits can tell the network what is known."""

    fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Of the samples."""
    patterns: Annotated[tuple[Literal["beginning", "end", "ends", "inside", "outside"], ...], Field(min_length=1)] = (
        "beginning",
        "end",
        "ends",
        "inside",
        "outside",
    )
    """What is clean: some of the first frames, some of the last, the first and the last, the inside or the outside of a box."""


class _Conditional(Section):
    condition_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Fraction of samples trained without text and label, for classifier-free guidance."""


class _Continuous(_Conditional):
    prediction: Quantity = "velocity"
    """What the network answers with; `edm` preconditions it."""
    weighting: WeightingConfig = ConstantWeighting()
    huber: NonNegativeFloat = 0.0
    """Constant c of the pseudo-Huber distance sqrt(error^2 + c^2) - c per dimension; 0 is squared error."""
    times: TimesConfig = LogitNormalTimes()
    clean_tokens: CleanTokens | None = None
    """Train for edits with `known_by: {name: trained_masks}`; the loss is on the noised tokens only."""
    stratified: bool = False
    """Draw the times of a step one from each of as many equal parts of the distribution, for a loss of less variance. Holes keep theirs."""
    shift: ShiftConfig | None = None
    """Longer samples need more noise to lose their content; None for no shift. Without a name it is `tokens`."""

    @field_validator("shift", mode="before")
    @classmethod
    def _shift_has_a_name(cls, value: object) -> object:
        return {"name": "tokens", **value} if isinstance(value, dict) else value


class RectifiedFlowConfig(_Continuous):
    """The path of rectified flow; `name: diffusion` takes any."""

    name: Literal["rectified_flow"] = "rectified_flow"

    @property
    def path(self) -> RectifiedFlowPath:
        """The one path."""
        return RectifiedFlowPath()


class DiffusionConfig(_Continuous):
    """Any path."""

    name: Literal["diffusion"]
    path: PathConfig


class DDPMConfig(_Conditional):
    """A chain of whole steps (Ho et al. 2020, arXiv:2006.11239; learned variance: Nichol & Dhariwal 2021, arXiv:2102.09672)."""

    name: Literal["ddpm"]
    path: VPPath = VPPath(name="vp")
    prediction: Literal["latents", "noise", "v"] = "noise"
    variance: Literal["small", "large", "learned"] = "small"
    """Of the reverse step: that of the posterior, that of the forward step, or learned between them (backbone.learned_variance)."""
    bound_weight: NonNegativeFloat = 1e-3
    """Weight of the variational bound, in bits per dimension summed over all steps, which trains a learned variance."""
    times: Literal["uniform", "importance"] = "uniform"
    """How steps are drawn; `importance` as sqrt of the bound's terms on unit Gaussian data, reweighted (their 3.3 with a fixed table)."""

    @property
    def shift(self) -> None:
        """A chain has its own times."""
        return None


class VariationalConfig(_Conditional):
    """The continuous-time bound with a noise schedule that is learned with the network (Kingma et al. 2021, arXiv:2107.00630)."""

    name: Literal["variational"]
    path: LearnedPath = LearnedPath()
    prediction: Literal["noise"] = "noise"

    @property
    def shift(self) -> None:
        """The schedule has its own times."""
        return None


ObjectiveConfig = Annotated[RectifiedFlowConfig | DiffusionConfig | DDPMConfig | VariationalConfig, Field(discriminator="name")]


class WeakModel(Section):
    run: str
    """Run directory of a smaller or less trained model with the same encoders."""
    step: NonNegativeInt | None = None
    """Which checkpoint; None for the newest valid one."""


class Guidance(Section):
    """Strength of classifier-free guidance in exactly one of the two conventions: s = w + 1."""

    s: float | None = None
    """v_null + s (v_cond - v_null); 1 is no guidance."""
    w: float | None = None
    """(1 + w) v_cond - w v_null; 0 is no guidance."""
    interval: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]], Rising] = (0.0, 1.0)
    """Guide at these t only (Kynkäänniemi et al. 2024, arXiv:2404.07724)."""
    rescale: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How far the spread of the guided prediction goes back to that of the conditional one (Lin et al. 2023, arXiv:2305.08891, 3.4)."""
    zero_star: bool = False
    """Scale the null prediction to fit the conditional one best (CFG-Zero*, Fan et al. 2025, arXiv:2503.18886, eq. 13)."""
    negative_prompt: str = ""
    """What to guide away from instead of the empty caption."""
    weak: "WeakModel | None" = None
    """Guide away from a weaker model under the same caption (autoguidance, Karras et al. 2024, arXiv:2406.02507)."""

    @model_validator(mode="after")
    def _one_convention(self) -> Self:
        if (self.s is None) == (self.w is None):
            raise ValueError(f"give exactly one of s (1 = off) and w = s - 1 (0 = off), got s={self.s}, w={self.w}")
        return self

    @property
    def scale(self) -> float:
        """The strength as s."""
        if self.s is not None:
            return self.s
        assert self.w is not None
        return self.w + 1.0

    def __str__(self) -> str:
        return f"s={self.scale:g} (w={self.scale - 1:g})"


class ShiftedSteps(Section):
    """Evenly spaced t, then shifted."""

    name: Literal["shifted"] = "shifted"


class KarrasSteps(Sigmas):
    """sigma^(1 / rho) evenly spaced, then 0 (Karras et al. 2022, arXiv:2206.00364, eq. 5), with sigma = b / a."""

    name: Literal["karras"]
    rho: PositiveFloat = 7.0


class ExponentialSteps(Sigmas):
    """ln(sigma) evenly spaced, then 0, with sigma = b / a: Karras' steps as rho grows."""

    name: Literal["exponential"]


class TrainedSteps(Section):
    """Quantiles of the times that the model was trained at."""

    name: Literal["trained"]


class WholeSteps(Section):
    """Evenly spaced among the whole steps i of a vp path: t = i / T."""

    name: Literal["whole"]
    first: bool = False
    """Space them between T and 1, both visited (Nichol & Dhariwal 2021, arXiv:2102.09672, section 4), instead of between T and 0."""


StepsConfig = Annotated[ShiftedSteps | KarrasSteps | ExponentialSteps | TrainedSteps | WholeSteps, Field(discriminator="name")]


class SamplingConfig(Section):
    sampler: Literal["euler", "heun", "rk4", "ddim", "ancestral", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "euler_maruyama", "consistency"] = (
        "euler"
    )
    """`ancestral`, `dpmpp_2m_sde` and `euler_maruyama` add noise. `consistency` is for distilled students: predict the data, add fresh
    noise, repeat."""
    steps: PositiveInt = 32
    schedule: StepsConfig = ShiftedSteps()
    """Where the steps lie."""
    shift: PositiveFloat | None = None
    """Time shift k of the step schedule; None takes the shift that the model was trained with."""
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Noise of `ddim`: 0 none, 1 as much as `ancestral`."""
    variance: Literal["small", "large", "learned"] = "small"
    """Of `ancestral`."""
    churn: NonNegativeFloat = 1.0
    """Noise of `euler_maruyama`, as a part of a(t) g(t)^2; 0 is `euler`."""
    order: Annotated[int, Field(ge=1, le=3)] = 2
    """Of `unipc`."""
    guidance: Guidance = Guidance(s=1.0)
