"""What is known of a method from its config alone: what a step costs, and what its students can do."""

from typing import NamedTuple, assert_never

from dit.config import distillation as methods
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


def step_calls(config: methods.Method) -> Calls:
    """What a step of the method costs, whatever the size of its networks."""
    guided = 1 if config.guidance.scale == 1 else 2  # null and conditional branch
    match config:
        case methods.ConsistencyConfig():
            steps = config.solver_steps * (2 if config.solver == "heun" else 1) if config.flow == "teacher" else 0
            return Calls(1, 1, steps * guided)
        case methods.MeanFlowConfig() | methods.ContinuousConsistencyConfig():
            return Calls(1, 2, guided if config.flow == "teacher" else 0)
        case methods.ProgressiveConfig():
            return Calls(1, 0, config.teacher_steps * guided)
        case methods.MomentMatchingConfig(critic=None):  # once with its gradient, twice for a difference
            return Calls(1, 0, 5 * guided)
        case methods.MomentMatchingConfig():  # in either turn one network learns and the other is asked
            return Calls(1, 1, guided)
        case methods.DistributionMatchingConfig() | methods.ScoreRegularisedConfig():
            steps, heads = config.critic.steps, 0 if config.critic.heads is None else 3
            student = Calls(1, 1 + (config.student_steps - 1) / 2 + heads, guided)
            if isinstance(config, methods.ScoreRegularisedConfig):
                student = Calls(2, student.plain + 2, guided + (guided if config.flow == "teacher" else 0))
            critic = Calls(1, (config.student_steps + 1) / 2 + 2 * heads, 0)
            return Calls(*((own + steps * other) / (1 + steps) for own, other in zip(student, critic, strict=True)))
        case methods.AdversarialConfig():  # tokens of the teacher's first blocks count as the whole; through them goes a gradient
            steps = config.critic.steps
            seen = 0 if config.critic.in_pixels else 3 + steps * (2 + config.critic.mismatched + bool(config.critic.smoothness))
            asked = guided if config.distillation_weight else 0
            return Calls(1 / (1 + steps), steps / (1 + steps), (asked + seen) / (1 + steps))
        case _:
            assert_never(config)


def critic_of(config: methods.Method) -> methods.CriticConfig | None:
    """What trains in turns with the student, if anything does."""
    match config:
        case (
            methods.DistributionMatchingConfig()
            | methods.ScoreRegularisedConfig()
            | methods.AdversarialConfig()
            | methods.MomentMatchingConfig()
        ):
            return config.critic
        case _:
            return None


def has_second_network(config: methods.Method) -> bool:
    """Whether its critic is a network as large as the teacher, not heads alone."""
    critic = critic_of(config)
    return critic is not None and not isinstance(critic, methods.HeadsConfig)


def teacher_engine(config: methods.Method, engine: EngineConfig) -> EngineConfig:
    """How the teacher lies on the ranks of `engine`: as its student does, but whole where gradients go through it."""
    match config:
        case methods.AdversarialConfig() if not config.critic.in_pixels:
            return engine.model_copy(update={"zero_stage": 0})
        case methods.MomentMatchingConfig(critic=None):  # differentiated by its weights
            return engine.model_copy(update={"zero_stage": 0, "precision": "fp32"})
        case _:
            return engine


def traits_of(config: methods.Method) -> Traits:
    """What the students of the method can do."""
    match config:
        case methods.ConsistencyConfig():
            return Traits(any_steps=config.phases == 1)
        case methods.MeanFlowConfig() | methods.ContinuousConsistencyConfig():
            return Traits()
        case methods.ProgressiveConfig():
            return Traits(any_steps=False, any_time=False)
        case methods.MomentMatchingConfig():
            return Traits(any_steps=False, any_time=False, follows_flow=False)
        case methods.ScoreRegularisedConfig():
            return Traits(follows_flow=False)
        case methods.DistributionMatchingConfig() | methods.AdversarialConfig():
            return Traits(any_time=False, follows_flow=False)
        case _:
            assert_never(config)
