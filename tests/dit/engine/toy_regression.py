"""A small regression with unequal packs, as plain torch and for the engine: the same data, step by step, for any number of ranks."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dit.config import FitRun
from dit.config.engine import OptimizerConfig
from dit.engine.optimizer import average, ema_betas, lr_at, parameter_groups
from dit.engine.turns import Turns
from dit.runtime.losses import Losses

PACK_SIZES = (3, 5, 1, 7)
"""Samples of each of the four packs of a global step."""
STEP_SAMPLES = sum(PACK_SIZES)


class Net(nn.Module):
    """Odd sizes, so that ranks share parameters; a table and an embedding, which weight decay must leave alone."""

    def __init__(self, width: int = 11) -> None:
        super().__init__()
        self.inner = nn.Linear(7, width)
        self.norm = nn.LayerNorm(width)
        self.table = nn.Parameter(torch.randn(1, width))
        self.classes = nn.Embedding(3, width)
        self.outer = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 7) -> (n, 3)."""
        x = x.to(self.inner.weight.dtype)
        label = (x[:, 0] > 0).long()
        return self.outer(torch.tanh(self.norm(self.inner(x)) + self.table + self.classes(label))).float()


def new_net(width: int = 11) -> Net:
    torch.manual_seed(0)
    return Net(width)


@dataclass(frozen=True)
class Pack:
    x: Tensor
    ids: tuple[str, ...]
    weights: Tensor
    breaks_gradient: bool = False
    """A finite loss whose gradient is no number."""

    @property
    def grids(self) -> list[tuple[int, int, int]]:
        """As if each sample were one token."""
        return [(1, 1, 1)] * len(self.ids)


class Place(NamedTuple):
    step: int


@dataclass(frozen=True)
class Step:
    packs: list[Pack]
    samples: int
    position: Place
    bad: list[tuple[str, str]] = field(default_factory=list)


def pack_of(step: int, number: int) -> Pack:
    """Pack `number` of global step `step`, from 0."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    size = PACK_SIZES[number]
    ids = tuple(f"shard-{step}/{number}-{i}" for i in range(size))
    return Pack(torch.randn(size, 7, generator=generator), ids, torch.ones(size))


def stream(rank: int, world: int, start: int = 0) -> Iterator[Step]:
    """The steps of one rank, from `start` on, for ever."""
    each = len(PACK_SIZES) // world
    step = start
    while True:
        packs = [pack_of(step, rank * each + i) for i in range(each)]
        yield Step(packs, STEP_SAMPLES, Place(step + 1))
        step += 1


def target_of(pack: Pack) -> Tensor:
    """A fixed function of the input."""
    return torch.stack([pack.x.sum(1), pack.x[:, 0].sin(), pack.x[:, 1:3].prod(1)], dim=1)  # (n, 3)


def losses_of(net: nn.Module, pack: Pack) -> Losses:
    """Squared error to a fixed function of the input."""
    answer = net(pack.x)
    if pack.breaks_gradient:
        answer = answer + (0 * answer).sqrt()
    return Losses((answer - target_of(pack)).square().mean(1) * pack.weights, torch.linspace(0, 1, len(pack.x)))


def run_config(out: str, **changes: Any) -> FitRun:
    """A run of 12 steps whose gradients are clipped in some steps and not in others."""
    values: dict[str, Any] = {
        "out": out,
        "optimizer": {"lr": 1e-2, "weight_decay": 0.3, "warmup_samples": 64, "schedule": "cosine", "max_grad_norm": 3.0},
        "engine": {"whole_below": 0},
        "ema": {"decay": 0.7, "sigma_rel": [0.05, 0.1]},
        "train": {"samples": 12 * STEP_SAMPLES, "save_every_steps": 5, "log_every_steps": 3, "keep_checkpoints": 2},
    }
    values["validation"] = {"source": "unused", "every_steps": 4}
    values["preview"] = {"prompts": ["unused"], "size": (2, 4, 4), "every_steps": 6}
    for section, value in changes.items():
        values[section] = {**values.get(section, {}), **value}
    return FitRun.model_validate(values)


def reference(run: FitRun, steps: int) -> tuple[Net, dict[str, Tensor], list[float]]:
    """Plain torch: AdamW on the mean loss of each global step, clipped, and averages. Returns network, averages, gradient norms."""
    net = new_net()
    config = run.optimizer
    adam = torch.optim.AdamW(
        parameter_groups(net, config.weight_decay), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.0, foreach=False
    )
    ema = {name: p.detach().clone() for name, p in net.named_parameters()}
    norms = []
    for step in range(steps):
        adam.zero_grad()
        losses = torch.cat([losses_of(net, pack_of(step, number)).per_sample for number in range(len(PACK_SIZES))])
        losses.mean().backward()
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), config.max_grad_norm)))
        for group in adam.param_groups:
            group["lr"] = lr_at(config, (step + 1) * STEP_SAMPLES, run.train.samples)
        adam.step()
        for name, p in net.named_parameters():
            average(ema[name], p.detach(), ema_betas(run.ema, step + 1)["ema"])
    return net, ema, norms


class Pair(nn.Module):
    """Two networks that train in turns: `second` predicts what `first` answers, and `first` learns through it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = new_net(), new_net(9)

    def forward(self, name: str, x: Tensor) -> Tensor:
        return getattr(self, name)(x)


def pair_losses(pair: Pair, turn: str, pack: Pack) -> Losses:
    """In the turn of `first` the gradient goes through `second`."""
    answer = pair("first", pack.x)
    through = pair("second", torch.cat([answer, pack.x[:, 3:]], dim=1))
    error = answer - target_of(pack) + through if turn == "first" else through - answer.detach()
    return Losses(error.square().mean(1) * pack.weights, torch.linspace(0, 1, len(pack.x)))


def pair_turns(run: FitRun) -> Turns:
    """`second` for two steps, then `first` for one, with optimizers that have nothing in common."""
    other = OptimizerConfig(lr=3e-2, betas=(0.5, 0.8), eps=1e-6, weight_decay=0.1, max_grad_norm=0.5)
    return Turns({"first": run.optimizer, "second": other}, lambda step: "first" if step % 3 == 2 else "second")


def pair_reference(run: FitRun, steps: int) -> tuple[Pair, dict[str, Tensor]]:
    """Plain torch: an AdamW for each network, and the average of the first."""
    pair, turns = Pair(), pair_turns(run)
    ema = {name: p.detach().clone() for name, p in pair.first.named_parameters()}
    adams = {
        name: torch.optim.AdamW(
            parameter_groups(pair.get_submodule(name), c.weight_decay), lr=c.lr, betas=c.betas, eps=c.eps, weight_decay=0.0, foreach=False
        )
        for name, c in turns.optimizers.items()
    }
    for step in range(steps):
        turn = turns.of_step(step)
        pair.zero_grad()
        losses = torch.cat([pair_losses(pair, turn, pack_of(step, number)).per_sample for number in range(len(PACK_SIZES))])
        losses.mean().backward()
        nn.utils.clip_grad_norm_(pair.get_submodule(turn).parameters(), turns.optimizers[turn].max_grad_norm)
        for group in adams[turn].param_groups:
            group["lr"] = lr_at(turns.optimizers[turn], (step + 1) * STEP_SAMPLES, run.train.samples)
        adams[turn].step()
        if turn == "first":
            for name, p in pair.first.named_parameters():
                average(ema[name], p.detach(), ema_betas(run.ema, (step + 1) // 3)["ema"])
    return pair, ema
