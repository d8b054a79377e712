"""Which sizes are allowed, and which of them a raw sample takes. Knows nothing of tokens."""

import math
from collections.abc import Iterable
from itertools import product

from data_pipelines.config import Size, SizeRule
from data_pipelines.errors import UserError


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


def expand(rule: SizeRule, frames: tuple[int, int], multiple: tuple[int, int], key: str) -> list[Size]:
    """The sizes of `rule`, sorted. frames: first and step; the step and the `multiple` of height and width hold where the rule gives none.

    Each side is at most one multiple from where area and aspect are exact, the area never above. Raises UserError that names `key`.
    """
    first, step = frames[0], rule.frame_step or frames[1]
    y, x = (rule.multiple, rule.multiple) if rule.multiple else multiple
    sides = set()
    for pixels, text in product(rule.pixels, rule.aspects):
        w, h = map(int, text.split(":"))
        exact = (math.sqrt(pixels * h / w), math.sqrt(pixels * w / h))
        near = [(side // part * part, -(-side // part) * part) for side, part in zip(exact, (y, x), strict=True)]
        fitting = [(int(a), int(b)) for a, b in product(*near) if 0 < a * b <= pixels]
        if not fitting:
            raise UserError(f"{key}.pixels = {pixels} holds no frame of {text} whose sides are multiples of {y} and {x}; raise it")
        sides.add(min(fitting, key=lambda size: (abs(math.log(size[1] * h / (size[0] * w))), -size[0] * size[1])))
    return sorted((count, *side) for side in sides for count in range(first, rule.max_frames + 1, step))
