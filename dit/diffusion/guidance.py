"""Classifier-free guidance as a denoiser around a denoiser (Ho & Salimans 2022, arXiv:2207.12598, eq. 6, with s = w + 1)."""

import torch
from torch import Tensor

from data_pipelines.packed import Conditioning
from dit.diffusion.denoiser import Denoiser


class ClassifierFreeGuidance:
    """v_null + s (v_cond - v_null), both conditions in one call of the network; s = 1 is one plain call.

    null_text: (S0, D). null_label: class that stands for "no class", if there are classes.
    """

    def __init__(self, denoiser: Denoiser, null_text: Tensor, scale_s: float, null_label: int | None) -> None:
        self.denoiser = denoiser
        self.null_text = null_text
        self.scale_s = scale_s
        self.null_label = null_label

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Guided velocity (L, P) of x_t (L, P) at t (R,)."""
        if self.scale_s == 1:
            return self.denoiser(x_t, t, cond)
        assert cond.rows is None or int(cond.rows.max()) + 1 == len(t), "every row of t must be in use, for rows are renumbered"
        both = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), self._null(cond).beside(cond))  # (2L, P)
        v_null, v_cond = both.to(x_t.dtype).chunk(2)  # 2 x (L, P)
        return v_null + self.scale_s * (v_cond - v_null)

    def _null(self, cond: Conditioning) -> Conditioning:
        labels = None
        if cond.labels is not None:
            assert self.null_label is not None, "labels without a null label"
            labels = torch.full_like(cond.labels, self.null_label)
        return cond.with_text([self.null_text.to(cond.text)] * len(cond.grids), labels)
