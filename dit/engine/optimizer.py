"""AdamW whose states include the average of the weights, and the learning rate as a function of samples seen.

Knows nothing of sharding: ZeRO hands it flat fp32 partitions in place of the parameters, so moments and averages are sharded too.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dit.config.engine import OptimizerConfig


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

    state[p]["ema"] <- beta ema + (1 - beta) p, beta = min(ema_decay, (1 + k) / (10 + k)) with k the steps taken, this one
    included. The learning rate is zero until it is set, so that a trial step of a wrapper changes no weight.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], config: OptimizerConfig, ema_decay: float) -> None:
        super().__init__(groups, lr=0.0, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True)
        self.ema_decay = ema_decay

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step."""
        for group in self.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def reset(self) -> None:
        """Make the states of a run that has taken no step: moments zero, averages equal to the weights."""
        self.state.clear()
        for group in self.param_groups:
            for p in group["params"]:
                moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                self.state[p] = {"step": torch.tensor(0.0, device=p.device), **moments, "ema": p.detach().clone()}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """AdamW step of every parameter that has a gradient, then the step of its average."""
        assert closure is None, "closures are not supported"
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    average(state["ema"], p, ema_beta(self.ema_decay, int(state["step"])))


def ema_beta(decay: float, k: int) -> float:
    """Weight of the old average at step `k` (from 1): `decay`, shorter in the first steps so that the start is forgotten."""
    return min(decay, (1 + k) / (10 + k))


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
