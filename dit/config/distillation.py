"""Few-step students: one class a method."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from data_pipelines.config import Section
from dit.config.objective import Guidance, LogitNormalTimes, UniformTimes


class ConsistencyConfig(Section):
    """Discrete guided consistency distillation on the rectified-flow path (Luo et al. 2023, arXiv:2310.04378; the (t, r)
    schedule of Geng et al. 2024, arXiv:2406.14548)."""

    name: Literal["consistency"] = "consistency"
    guidance: Guidance
    """Guidance of the teacher that the student bakes in; the student then needs one call a step."""
    times: Annotated[UniformTimes | LogitNormalTimes, Field(discriminator="name")] = UniformTimes(name="uniform")
    """Distribution of t."""
    stages: PositiveInt = 4
    """The gap shrinks in this many stages of equal length: r = t (1 - 1 / q^stage)."""
    q: Annotated[float, Field(gt=1)] = 2.0
    """Factor by which the relative gap (t - r) / t shrinks from stage to stage."""
    solver: Literal["euler", "heun"] = "heun"
    """How the teacher steps from t to r."""
    solver_steps: PositiveInt = 1
    """Teacher steps between t and r."""
    huber: Annotated[float, Field(ge=0)] = 0.0
    """Constant of the pseudo-Huber loss for unit-variance data, relative to sqrt(dimension); 0 is squared error."""
    student_steps: PositiveInt = 4
    """Steps that the student's sampler takes by default; stored with the student."""


class TeacherConfig(Section):
    run: str
    """Run directory of the teacher; its config, data and encoders are reused."""
    step: PositiveInt | None = None
    """Which checkpoint; None for the newest valid one."""
    weights: Literal["ema", "model"] = "ema"
