"""What trains beside a student: a copy of the teacher, heads that judge tokens, and whose turn it is.

Must not know how networks are built or sharded.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from data_pipelines.packed import Conditioning
from dit.config.distillation import AdversarialConfig, DistributionMatchingConfig, HeadsConfig, Method, ScoreRegularisedConfig
from dit.diffusion.denoiser import Denoiser

Discriminator = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""From x_t (L, P), t (R,) and conditions to logits (L, heads), float32: high for noised data, low for noised samples of the student."""


class Turn(NamedTuple):
    """Which network a step trains, and how many steps it has had before."""

    network: Literal["student", "critic"]
    number: int


def turn_of(step: int, critic_steps: int) -> Turn:
    """The turn of step number `step`, from 0: the critic for `critic_steps` steps, then the student for one, and so on."""
    rounds, place = divmod(step, critic_steps + 1)
    return Turn("student", rounds) if place == critic_steps else Turn("critic", rounds * critic_steps + place)


class Heads(nn.Module):
    """A small network a block, on each of its tokens alone. width: of the tokens."""

    def __init__(self, config: HeadsConfig, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.width), nn.GELU(), nn.Linear(config.width, 1)) for _ in config.blocks
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """(L, D) of each block -> (L, heads), float32."""
        dtype = next(self.parameters()).dtype
        return torch.cat([head(tokens.to(dtype)) for head, tokens in zip(self.heads, features, strict=True)], dim=1).float()


class Critic(nn.Module):
    """A network, with heads on its own tokens if there are any."""

    def __init__(self, network: nn.Module, heads: Heads | None, blocks: Sequence[int]) -> None:
        super().__init__()
        self.network, self.heads, self.blocks = network, heads, tuple(blocks)

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning, judges: bool = False) -> Tensor:
        """What the network answers, or what its heads say."""
        if not judges:
            return self.network(x_t, t, cond)
        assert self.heads is not None, "a critic without heads"
        features: Any = self.network.features
        return self.heads(features(x_t, t, cond, self.blocks))


class Networks(nn.Module):
    """A student and its critic, called by name, so that a wrapper of the whole sees every call."""

    def __init__(self, student: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.student, self.critic = student, critic

    def forward(self, name: Literal["student", "critic"], *inputs: Any) -> Tensor:
        """What one of them answers."""
        return self.get_submodule(name)(*inputs)


def with_critic(config: Method, student: nn.Module, teacher: nn.Module, width: int) -> nn.Module:
    """The student, with the critic that its method has. teacher: as trained, not guided. width: of its tokens."""
    match config:
        case DistributionMatchingConfig() | ScoreRegularisedConfig():
            heads = config.critic.heads
            network = copy.deepcopy(teacher).requires_grad_(True)
            return Networks(student, Critic(network, Heads(heads, width) if heads else None, heads.blocks if heads else ()))
        case AdversarialConfig():
            return Networks(student, Heads(config.critic, width))
        case _:
            return student


def student_of(module: Denoiser) -> Denoiser:
    """The student in what `with_critic` made; what has none is one."""
    return partial(module, "student") if isinstance(module, Networks) else module


def heads_of(config: Method) -> HeadsConfig | None:
    """The heads that a method has."""
    match config:
        case AdversarialConfig():
            return config.critic
        case DistributionMatchingConfig() | ScoreRegularisedConfig():
            return config.critic.heads
        case _:
            return None


def discriminator_of(config: Method, module: nn.Module, teacher: nn.Module) -> Discriminator | None:
    """What the heads in `module` say, if there are any: of the teacher's tokens, or of the critic's own."""
    heads = heads_of(config)
    if heads is None:
        return None
    if isinstance(config, AdversarialConfig):
        features: Any = teacher.features
        return lambda x_t, t, cond: module("critic", features(x_t, t, cond, heads.blocks))
    return lambda x_t, t, cond: module("critic", x_t, t, cond, True)
