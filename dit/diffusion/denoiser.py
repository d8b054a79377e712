"""The one contract of the room: whatever predicts velocity is a denoiser, be it a backbone, a guided one or a formula."""

from typing import Protocol

from torch import Tensor

from data_pipelines.packed import Conditioning


class Denoiser(Protocol):
    """Predict the velocity of each token.

    x_t: (L, P) noised tokens. t: (R,) noise levels in [0, 1], one a conditioning row (R = n samples unless `cond.rows` says
    which row each token is at). Returns (L, P).
    """

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning, /) -> Tensor: ...
