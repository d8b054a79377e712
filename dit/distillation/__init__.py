"""Few-step students of a trained teacher: objectives like those of `dit.diffusion`, with a teacher in them.

A new method is a file here, a class in `dit/config/distillation.py` and a `case` in `build_distillation`.
"""

from torch import Tensor

from dit.config.distillation import ConsistencyConfig
from dit.config.objective import SamplingConfig, ShiftConfig
from dit.diffusion import ClassifierFreeGuidance, Denoiser, Objective
from dit.distillation.consistency import ConsistencyDistillation, student_sampling


def build_distillation(
    config: ConsistencyConfig, teacher: Denoiser, null_text: Tensor, null_label: int | None, token_shift: ShiftConfig | None
) -> Objective:
    """The objective of a distillation. teacher: the raw network, guided here. null_text: (S0, D). token_shift: the teacher's."""
    match config:
        case ConsistencyConfig():
            guided = ClassifierFreeGuidance(teacher, null_text, config.guidance.scale, null_label)
            return ConsistencyDistillation(config, guided, token_shift)


def build_student_sampling(config: ConsistencyConfig) -> SamplingConfig:
    """How the student of a method is sampled; stored with it."""
    match config:
        case ConsistencyConfig():
            return student_sampling(config)


__all__ = ["ConsistencyDistillation", "build_distillation", "build_student_sampling", "student_sampling"]
