"""A noise schedule that is learned with the network (Kingma et al. 2021, arXiv:2107.00630, sections 4 and 5.1).

The bound depends on the schedule through its two ends only. So the ends are trained on the bound, and what lies between on the variance
of its estimate. (The least noise-prediction error is no goal for a schedule: it is zero where all is noise.)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipelines.packed import PackedLatents
from dit.config.objective import ObjectiveConfig, VariationalConfig
from dit.diffusion.denoiser import Denoiser, ask
from dit.diffusion.objectives import drop_conditions, noised
from dit.diffusion.paths import Coefficients, Path, on_tokens
from dit.diffusion.times import uniforms
from dit.runtime.losses import Losses


class LearnedSchedule(nn.Module, Path):
    """gamma = ln(b^2 / a^2) of a path with a^2 + b^2 = 1: rises from one end to the other in `pieces` straight pieces of t.

    ends: gamma at t = 0 and 1. A network is told how far gamma has come, in [0, 1].
    """

    def __init__(self, ends: tuple[float, float], pieces: int) -> None:
        super().__init__()
        self.ends = nn.Parameter(torch.tensor(ends))
        self.logits = nn.Parameter(torch.zeros(pieces))  # of the share of the rise in each piece

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How far gamma has come at t, in [0, 1], its slope by t, and its ends; float64.

        All that is asked of the weights: under ZeRO stage 3 they are whole inside this call alone.
        """
        shares = self.logits.double().softmax(0)
        knots, place = F.pad(shares.cumsum(0), (1, 0)), t.double() * len(shares)
        piece = place.floor().long().clamp(0, len(shares) - 1)
        return knots[piece] + (place - piece) * shares[piece], len(shares) * shares[piece], self.ends.double()

    def at(self, t: Tensor) -> Coefficients:
        return between(*self(t))

    def label(self, t: Tensor) -> Tensor:
        progress, _, _ = self(t)
        return progress.to(t)


def between(progress: Tensor, slope: Tensor, ends: Tensor) -> Coefficients:
    """Coefficients where gamma has come so far from one end to the other and rises at this slope."""
    first, last = ends
    gamma, rate = first + (last - first) * progress, (last - first) * slope
    a, b = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
    return Coefficients(a, b, -a * b.square() * rate / 2, b * a.square() * rate / 2)


class _Fixed(Path):
    """A schedule at the levels of one batch, as tensors through which its gradients are weighed."""

    def __init__(self, coefficients: Coefficients, progress: Tensor) -> None:
        self.coefficients, self.progress = coefficients, progress

    def at(self, t: Tensor) -> Coefficients:
        return self.coefficients

    def label(self, t: Tensor) -> Tensor:
        return self.progress.to(t)


class VariationalDiffusion:
    """The continuous-time bound in nats per dimension, gamma' / 2 |noise - answer|^2 and the two ends (their eqs. 11 and 17).

    The gradient that the inner schedule receives is that of the squared loss, so it lowers the variance (their section 5.1).
    """

    def __init__(self, null_text: Tensor, null_label: int | None, condition_dropout: float) -> None:
        self.null_text, self.null_label, self.condition_dropout = null_text, null_label, condition_dropout

    def __call__(self, network: Denoiser, batch: PackedLatents, progress: float) -> Losses:
        """The bound of each sample, zero for holes. network: predicts noise and carries its schedule; one call of it."""
        schedule = schedule_of(network)
        t = uniforms(batch.keys, None).to(batch.tokens.device)
        come, slope, ends = schedule(t)
        level = _Fixed(between(come, slope, ends), come)
        x_t, noise, _ = noised(batch, t, level)
        cond = drop_conditions(batch.cond, batch.keys, self.condition_dropout, self.null_text, self.null_label)
        answer = ask(network, level, x_t, t.float(), cond).float()
        first, last = ends
        error = batch.cond.per_sample((answer - noise).square())
        losses = (last - first) * slope * error / 2 + _ends(ends, batch)
        if come.requires_grad:
            scale = 2 * losses.detach()
            come.register_hook(lambda gradient: gradient * scale)
            slope.register_hook(lambda gradient: gradient * scale)
        return Losses(losses.float() * batch.weights, t.float())


def schedule_of(network: object) -> LearnedSchedule:
    """The schedule that a network carries."""
    schedule = getattr(network, "schedule", None)
    assert isinstance(schedule, LearnedSchedule), "the network was not equipped with its schedule"
    return schedule


def equip(network: nn.Module, config: ObjectiveConfig) -> nn.Module:
    """The network with all that its objective trains beside it, as a part of its weights."""
    if isinstance(config, VariationalConfig):
        network.schedule = LearnedSchedule(config.path.ends, config.path.pieces)
    return network


def _ends(ends: Tensor, batch: PackedLatents) -> Tensor:
    """KL of the noise end to N(0, I), and the density of the latents given x_0, (n,)."""
    one = torch.ones(len(batch.keys), dtype=torch.float64, device=batch.tokens.device)
    a, b, _, _ = between(one, one, ends)
    mean = on_tokens(a, batch.cond, batch.tokens) * batch.tokens
    prior = batch.cond.per_sample(mean.square()) / 2 + (b.square() - 1) / 2 - b.log()
    return prior + (math.log(2 * math.pi) + ends[0] + 1) / 2
