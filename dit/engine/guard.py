"""Whether a step can be trusted: judged from its loss and gradient norm, which all ranks know, before any state changes.

Knows no tensors and takes no action. Its memory is part of a checkpoint, so a resumed run judges as the uninterrupted one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from data_pipelines.errors import UserError
from dit.config.engine import GuardConfig

LEAST_DEVIATION = 0.05
"""Of the median: a run whose norms hardly vary has no spike below some two times its median."""


class UntrustedStep(UserError):
    """A step cannot be trusted and the run may not go on without it. Weights are those of the last good one."""

    exit_code = 93


@dataclass(frozen=True)
class Verdict:
    """What to do with a step; `reason` says why, unless it is taken as it is."""

    action: Literal["take", "clip", "skip", "rollback", "stop"]
    reason: str = ""

    @property
    def is_taken(self) -> bool:
        """Whether weights change."""
        return self.action in ("take", "clip")


class Guard:
    """Judges steps one after another, each by those of the same network. All values that it remembers are finite ones of steps taken."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.judged = 0
        self.losses: dict[str, list[float]] = {}
        self.norms: dict[str, list[float]] = {}
        self.bad: list[int] = []
        """Numbers of the judgements, not of the steps: a rollback repeats step numbers."""

    def max_norm(self, configured: float, network: str = "") -> float:
        """Where to clip the next gradient of `network`: as configured, or at the limit of a spike if that is lower."""
        return min(configured, self._limit(self.norms.get(network, []))) if self.config.on_spike == "clip" else configured

    def judge(self, loss: float, norm: float, network: str = "") -> Verdict:
        """Judge a step of `network` by its mean `loss` and gradient `norm`, and remember it."""
        losses, norms = self.losses.get(network, []), self.norms.get(network, [])
        verdict = self._judge(loss, losses, norm, norms)
        self.judged += 1
        if verdict.is_taken:
            self.losses = self.losses | {network: [*losses, loss][-self.config.window :]}
            self.norms = self.norms | {network: [*norms, min(norm, self._limit(norms))][-self.config.window :]}
            return verdict
        self.bad = [number for number in self.bad if number > self.judged - self.config.window] + [self.judged]
        if len(self.bad) > self.config.max_bad_steps and verdict.action != "stop":
            more = f"; {len(self.bad)} bad steps in {self.config.window}, guard.max_bad_steps is {self.config.max_bad_steps}"
            return Verdict("stop", verdict.reason + more)
        return verdict

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"judged": self.judged, "losses": self.losses, "norms": self.norms, "bad": self.bad}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Take up what `state` kept, or a part of it; None is of a checkpoint without a guard, and lists are of one without networks."""
        kept = state or {}
        for name in self.state().keys() & kept.keys():
            setattr(self, name, {"": kept[name]} if name in ("losses", "norms") and isinstance(kept[name], list) else kept[name])

    def _judge(self, loss: float, losses: Sequence[float], norm: float, norms: Sequence[float]) -> Verdict:
        policy = self.config.on_spike
        if not math.isfinite(loss):
            return Verdict(self.config.on_nonfinite, "the loss is not finite")
        if not math.isfinite(norm):
            return Verdict(self.config.on_nonfinite, "the gradients are not finite")
        if policy == "ignore":
            return Verdict("take")
        for name, value, past in (("gradient norm", norm, norms), ("loss", loss, losses)):
            limit = self._limit(past)
            if value > limit and (policy != "clip" or name == "gradient norm"):
                return Verdict(policy, f"the {name} {value:.4g} is above {limit:.4g}, its median is {median(past):.4g}")
        return Verdict("take")

    def _limit(self, past: Sequence[float]) -> float:
        if len(past) < self.config.window // 4:
            return math.inf
        middle = median(past)
        deviation = 1.4826 * median(abs(value - middle) for value in past)  # that of a normal distribution
        return middle + self.config.spike_deviations * max(deviation, LEAST_DEVIATION * abs(middle))
