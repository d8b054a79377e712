"""Which of the allowed sizes a raw sample takes. Knows nothing of tokens."""

import math
from collections.abc import Iterable

from data_pipelines.config import Size


def choose_size(frames: int, height: int, width: int, allowed: Iterable[Size]) -> Size | None:
    """The allowed [frames, height, width] with the most frames that the sample has, then the nearest aspect ratio.

    Among equal aspects: the largest that needs no enlarging, else the smallest. None if the sample is shorter than all.
    """
    fitting = [size for size in allowed if size[0] <= frames]
    if not fitting:
        return None
    longest = max(size[0] for size in fitting)

    def rank(size: Size) -> tuple[float, bool, int]:
        _, h, w = size
        aspect = abs(math.log((w * height) / (h * width)))
        enlarged = h > height or w > width
        return aspect, enlarged, h * w if enlarged else -h * w

    return min((size for size in fitting if size[0] == longest), key=rank)
