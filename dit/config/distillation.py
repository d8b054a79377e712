"""Few-step students: one class a method."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from data_pipelines.config import Section
from dit.config.objective import Guidance, LogitNormalTimes, UniformTimes


class ConsistencyConfig(Section):
    """Discrete guided consistency distillation on the rectified-flow path (Luo et al. 2023, arXiv:2310.04378; the (t, r)
    schedule of Geng et al. 2024, arXiv:2406.14548; phases of Wang et al. 2024, arXiv:2405.18407)."""

    name: Literal["consistency"] = "consistency"
    guidance: Guidance
    """Guidance of the teacher that the student bakes in; the student then needs one call a step."""
    times: Annotated[UniformTimes | LogitNormalTimes, Field(discriminator="name")] = UniformTimes(name="uniform")
    """Distribution of t."""
    phases: PositiveInt = 1
    """1: the student jumps from any t to the data, and is sampled by noising afresh. M > 1: [0, 1] is cut into M phases, it jumps
    to the lower end e of its phase only, and is sampled without fresh noise in M steps: easier to learn, no fewer steps."""
    stages: PositiveInt = 4
    """The gap shrinks in this many stages of equal length: r = e + (t - e) (1 - 1 / q^stage)."""
    q: Annotated[float, Field(gt=1)] = 2.0
    """Factor by which the relative gap (t - r) / (t - e) shrinks from stage to stage."""
    solver: Literal["euler", "heun"] = "heun"
    """How the teacher steps from t to r."""
    solver_steps: PositiveInt = 1
    """Teacher steps between t and r."""
    huber: Annotated[float, Field(ge=0)] = 0.0
    """Constant of the pseudo-Huber loss for unit-variance data, relative to sqrt(dimension); 0 is squared error."""
    student_steps: PositiveInt = 4
    """Steps that the student's sampler takes by default; stored with the student. With phases: as many as there are."""

    @model_validator(mode="after")
    def _a_step_a_phase(self) -> Self:
        if self.phases not in (1, self.student_steps):
            raise ValueError(f"phases={self.phases} and student_steps={self.student_steps}: a student of phases takes one step in each")
        return self


class TeacherConfig(Section):
    run: str
    """Run directory of the teacher; its config, data and encoders are reused."""
    step: PositiveInt | None = None
    """Which checkpoint; None for the newest valid one."""
    weights: Literal["ema", "model"] = "ema"
