"""What is known of a method from its config alone: what a step costs, and what its students can do."""

from typing import NamedTuple, assert_never

from dit.config.distillation import (
    AdversarialConfig,
    ConsistencyConfig,
    ContinuousConsistencyConfig,
    CriticConfig,
    DistributionMatchingConfig,
    HeadsConfig,
    MeanFlowConfig,
    Method,
    MomentMatchingConfig,
    ProgressiveConfig,
    ScoreRegularisedConfig,
)
from dit.config.engine import EngineConfig


class Calls(NamedTuple):
    """Calls of a network for each sample of a step; where networks train in turns, the mean over the turns.

    trained: forward and backward passes. plain: forward passes of student and critic without gradient, one on
    dual numbers counting two. teacher: forward passes of the
    teacher, guided ones counting two. A pass to the input of heads' tokens counts as two.
    """

    trained: float
    plain: float
    teacher: float

    @property
    def forward_passes(self) -> float:
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
        case MomentMatchingConfig(critic=None):  # once with its gradient, twice for a difference
            return Calls(1, 0, 5 * guided)
        case MomentMatchingConfig():  # in either turn one network learns and the other is asked
            return Calls(1, 1, guided)
        case DistributionMatchingConfig() | ScoreRegularisedConfig():
            steps, heads = config.critic.steps, 0 if config.critic.heads is None else 3
            student = Calls(1, 1 + (config.student_steps - 1) / 2 + heads, guided)
            if isinstance(config, ScoreRegularisedConfig):
                student = Calls(2, student.plain + 2, guided + (guided if config.flow == "teacher" else 0))
            critic = Calls(1, (config.student_steps + 1) / 2 + 2 * heads, 0)
            return Calls(*((own + steps * other) / (1 + steps) for own, other in zip(student, critic, strict=True)))
        case AdversarialConfig():  # heads see the tokens of the teacher's first blocks, counted as the whole; through them goes a gradient
            steps = config.critic.steps
            seen = 0 if config.critic.in_pixels else 3 + steps * (2 + config.critic.mismatched + bool(config.critic.smoothness))
            asked = guided if config.distillation_weight else 0
            return Calls(1 / (1 + steps), steps / (1 + steps), (asked + seen) / (1 + steps))
        case _:
            assert_never(config)


def critic_of(config: Method) -> CriticConfig | None:
    """What trains in turns with the student, if anything does."""
    match config:
        case DistributionMatchingConfig() | ScoreRegularisedConfig() | AdversarialConfig() | MomentMatchingConfig():
            return config.critic
        case _:
            return None


def has_second_network(config: Method) -> bool:
    """Whether its critic is a network as large as the teacher, not heads alone."""
    critic = critic_of(config)
    return critic is not None and not isinstance(critic, HeadsConfig)


def teacher_engine(config: Method, engine: EngineConfig) -> EngineConfig:
    """How the teacher lies on the ranks of `engine`: as its student does, but whole where gradients go through it."""
    match config:
        case AdversarialConfig() if not config.critic.in_pixels:
            return engine.model_copy(update={"zero_stage": 0})
        case MomentMatchingConfig(critic=None):  # differentiated by its weights
            return engine.model_copy(update={"zero_stage": 0, "precision": "fp32"})
        case _:
            return engine


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
        case ScoreRegularisedConfig():
            return Traits(follows_flow=False)
        case DistributionMatchingConfig() | AdversarialConfig():
            return Traits(any_time=False, follows_flow=False)
        case _:
            assert_never(config)
