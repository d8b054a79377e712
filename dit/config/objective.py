"""What is learned: the path from data to noise, the times drawn, and how conditions are dropped."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from data_pipelines.config import Section


class UniformTimes(Section):
    name: Literal["uniform"]


class LogitNormalTimes(Section):
    name: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: PositiveFloat = 1.0


class TokenShift(Section):
    """t' = k t / (1 + (k - 1) t) with k = sqrt(tokens / base_tokens) (Esser et al. 2024, arXiv:2403.03206, eq. 23)."""

    base_tokens: PositiveInt
    """Tokens of a sample at which times are not shifted."""


class RectifiedFlowConfig(Section):
    name: Literal["rectified_flow"] = "rectified_flow"
    times: Annotated[UniformTimes | LogitNormalTimes, Field(discriminator="name")] = LogitNormalTimes()
    shift: TokenShift | None = None
    """Longer samples need more noise to lose their content; None for no shift."""
    condition_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Fraction of samples trained without text and label, for classifier-free guidance."""


class Guidance(Section):
    """Strength of classifier-free guidance in exactly one of the two conventions: s = w + 1."""

    s: float | None = None
    """v_null + s (v_cond - v_null); 1 is no guidance."""
    w: float | None = None
    """(1 + w) v_cond - w v_null; 0 is no guidance."""

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


class SamplingConfig(Section):
    sampler: Literal["euler", "heun", "consistency"] = "euler"
    """`consistency` is for distilled students: predict the data, add fresh noise, repeat."""
    steps: PositiveInt = 32
    shift: PositiveFloat | None = None
    """Time shift k of the step schedule; None takes the shift that the model was trained with."""
    guidance: Guidance = Guidance(s=1.0)
