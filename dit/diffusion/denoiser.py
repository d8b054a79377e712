"""The one contract of the room: whatever predicts velocity is a denoiser, be it a trained network, a guided one or a formula."""

from typing import Protocol

import torch
from torch import Tensor

from data_pipelines.packed import Conditioning
from dit.config.path import Quantity
from dit.diffusion.paths import Path, on_tokens


class Denoiser(Protocol):
    """Predict the velocity d x_t / d t of each token, on one path.

    x_t: (L, P) noised tokens. t: (R,) noise levels in [0, 1], one a conditioning row (R = n samples unless `cond.rows` says
    which row each token is at). Returns (L, P); beyond that many channels, what the network says of the variance.
    """

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning, /) -> Tensor: ...


def ask(network: Denoiser, path: Path, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """What a network on `path` answers, raw: it is given scaled tokens and the label of t."""
    scale = path.input_scale(t)
    return network(x_t if scale is None else on_tokens(scale, cond, x_t) * x_t, path.label(t), cond)


class Predicting:
    """A network that answers with a `prediction`, as a denoiser."""

    def __init__(self, network: Denoiser, path: Path, prediction: Quantity) -> None:
        self.network, self.path, self.prediction = network, path, prediction

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        raw = ask(self.network, self.path, x_t, t, cond).to(x_t.dtype)
        channels = x_t.shape[1]
        velocity = self.path.convert(raw[:, :channels], self.prediction, "velocity", x_t, t, cond)
        return velocity if raw.shape[1] == channels else torch.cat([velocity, raw[:, channels:]], dim=1)


class OnPath:
    """A denoiser of the path `own` as one of the path `target`: two paths differ in the scale of x_t and the rate of t only.

    Both are asked at the same b / a; above the largest that `own` has, at its end.
    """

    def __init__(self, denoiser: Denoiser, own: Path, target: Path) -> None:
        self.denoiser, self.own, self.target = denoiser, own, target

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        c = self.target.at(t)
        level = self.own.level_of(c.b / c.a)
        d = self.own.at(level)
        scale = ((d.a.square() + d.b.square()) / (c.a.square() + c.b.square())).sqrt()
        x, level = on_tokens(scale, cond, x_t) * x_t, level.to(t)
        velocity = self.denoiser(x, level, cond)[:, : x_t.shape[1]].to(x_t.dtype)
        latents = self.own.convert(velocity, "velocity", "latents", x, level, cond)
        noise = self.own.convert(velocity, "velocity", "noise", x, level, cond)
        return self.target.target("velocity", latents, noise, t, cond)
