"""Few-step students of a trained teacher: objectives like those of `dit.diffusion`, with a teacher in them.

A new method is a file here, a class in `dit/config/distillation.py` and a `case` in `build_distillation`.
"""

from collections.abc import Sequence
from typing import Literal, assert_never

from dit.config import distillation as methods
from dit.config.backbone import SpatioTemporalDiTConfig
from dit.config.objective import Guidance, SamplingConfig, ShiftConfig
from dit.diffusion import Denoiser
from dit.distillation.adversarial import Adversarial
from dit.distillation.consistency import ConsistencyDistillation
from dit.distillation.continuous_consistency import ContinuousConsistency
from dit.distillation.distribution_matching import DistributionMatching, ScoreRegularised
from dit.distillation.flow import Alternating, Distillation, Objective
from dit.distillation.gap import teacher_gap
from dit.distillation.mean_flow import MeanFlow
from dit.distillation.moment_matching import AlternatingMoments, MomentMatching, Weight
from dit.distillation.networks import Discriminator, Looks, discriminator_of, heads_of, student_of, turn_of, with_critic
from dit.distillation.progressive import Progressive
from dit.distillation.traits import critic_of, has_second_network, step_calls, teacher_engine, traits_of


def build_distillation(
    config: methods.Method,
    teacher: Denoiser,
    token_shift: ShiftConfig | None,
    critic: Denoiser | None = None,
    judge: Discriminator | None = None,
    weights: Sequence[Weight] = (),
) -> Distillation | Alternating:
    """The objective of a distillation. teacher: on rectified flow, frozen, guided already. token_shift: that of its training.

    critic, judge: what trains beside the student, for methods that have it. weights: of the teacher's network, for methods that
    differentiate it by them.
    """
    match config:
        case methods.DistributionMatchingConfig():
            assert critic is not None
            return DistributionMatching(config.critic, config.student_steps, teacher, critic, judge, token_shift)
        case methods.ScoreRegularisedConfig():
            assert critic is not None
            matching = DistributionMatching(config.critic, config.student_steps, teacher, critic, judge, token_shift)
            return ScoreRegularised(config, ContinuousConsistency(config, teacher, token_shift), matching)
        case methods.AdversarialConfig():
            assert judge is not None
            return Adversarial(config, teacher, judge, token_shift)
        case methods.ConsistencyConfig():
            return ConsistencyDistillation(config, teacher, token_shift)
        case methods.MeanFlowConfig():
            return MeanFlow(config, teacher, token_shift)
        case methods.ContinuousConsistencyConfig():
            return ContinuousConsistency(config, teacher, token_shift)
        case methods.ProgressiveConfig():
            return Progressive(config, teacher, token_shift)
        case methods.MomentMatchingConfig(critic=None):
            return MomentMatching(config, teacher, token_shift, weights)
        case methods.MomentMatchingConfig():
            assert critic is not None
            return AlternatingMoments(config, teacher, critic, token_shift)
        case _:
            assert_never(config)


def objective_at(method: Distillation | Alternating, step: int) -> Objective:
    """What step number `step` of a run trains on."""
    return method.at(step) if isinstance(method, Alternating) else method


def build_student_sampling(config: methods.Method) -> SamplingConfig:
    """How the student of a method is sampled; stored with it. Its guidance is baked in, or an input.

    A student that jumps to the data predicts, is noised afresh, and repeats; one that jumps from level to level takes Euler steps; one
    that predicts the data as a teacher does, ancestral ones.
    """
    steps_down = (methods.MeanFlowConfig, methods.ProgressiveConfig, methods.MomentMatchingConfig)
    to_data = not isinstance(config, steps_down) and not (isinstance(config, methods.ConsistencyConfig) and config.phases > 1)
    sampler: Literal["consistency", "euler", "ancestral"] = "consistency" if to_data else "euler"
    if isinstance(config, methods.MomentMatchingConfig):
        sampler = "ancestral"
    scale = config.guidance.scale if takes_guidance(config) else 1.0
    return SamplingConfig(sampler=sampler, steps=config.student_steps, guidance=Guidance(s=scale))


def student_backbone(config: methods.Method, teacher: SpatioTemporalDiTConfig) -> SpatioTemporalDiTConfig:
    """The backbone of the student: that of its teacher, with the inputs that its method needs."""
    inputs = {"jumps": isinstance(config, methods.MeanFlowConfig), "guided": takes_guidance(config)}
    return teacher.model_copy(update={name: True for name, needed in inputs.items() if needed})


def critic_backbone(config: methods.Method, teacher: SpatioTemporalDiTConfig) -> SpatioTemporalDiTConfig:
    """The backbone of a second network: that of the teacher, with the jump of the student's last step as input where it matches samples of
    several numbers of steps."""
    several = isinstance(config, methods.DistributionMatchingConfig | methods.ScoreRegularisedConfig) and config.student_steps > 1
    return teacher.model_copy(update={"jumps": True}) if several else teacher


def takes_guidance(config: methods.Method) -> bool:
    """Whether its student is told the scale of guidance."""
    return isinstance(config, methods.ConsistencyConfig) and config.guidance_range is not None


__all__ = [
    "Adversarial",
    "Alternating",
    "AlternatingMoments",
    "ConsistencyDistillation",
    "ContinuousConsistency",
    "Distillation",
    "DistributionMatching",
    "Looks",
    "MeanFlow",
    "MomentMatching",
    "Progressive",
    "ScoreRegularised",
    "Weight",
    "build_distillation",
    "build_student_sampling",
    "critic_backbone",
    "critic_of",
    "discriminator_of",
    "has_second_network",
    "heads_of",
    "objective_at",
    "step_calls",
    "student_backbone",
    "student_of",
    "takes_guidance",
    "teacher_engine",
    "teacher_gap",
    "traits_of",
    "turn_of",
    "with_critic",
]
