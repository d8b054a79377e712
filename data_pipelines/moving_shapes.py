"""Procedural captioned video whose truth is known exactly: one shape that moves in a straight line.

Every clip follows from (seed, index), every caption names every attribute of its clip, and a fixed set of
attribute combinations is kept out of training. So a text-to-video model trained here can be judged without
a learned judge (see `dit.evaluation.moving_shapes`).

Letters: T frames, H rows, W columns. Coordinates are (x, y) in pixels, x to the right and y down; the centre
of the pixel in row i and column j is (j + 0.5, i + 0.5).
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

FRAMES = 9  # 1 + 4k: fits causal video codecs, which take the first frame alone and then groups of four
SIDE = 32  # pixels, height and width
BACKGROUND = (0.06, 0.06, 0.06)  # RGB in [0, 1]

SHAPES = ("square", "disc", "cross")
PALETTE = {
    "red": (0.95, 0.15, 0.15),
    "green": (0.15, 0.85, 0.15),
    "blue": (0.20, 0.30, 1.00),
    "yellow": (0.95, 0.90, 0.15),
    "magenta": (0.90, 0.20, 0.90),
    "cyan": (0.15, 0.90, 0.95),
}
RADII = {"small": 4.5, "large": 6.5}  # pixels from the centre to the farthest edge along an axis
HEADINGS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = {"slowly": 0.5, "quickly": 1.5}  # pixels a frame
ROWS = ("top", "middle", "bottom")  # positions of a clip that moves horizontally
COLUMNS = ("left", "centre", "right")  # positions of a clip that moves vertically

POSITION_MARGIN = 1.0  # pixels between a centre and the border of its third, so that the class is never in doubt
EDGE_MARGIN = 1.0  # pixels between the shape and the edge of the picture: the outermost ring stays background

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Attributes:
    """Everything that a caption says about a clip."""

    shape: str
    colour: str
    size: str
    direction: str
    speed: str
    position: str

    def __post_init__(self) -> None:
        allowed = {"shape": SHAPES, "colour": tuple(PALETTE), "size": tuple(RADII), "direction": tuple(HEADINGS), "speed": tuple(SPEEDS)}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(values)}")
        if self.position not in positions(self.direction):
            expected = ", ".join(positions(self.direction))
            raise ValueError(f"position={self.position!r}: a clip that moves {self.direction} lies near one of {expected}")


class Clip(NamedTuple):
    """One sample: `video` (T, H, W, 3) uint8, its caption and the truth behind it."""

    video: np.ndarray
    caption: str
    attributes: Attributes
    start: tuple[float, float]  # centre of the shape in the first frame, (x, y) in pixels


def positions(direction: str) -> tuple[str, str, str]:
    """Name the thirds of the axis perpendicular to `direction`, in the order of the coordinate."""
    return ROWS if HEADINGS[direction][1] == 0 else COLUMNS


# --- captions ---------------------------------------------------------------------------------------------------

_GRAMMAR = re.compile(
    rf"a (?P<size>{'|'.join(RADII)}) (?P<colour>{'|'.join(PALETTE)}) (?P<shape>{'|'.join(SHAPES)}) "
    rf"moving (?P<direction>{'|'.join(HEADINGS)}) (?P<speed>{'|'.join(SPEEDS)}) "
    rf"near the (?P<position>{'|'.join(ROWS + COLUMNS)})"
)


def caption(attributes: Attributes) -> str:
    """Say the attributes in one sentence of ten words."""
    a = attributes
    return f"a {a.size} {a.colour} {a.shape} moving {a.direction} {a.speed} near the {a.position}"


def parse(text: str) -> Attributes:
    """Read the attributes back from a caption; raise ValueError for a sentence outside the grammar."""
    match = _GRAMMAR.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(
            f"not a caption of moving shapes: {text!r}; expected "
            "'a SIZE COLOUR SHAPE moving DIRECTION SPEED near the POSITION', such as "
            "'a small red square moving left slowly near the top', with "
            f"SIZE in {tuple(RADII)}, COLOUR in {tuple(PALETTE)}, SHAPE in {SHAPES}, DIRECTION in {tuple(HEADINGS)}, "
            f"SPEED in {tuple(SPEEDS)}, POSITION in {ROWS} (left, right) or {COLUMNS} (up, down)"
        )
    return Attributes(**match.groupdict())


def _held_out_combinations() -> frozenset[tuple[str, str, str, str]]:
    """Choose 12 of the 144 (shape, colour, direction, speed).

    Each pair (shape, direction) occurs once, each colour twice with different shapes and directions, each speed six
    times: so every single attribute value stays common in training.
    """
    colours, directions, speeds = tuple(PALETTE), tuple(HEADINGS), tuple(SPEEDS)
    return frozenset((SHAPES[s], colours[(2 * s + d) % 6], directions[d], speeds[(s + d // 2) % 2]) for s in range(3) for d in range(4))


HELD_OUT = _held_out_combinations()


def split_of(attributes: Attributes) -> Split:
    """Tell whether a combination of attributes may be trained on."""
    a = attributes
    return "held_out" if (a.shape, a.colour, a.direction, a.speed) in HELD_OUT else "train"


ALL_ATTRIBUTES = tuple(
    Attributes(shape, colour, size, direction, speed, position)
    for shape, colour, size, direction, speed in itertools.product(SHAPES, PALETTE, RADII, HEADINGS, SPEEDS)
    for position in positions(direction)
)
_BY_SPLIT = {name: tuple(a for a in ALL_ATTRIBUTES if split_of(a) == name) for name in ("train", "held_out")}


def all_attributes(split: Split | None = None) -> tuple[Attributes, ...]:
    """List every combination of attributes (864), or those of one split (792 and 72), in a fixed order."""
    if split is None:
        return ALL_ATTRIBUTES
    if split not in _BY_SPLIT:
        raise ValueError(f"split={split!r}: expected one of {', '.join(_BY_SPLIT)}")
    return _BY_SPLIT[split]


def all_captions(split: Split | None = None) -> list[str]:
    """List every caption, or those of one split, in a fixed order."""
    return [caption(a) for a in all_attributes(split)]


# --- pictures ---------------------------------------------------------------------------------------------------


def _interval(centre: np.ndarray, half: float, side: int) -> np.ndarray:
    """Measure the part of each pixel of a row inside [centre - half, centre + half]: (...,) -> (..., side)."""
    distance = np.abs(np.arange(side, dtype=np.float32) + 0.5 - np.asarray(centre, np.float32)[..., None])
    return np.clip(half + 0.5 - distance, 0, 1)


def _box(x: np.ndarray, y: np.ndarray, half_x: float, half_y: float, side: int) -> np.ndarray:
    return _interval(y, half_y, side)[..., :, None] * _interval(x, half_x, side)[..., None, :]


def coverage(shape: str, radius: float, centres: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Render the part of each pixel that a shape covers, anti-aliased: centres (..., 2) -> (..., side, side) in [0, 1].

    Exact pixel areas for square and cross; for the disc, the signed distance to its edge clipped to one pixel.
    """
    x, y = centres[..., 0], centres[..., 1]
    match shape:
        case "square":
            return _box(x, y, 0.9 * radius, 0.9 * radius, side)
        case "disc":
            grid = np.arange(side, dtype=np.float32) + 0.5
            dx = grid - np.asarray(x, np.float32)[..., None]
            dy = grid - np.asarray(y, np.float32)[..., None]
            distance = np.sqrt(dx[..., None, :] ** 2 + dy[..., :, None] ** 2)
            return np.clip(radius + 0.5 - distance, 0, 1)
        case "cross":
            arm = 0.36 * radius
            bars = _box(x, y, radius, arm, side) + _box(x, y, arm, radius, side)
            return bars - _box(x, y, arm, arm, side)
        case _:
            raise ValueError(f"shape={shape!r}: expected one of {', '.join(SHAPES)}")


def trajectory(attributes: Attributes, start: tuple[float, float], frames: int = FRAMES) -> np.ndarray:
    """Follow the centre of the shape through the clip: (T, 2) in pixels."""
    velocity = SPEEDS[attributes.speed] * np.array(HEADINGS[attributes.direction])
    return np.asarray(start) + velocity * np.arange(frames)[:, None]


def render_float(attributes: Attributes, centres: np.ndarray) -> np.ndarray:
    """Render the shape at the given centres: (..., 2) -> (..., H, W, 3) float32 in [0, 1]."""
    alpha = coverage(attributes.shape, RADII[attributes.size], centres)[..., None]
    background, colour = np.array(BACKGROUND, np.float32), np.array(PALETTE[attributes.colour], np.float32)
    return background + alpha * (colour - background)


def render(attributes: Attributes, start: tuple[float, float], frames: int = FRAMES) -> np.ndarray:
    """Render a clip: (T, H, W, 3) uint8."""
    video = render_float(attributes, trajectory(attributes, start, frames))
    return np.round(video * 255).astype(np.uint8)


# --- samples ----------------------------------------------------------------------------------------------------


def start_region(attributes: Attributes, frames: int = FRAMES) -> tuple[np.ndarray, np.ndarray]:
    """Bound the legal starts, ((x, y) lowest, (x, y) highest): inside the picture all along, and inside the third named."""
    reach = RADII[attributes.size] + EDGE_MARGIN
    travel = SPEEDS[attributes.speed] * (frames - 1) * np.array(HEADINGS[attributes.direction])
    low = reach - np.minimum(travel, 0)
    high = SIDE - reach - np.maximum(travel, 0)
    across = 1 if travel[0] else 0  # the axis perpendicular to the motion
    third = positions(attributes.direction).index(attributes.position)
    low[across] = max(low[across], third * SIDE / 3 + POSITION_MARGIN)
    high[across] = min(high[across], (third + 1) * SIDE / 3 - POSITION_MARGIN)
    return low, high


def draw(seed: int, index: int, split: Split = "train") -> Clip:
    """Draw sample `index` of the stream `seed`: uniform over the captions of the split and over the legal starts.

    A pure function of its arguments: the counter of a Philox generator is placed by (index, split).
    """
    choices = all_attributes(split)
    counter = np.array([0, 0, index, tuple(_BY_SPLIT).index(split)], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=seed, counter=counter))
    attributes = choices[generator.integers(len(choices))]
    low, high = start_region(attributes)
    x, y = (low + (high - low) * generator.random(2)).tolist()
    return Clip(render(attributes, (x, y)), caption(attributes), attributes, (x, y))
