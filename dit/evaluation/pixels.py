"""Figures of single clips: likeness of two versions of a clip, and how well its frames fit to one another.

Videos (N, T, H, W, 3) uint8; every function returns one float32 a clip. Knows nothing of networks or diffusion.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

PSNR_CAP = 100.0
"""Decibels of clips that are equal."""


def as_float(videos: Tensor) -> Tensor:
    """(..., H, W, 3) uint8 -> (..., 3, H, W) float32 in [0, 1]."""
    assert videos.dtype == torch.uint8, videos.dtype
    return videos.movedim(-1, -3).float() / 255


def psnr(videos: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of whole clips in dB, 10 log10(1 / mean squared error) of values in [0, 1], at most 100."""
    error = (as_float(videos) - as_float(others)).square().flatten(1).mean(1)
    return (-10 * error.log10()).clamp(max=PSNR_CAP)


def ssim(videos: Tensor, others: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861, eq. 13), mean over frames and RGB.

    Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03, only where the window fits; frames of at least 11 x 11.
    """
    x, y = (as_float(z).flatten(0, 2)[:, None].double() for z in (videos, others))  # (N T 3, 1, H, W)
    offset = torch.arange(11, dtype=torch.float64, device=x.device) - 5
    window = torch.exp(-offset.square() / (2 * 1.5**2))
    window = window / window.sum()

    def mean(z: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(z, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))

    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    values = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return values.flatten(1).mean(1).view(len(videos), -1).mean(1).float()


def warping_error(videos: Tensor, block: int, radius: int) -> Tensor:
    """How badly each frame is made of pieces of the one before: block matching in place of an optical flow, which would be a network.

    Every `block` x `block` square of frame k + 1 is compared with the squares of frame k shifted by up to `radius` pixels (edges
    repeated); the least mean squared difference is averaged over squares and frames, and its root returned, in [0, 1]. A still has zero.
    """
    frames = as_float(videos)
    before, after = frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1)  # (N (T-1), 3, H, W)
    padded = F.pad(before, (radius,) * 4, mode="replicate")
    height, width = after.shape[2:]
    least = torch.full((1,), torch.inf, device=after.device)
    for dy in range(2 * radius + 1):
        for dx in range(2 * radius + 1):
            difference = (padded[:, :, dy : dy + height, dx : dx + width] - after).square().mean(1, keepdim=True)
            least = torch.minimum(least, F.avg_pool2d(difference, block))
    return least.view(len(videos), -1).mean(1).sqrt()


def frame_similarity(features: Tensor) -> Tensor:
    """Mean cosine between the features of neighbouring frames: (N, T, D) -> (N,)."""
    return F.cosine_similarity(features[:, :-1], features[:, 1:], dim=-1).mean(1).float()


def feature_distance(maps: list[Tensor], others: list[Tensor]) -> Tensor:
    """Distance in the manner of LPIPS (Zhang et al. 2018, arXiv:1801.03924, eq. 1) with equal weights in place of learned ones.

    Layers (N, S, D) of any network: each place's vector is brought to unit length; squared differences are averaged over places, summed
    over layers. Not LPIPS: nothing was fitted to human judgement, and figures of different networks cannot be compared.
    """
    pairs = zip(maps, others, strict=True)
    return torch.stack([(F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).square().sum(-1).mean(1) for a, b in pairs]).sum(0).float()
