"""AdamW whose states include the average of the weights, and the learning rate as a function of samples seen.

Knows nothing of sharding: ZeRO hands it flat fp32 partitions in place of the parameters, so moments and averages are sharded too.
"""

import math
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit.config.engine import EMAConfig, OptimizerConfig
from dit.engine import profiles


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights of linear layers and convolutions with weight decay; biases, norms, tables and embeddings without."""
    owners = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    matrices = {id(m.weight) for m in module.modules() if isinstance(m, owners)}
    decayed = [p for p in module.parameters() if id(p) in matrices]
    plain = [p for p in module.parameters() if id(p) not in matrices]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class AdamWithEMA(torch.optim.AdamW):
    """Decoupled AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, alg. 2) that averages the weights after each of its steps.

    state[p][kind] <- beta state[p][kind] + (1 - beta) p for each kind of average, beta as `ema_betas` says of the steps taken, this
    one included. The learning rate is zero until it is set, so that a trial step of a wrapper changes no weight.
    groups: with `betas`, `eps`, `weight_decay` and `network`. turn: the network whose groups the next step changes, and no other.
    admit: asked before each step; False leaves weights and states as they are.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], ema: EMAConfig, turn: str) -> None:
        super().__init__(groups, lr=0.0, fused=True)
        self.ema, self.turn = ema, turn
        self.admit: Callable[[], bool] = lambda: True

    @property
    def groups_in_turn(self) -> list[dict[str, Any]]:
        """What the next step changes."""
        return [group for group in self.param_groups if group["network"] == self.turn]

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step."""
        for group in self.groups_in_turn:
            group["lr"] = lr

    @torch.no_grad()
    def reset(self, weights: Sequence[Tensor], averaged: Container[int]) -> None:
        """Make the states of a run that has taken no step with `weights`: moments zero, averages, of those `averaged`, the weights."""
        self.state.clear()
        for number, p in enumerate(weights):
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            averages = {kind: p.detach().clone() for kind in ema_kinds(self.ema) if number in averaged}
            self.state[p] = {"step": torch.tensor(0.0, device=p.device), **moments, **averages}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """AdamW step of every parameter in turn that has a gradient, then that of its averages; nothing unless `admit` allows it."""
        assert closure is None, "closures are not supported"
        if not self.admit():
            return
        everything, self.param_groups = self.param_groups, self.groups_in_turn
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    for kind, beta in ema_betas(self.ema, int(state["step"])).items():
                        if kind in state:
                            average(state[kind], p, beta)
        self.param_groups = everything


def ema_kinds(config: EMAConfig) -> list[str]:
    """Names of the averages that a run keeps."""
    return list(ema_betas(config, 1))


def ema_betas(config: EMAConfig, k: int) -> dict[str, float]:
    """Weight of the old average at step `k` (from 1), by kind.

    "ema": `decay`, shorter in the first steps so that the start is forgotten. "ema_S": (1 - 1/k)^(gamma + 1), the power-function
    profile of relative width S (Karras et al. 2023, arXiv:2312.02696, section 3.1).
    """
    plain = {"ema": min(config.decay, (1 + k) / (10 + k))}
    return plain | {f"ema_{width:g}": (1 - 1 / k) ** (profiles.gamma_of(width) + 1) for width in config.sigma_rel}


def average(ema: Tensor, weights: Tensor, beta: float) -> None:
    """ema <- beta ema + (1 - beta) weights, in place."""
    ema.lerp_(weights, 1 - beta)


def lr_at(config: OptimizerConfig, samples_seen: int, total: int) -> float:
    """Learning rate of the step that brings the run to `samples_seen` of `total`: linear warm-up, then constant or cosine."""
    if samples_seen < config.warmup_samples:
        return config.lr * samples_seen / config.warmup_samples
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (samples_seen - config.warmup_samples) / max(1, total - config.warmup_samples))
    low = config.final_lr_fraction
    return config.lr * (low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2)
