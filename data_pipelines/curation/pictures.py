"""Scores of plain arithmetic on the frames of a candidate: brightness, contrast, change, repeats.

Brightness of a pixel is ITU-R BT.601 luma, 0 to 1.
"""

import numpy as np

from data_pipelines.curation.candidates import Candidate, Look
from data_pipelines.video import Frames

_SAME = 0.5 / 255  # mean difference below which a frame repeats another: compression changes less than that


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
    steps = _differences(look)
    return float(np.mean(steps)) if steps else None


def repeats(_: Candidate, look: Look) -> float | None:
    """Fraction of consecutive frames that are the same."""
    steps = _differences(look)
    return float(np.mean([step < _SAME for step in steps])) if steps else None


def _differences(look: Look) -> list[float]:
    return [float(np.abs(luma(a) - luma(b)).mean()) for a, b in look.pairs]
