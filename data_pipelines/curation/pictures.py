"""Scores of plain arithmetic on the frames of a candidate: brightness, contrast, change, repeats.

Brightness of a pixel is ITU-R BT.601 luma, 0 to 1.
"""

import numpy as np

from data_pipelines.curation.candidates import Candidate, Look
from data_pipelines.video import Frames

_SAME = 2 / 255  # difference of the means of every block of 8 x 8 below which a frame repeats another: compression changes less
_BLOCK = 8


def luma(frame: Frames) -> np.ndarray:
    """Brightness of every pixel: (h, w, 3) uint8 -> (h, w) float32."""
    return frame.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32) / 255


def brightness(_: Candidate, look: Look) -> float:
    """Mean brightness of the darkest frame."""
    return min(float(luma(frame).mean()) for frame in look.frames)


def contrast(_: Candidate, look: Look) -> float:
    """Standard deviation of brightness in the flattest frame."""
    return min(float(luma(frame).std()) for frame in look.frames)


def change(_: Candidate, look: Look) -> float | None:
    """Mean absolute difference of consecutive frames."""
    return float(np.mean([np.abs(luma(a) - luma(b)).mean() for a, b in look.pairs])) if look.pairs else None


def repeats(_: Candidate, look: Look) -> float | None:
    """Fraction of consecutive frames that are the same everywhere: slow or small motion is no repeat."""
    return float(np.mean([np.abs(_blocks(a) - _blocks(b)).max() < _SAME for a, b in look.pairs])) if look.pairs else None


def _blocks(frame: Frames) -> np.ndarray:
    """Mean brightness of each block, edges repeated: (h, w, 3) -> (ceil(h / 8), ceil(w / 8))."""
    bright = luma(frame)
    height, width = (-side % _BLOCK for side in bright.shape)
    bright = np.pad(bright, ((0, height), (0, width)), mode="edge")
    return bright.reshape(bright.shape[0] // _BLOCK, _BLOCK, -1, _BLOCK).mean((1, 3))
