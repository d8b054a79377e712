"""What trains beside a student: a copy of the teacher, heads that judge tokens, and whose turn it is.

Must not know how networks are built or sharded.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_pipelines.packed import Conditioning, Grid, PackedLatents
from dit.config.distillation import (
    AdversarialConfig,
    DistributionMatchingConfig,
    HeadsConfig,
    Method,
    MomentMatchingConfig,
    ScoreRegularisedConfig,
)
from dit.diffusion.denoiser import Denoiser

Discriminator = Callable[[Tensor, Tensor, PackedLatents], Tensor]
"""From x_t (L, P) and t (n,), in place of the tokens of a pack, to logits (L, heads), float32: high for data, low for samples of the
student, both noised to t."""


class Looks(NamedTuple):
    """What a frozen network sees in latents as a viewer sees them, decoded.

    layers(tokens (l, P) of a sample, its grid, its key): features (S, D) of each layer for heads, with gradient by the tokens. widths:
    D of each. text_width, classes: of the conditions.
    """

    layers: Callable[[Tensor, Grid, int], list[Tensor]]
    widths: Sequence[int]
    text_width: int
    classes: int | None


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


class ToldHeads(nn.Module):
    """A small network a layer, on places that know nothing of captions, so it is told: logit w.h + c.h of the mean h over the places, c of
    the caption and the class (projection, Miyato & Koyama 2018, arXiv:1802.05637, as in ADD)."""

    def __init__(self, width: int, looks: Looks) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(nn.Sequential(nn.LayerNorm(each), nn.Linear(each, width), nn.GELU()) for each in looks.widths)
        self.plain = nn.ModuleList(nn.Linear(width, 1) for _ in looks.widths)
        self.caption = nn.Sequential(nn.LayerNorm(looks.text_width), nn.Linear(looks.text_width, width * len(looks.widths)))
        self.label = None if looks.classes is None else nn.Embedding(looks.classes, width * len(looks.widths))

    def forward(self, layers: Sequence[Tensor], places: Sequence[Sequence[int]], cond: Conditioning) -> Tensor:
        """(R, D) of each layer, all samples after one another, and how many are of each -> (n, heads), float32."""
        dtype = next(self.parameters()).dtype
        told = self.caption(torch.stack([part.mean(0) for part in cond.text.split(cond.text_lengths)]).to(dtype))
        if self.label is not None:
            labels = told.new_zeros(len(told), dtype=torch.long) if cond.labels is None else cond.labels  # a pack of holes alone has none
            told = told + self.label(labels)
        said = []
        for body, plain, one, counts, c in zip(self.bodies, self.plain, layers, places, told.chunk(len(layers), dim=1), strict=True):
            h = torch.stack([part.mean(0) for part in body(one.to(dtype)).split(list(counts))])  # (n, width)
            said.append(plain(h) + (c * h).sum(1, keepdim=True) / h.shape[1] ** 0.5)
        return torch.cat(said, dim=1).float()


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


def with_critic(config: Method, student: nn.Module, start: nn.Module, width: int, looks: Looks | None = None) -> nn.Module:
    """The student, with the critic that its method has. start: of a second network, the teacher as trained, not guided. width: of its
    tokens. looks: of pixels."""
    match config:
        case DistributionMatchingConfig() | ScoreRegularisedConfig():
            heads = config.critic.heads
            network = copy.deepcopy(start).requires_grad_(True)
            return Networks(student, Critic(network, Heads(heads, width) if heads else None, heads.blocks if heads else ()))
        case MomentMatchingConfig() if config.critic:
            return Networks(student, Critic(copy.deepcopy(start).requires_grad_(True), None, ()))
        case AdversarialConfig():
            return Networks(student, ToldHeads(config.critic.width, looks) if looks else Heads(config.critic, width))
        case _:
            return student


def student_of(module: Denoiser) -> Denoiser:
    """The student in what `with_critic` made; what has none is one."""
    return partial(module, "student") if isinstance(module, Networks) else module


def heads_of(config: Method) -> HeadsConfig | None:
    """The heads on tokens of a backbone that a method has."""
    match config:
        case AdversarialConfig():
            return None if config.critic.in_pixels else config.critic
        case DistributionMatchingConfig() | ScoreRegularisedConfig():
            return config.critic.heads
        case _:
            return None


def discriminator_of(config: Method, module: nn.Module, teacher: nn.Module, looks: Looks | None = None) -> Discriminator | None:
    """What the heads in `module` say, if there are any: of decoded clips, of the teacher's tokens, or of the critic's own."""
    if looks:
        return partial(_judged_in_pixels, looks, module)
    heads = heads_of(config)
    if heads is None:
        return None
    if isinstance(config, AdversarialConfig):
        features: Any = teacher.features
        return lambda x_t, t, batch: module("critic", features(x_t, t, batch.cond, heads.blocks))
    return lambda x_t, t, batch: module("critic", x_t, t, batch.cond, True)


def _judged_in_pixels(looks: Looks, module: nn.Module, tokens: Tensor, t: Tensor, batch: PackedLatents) -> Tensor:
    """Sample by sample, for clips of a pack differ in size; of a decoder and its network, one sample is in memory. The heads are called
    once, on all ranks alike."""
    cond, found = batch.cond, []
    for part, grid, key in zip(tokens.split(cond.lengths), cond.grids, batch.keys, strict=True):
        found.append(checkpoint(looks.layers, part, grid, key, use_reentrant=False, preserve_rng_state=False))
    layers = list(zip(*found, strict=True))
    places = [[len(part) for part in layer] for layer in layers]
    return cond.per_token(module("critic", [torch.cat(layer) for layer in layers], places, cond))
