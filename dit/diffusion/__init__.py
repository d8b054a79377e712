"""The mathematics of diffusion on packed tokens: paths, levels, objectives, guidance and samplers.

A new objective is a file here, a class in `dit/config/objective.py` and a `case` in `build_objective`.
"""

from typing import assert_never

from torch import Tensor

from dit.config.objective import DDPMConfig, DiffusionConfig, ObjectiveConfig, RectifiedFlowConfig, VariationalConfig
from dit.diffusion.cascade import Cascade, Upsampler, lowered
from dit.diffusion.clean_tokens import Told
from dit.diffusion.ddpm import DDPM
from dit.diffusion.denoiser import Denoiser, OnPath, Predicting
from dit.diffusion.editing import Known, complete, invert, vary
from dit.diffusion.guidance import AtScale, AutoGuidance, ClassifierFreeGuidance, ClassifierGuidance, Extrapolation, Within
from dit.diffusion.held_out import held_out_loss
from dit.diffusion.learned_schedule import VariationalDiffusion, equip, schedule_of
from dit.diffusion.multistep import dpmpp_2m, unipc
from dit.diffusion.objectives import Objective, Regression
from dit.diffusion.paths import Path, RectifiedFlow, build_path
from dit.diffusion.samplers import ancestral, consistency, ddim, euler, euler_maruyama, follow, heun, levels, rk4, sample
from dit.diffusion.times import RECTIFIED_FLOW, schedule, shift_of


def build_objective(config: ObjectiveConfig, null_text: Tensor, null_label: int | None) -> Objective:
    """The objective of a training run. null_text: (S0, D), the encoded empty caption. null_label: class for "no class", if any."""
    match config:
        case RectifiedFlowConfig() | DiffusionConfig():
            return Regression(config, null_text, null_label)
        case DDPMConfig():
            return DDPM(config, null_text, null_label)
        case VariationalConfig():
            return VariationalDiffusion(null_text, null_label, config.condition_dropout)
        case _:
            assert_never(config)


def path_of(config: ObjectiveConfig, network: Denoiser) -> Path:
    """The path of a network that was trained with the objective of `config`."""
    return schedule_of(network) if isinstance(config, VariationalConfig) else build_path(config.path)


def build_denoiser(config: ObjectiveConfig, network: Denoiser, path: Path | None = None) -> Denoiser:
    """A network that was trained with the objective of `config`, as a denoiser of its own path, or of `path`."""
    own = path_of(config, network)
    denoiser = Predicting(network, own, config.prediction)
    if path is None or (isinstance(path, RectifiedFlow) and isinstance(own, RectifiedFlow)):
        return denoiser
    return OnPath(denoiser, own, path)


__all__ = [
    "DDPM",
    "RECTIFIED_FLOW",
    "AtScale",
    "AutoGuidance",
    "Cascade",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "Denoiser",
    "Extrapolation",
    "Known",
    "Objective",
    "OnPath",
    "Path",
    "Predicting",
    "Regression",
    "Told",
    "Upsampler",
    "Within",
    "ancestral",
    "build_denoiser",
    "build_objective",
    "build_path",
    "complete",
    "consistency",
    "ddim",
    "dpmpp_2m",
    "equip",
    "euler",
    "euler_maruyama",
    "follow",
    "held_out_loss",
    "heun",
    "invert",
    "levels",
    "lowered",
    "path_of",
    "rk4",
    "sample",
    "schedule",
    "shift_of",
    "unipc",
    "vary",
]
