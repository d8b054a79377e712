"""What is known of a method from its config alone: what a step costs, and what its students can do."""

from typing import NamedTuple, assert_never

from dit.config.distillation import (
    ConsistencyConfig,
    ContinuousConsistencyConfig,
    MeanFlowConfig,
    Method,
    MomentMatchingConfig,
    ProgressiveConfig,
)


class Calls(NamedTuple):
    """Calls of a network for each sample of a step. trained: forward and backward passes of the student. plain: its forward passes without
    gradient, one on dual numbers counting two. teacher: forward passes of the teacher, guided ones counting two."""

    trained: int
    plain: int
    teacher: int

    @property
    def forward_passes(self) -> int:
        """All of it in forward passes of one network: a backward pass costs two."""
        return 3 * self.trained + self.plain + self.teacher


class Traits(NamedTuple):
    """What students can do beside `student_steps` steps.

    any_steps: take another number of steps. any_time: jump from levels between those of their steps. follows_flow: end where the teacher's
    flow ends from the same noise, unless fresh noise comes in.
    """

    any_steps: bool = True
    any_time: bool = True
    follows_flow: bool = True


def step_calls(config: Method) -> Calls:
    """What a step of the method costs, whatever the size of its networks."""
    guided = 1 if config.guidance.scale == 1 else 2  # null and conditional branch
    match config:
        case ConsistencyConfig():
            steps = config.solver_steps * (2 if config.solver == "heun" else 1) if config.flow == "teacher" else 0
            return Calls(1, 1, steps * guided)
        case MeanFlowConfig() | ContinuousConsistencyConfig():
            return Calls(1, 2, guided if config.flow == "teacher" else 0)
        case ProgressiveConfig():
            return Calls(1, 0, config.teacher_steps * guided)
        case MomentMatchingConfig():  # once with its gradient, twice for a difference
            return Calls(1, 0, 5 * guided)
        case _:
            assert_never(config)


def traits_of(config: Method) -> Traits:
    """What the students of the method can do."""
    match config:
        case ConsistencyConfig():
            return Traits(any_steps=config.phases == 1)
        case MeanFlowConfig() | ContinuousConsistencyConfig():
            return Traits()
        case ProgressiveConfig():
            return Traits(any_steps=False, any_time=False)
        case MomentMatchingConfig():
            return Traits(any_steps=False, any_time=False, follows_flow=False)
        case _:
            assert_never(config)
