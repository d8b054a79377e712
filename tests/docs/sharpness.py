"""The example of docs/extend/metric.md."""

# begin
import torch
from torch import Tensor

from dit.evaluation.metrics import Metric
from dit.evaluation.pixels import as_float
from dit.runtime.figures import mean_figure


def sharpness(videos: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, in [0, 1]: videos (N, T, H, W, 3) uint8 -> (N,)."""
    frames = as_float(videos)  # (N, T, 3, H, W)
    across, down = frames.diff(dim=-1).abs(), frames.diff(dim=-2).abs()
    return (across.flatten(1).mean(1) + down.flatten(1).mean(1)) / 2


SHARPNESS = Metric(
    name="sharpness",
    rows=lambda batch: torch.stack([sharpness(batch.videos)], dim=1),  # (n, 1): one row a clip
    figures=lambda rows, reference, repeats: {"": mean_figure(rows[:, 0])},
    facts={"version": 1},
)
# end
