"""The mathematics of diffusion on packed tokens: paths, levels, objectives, guidance and samplers.

A new objective is a file here, a class in `dit/config/objective.py` and a `case` in `build_objective`.
"""

from torch import Tensor

from dit.config.objective import RectifiedFlowConfig
from dit.diffusion.denoiser import Denoiser
from dit.diffusion.guidance import ClassifierFreeGuidance
from dit.diffusion.held_out import held_out_loss
from dit.diffusion.objectives import Objective, RectifiedFlow
from dit.diffusion.samplers import consistency, euler, heun, sample
from dit.diffusion.times import schedule, shift_of


def build_objective(config: RectifiedFlowConfig, null_text: Tensor, null_label: int | None) -> Objective:
    """The objective of a training run. null_text: (S0, D), the encoded empty caption. null_label: class for "no class", if any."""
    match config:
        case RectifiedFlowConfig():
            return RectifiedFlow(config, null_text, null_label)


__all__ = [
    "ClassifierFreeGuidance",
    "Denoiser",
    "Objective",
    "RectifiedFlow",
    "build_objective",
    "consistency",
    "euler",
    "held_out_loss",
    "heun",
    "sample",
    "schedule",
    "shift_of",
]
