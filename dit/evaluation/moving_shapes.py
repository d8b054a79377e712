"""Judge videos of moving shapes against their captions, exactly: no learned judge, only geometry and the renderer.

A video is measured (`observe`): the centroid of whatever stands out from the background in each frame, a straight
line through the centroids, then the renderer of `data_pipelines.moving_shapes` refitted along that line with every
shape and size. What was measured is then compared with what the caption said (`check`).

Letters: N videos, T frames, H rows, W columns, M candidate renderings. Coordinates as in the renderer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from data_pipelines.moving_shapes import (
    BACKGROUND,
    HEADINGS,
    PALETTE,
    RADII,
    SHAPES,
    SIDE,
    SPEEDS,
    Attributes,
    coverage,
    positions,
    start_region,
)

CONTRAST_FLOOR = 0.3  # RGB distance from the background below which a pixel is noise
VISIBLE_WEIGHT = 2.0  # least contrast (summed over pixels) with which a frame shows a shape at all
WINDOW = 8.0  # pixels around the first estimate of a centroid that count for the second
LEAST_SPEED = 0.2  # pixels a frame; below it there is no direction
SPEED_TOLERANCE = 0.4  # pixels a frame, around the nominal speeds 0.5 and 1.5
RENDER_TOLERANCE = 0.12  # RMS residual over the whole picture
LOCAL_RENDER_TOLERANCE = 0.15  # RMS residual over the square around the shape
LOCAL_MARGIN = 1.5  # pixels by which that square exceeds the shape
SMOOTH_TOLERANCE = 0.25  # pixels, RMS distance of the centroids from the straight line
OFFSETS = (-0.3, 0.0, 0.3)  # pixels, tried along each axis when refitting

REACH = 9  # pixels around the pixel of a centre that any candidate may cover: the largest radius, a half, an offset, and one more

_KINDS = tuple(itertools.product(SHAPES, RADII))
_SHIFTS = np.array(tuple(itertools.product(OFFSETS, OFFSETS)))  # 9 2


@dataclass(frozen=True)
class Observation:
    """What a video shows. Where no shape is visible in some frame, `visible` is false and the rest means nothing."""

    visible: bool
    shape: str
    size: str
    colour: str
    centre: tuple[float, float]  # of the fitted trajectory in the middle of the clip, (x, y) in pixels
    velocity: tuple[float, float]  # pixels a frame
    jitter: float  # RMS distance of the centroids from the straight line, pixels
    residual: float  # RMS difference from the best refit in the palette colour, whole picture
    local_residual: float  # the same, over the square around the shape


MEANT = ("shape", "colour", "direction", "speed")
"""What the mean adherence is of."""


@dataclass(frozen=True)
class Adherence:
    """Which parts of the caption a video fulfils, and whether it is a clean picture in smooth motion."""

    shape: bool
    colour: bool
    size: bool
    position: bool
    direction: bool
    speed: bool
    render: bool
    smooth: bool

    @property
    def all(self) -> bool:
        """Whether every one of the above holds."""
        return all(getattr(self, field.name) for field in fields(self))


# --- measuring --------------------------------------------------------------------------------------------------


def _as_float(videos: np.ndarray) -> np.ndarray:
    """Bring videos to float32 in [0, 1] (values a little outside are clipped); refuse what is no video."""
    videos = np.asarray(videos)
    if videos.ndim != 5 or videos.shape[2:] != (SIDE, SIDE, 3) or videos.shape[1] < 2:
        raise ValueError(f"got videos of shape {videos.shape}, expected (N, T, {SIDE}, {SIDE}, 3) with T >= 2")
    if videos.dtype == np.uint8:
        return videos.astype(np.float32) / 255
    if not np.issubdtype(videos.dtype, np.floating):
        raise ValueError(f"got videos of dtype {videos.dtype}, expected uint8 or floating point in [0, 1]")
    if not np.isfinite(videos).all():
        raise ValueError("got videos with NaN or infinite values")
    if np.median(videos) < -0.5:
        raise ValueError(f"got a median pixel of {np.median(videos):.2f}: videos must lie in [0, 1], not in [-1, 1]")
    return np.clip(videos, 0, 1, dtype=np.float32)


def _weighted_centres(weight: np.ndarray) -> np.ndarray:
    """Average the pixel coordinates: weight (N, T, H, W) -> (N, T, 2); the weights must not sum to less than zero."""
    grid = np.arange(SIDE) + 0.5
    moments = np.stack([weight.sum(2) @ grid, weight.sum(3) @ grid], axis=-1)  # N T 2
    return moments / np.maximum(weight.sum((2, 3)), 1e-6)[..., None]


def _centroids(contrast: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Locate what stands out: contrast (N, T, H, W, 3) -> centroids (N, T, 2), weights (N, T).

    A first estimate from the pixels that stand out clearly, which is robust but shifts by the sub-pixel phase; then an
    unbiased one from every pixel in a window around it, projected onto the colour of the shape.
    """
    strength = np.sqrt(np.einsum("nthwc,nthwc->nthw", contrast, contrast))
    clear = np.maximum(strength - CONTRAST_FLOOR, 0)  # N T H W
    rough = _weighted_centres(clear)
    colour = np.einsum("nthw,nthwc->nc", clear, contrast)
    colour /= np.maximum(np.linalg.norm(colour, axis=1, keepdims=True), 1e-6)
    distance = np.abs(np.arange(SIDE) + 0.5 - rough[..., None])  # N T 2 side
    inside = (distance < WINDOW).astype(np.float32)
    window = inside[:, :, 1, :, None] * inside[:, :, 0, None, :]  # N T H W
    projected = np.einsum("nthwc,nc->nthw", contrast, colour) * window
    return _weighted_centres(projected), clear.sum((2, 3))


def _fit_lines(centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit straight motion by least squares: (N, T, 2) -> trajectories (N, T, 2), velocities (N, 2), jitter (N,)."""
    frames = centroids.shape[1]
    time = np.arange(frames) - (frames - 1) / 2
    centres = centroids.mean(1, keepdims=True)
    velocities = np.einsum("t,ntc->nc", time, centroids) / (time**2).sum()
    trajectories = centres + time[None, :, None] * velocities[:, None]
    jitter = np.sqrt(((centroids - trajectories) ** 2).sum(-1).mean(1))
    return trajectories, velocities, jitter


def _nearest_colour(colour: np.ndarray) -> str:
    return min(PALETTE, key=lambda name: float(((colour - PALETTE[name]) ** 2).sum()))


def _refit(contrast: np.ndarray, trajectory: np.ndarray) -> tuple[str, str, str, float, float]:
    """Find the rendering nearest to one video: contrast (T, H, W, 3), trajectory (T, 2).

    Each candidate is scored with its best colour, which is linear least squares; the residual that is returned is
    the one with the palette colour nearest to it.
    """
    corners = np.clip(np.floor(trajectory) - REACH, 0, SIDE - 2 * REACH - 1).astype(int)  # T 2
    span = slice(2 * REACH + 1)
    pixels = np.concatenate([frame[y:, x:][span, span].reshape(-1, 3) for frame, (x, y) in zip(contrast, corners, strict=True)])
    centres = trajectory - corners + _SHIFTS[:, None]  # 9 T 2, from the corner of each frame's window
    masks = np.concatenate(  # M pixels
        [coverage(shape, RADII[size], centres, 2 * REACH + 1).reshape(len(_SHIFTS), -1) for shape, size in _KINDS]
    )
    projections = masks @ pixels  # M 3
    energies = np.einsum("mp,mp->m", masks, masks)
    best = int(np.argmax((projections**2).sum(1) / np.maximum(energies, 1e-6)))
    (shape, size), shift = _KINDS[best // len(_SHIFTS)], _SHIFTS[best % len(_SHIFTS)]
    colour = _nearest_colour(BACKGROUND + projections[best] / max(float(energies[best]), 1e-6))

    offset = np.array(PALETTE[colour], np.float32) - np.array(BACKGROUND, np.float32)
    rendered = coverage(shape, RADII[size], trajectory + shift)[..., None] * offset
    error = ((contrast - rendered) ** 2).mean(-1)  # T H W
    around = coverage("square", (RADII[size] + LOCAL_MARGIN) / 0.9, trajectory + shift) > 0.5  # the renderer's square is 0.9 radii wide
    return shape, size, colour, float(np.sqrt(error.mean())), float(np.sqrt(error[around].mean()) if around.any() else np.inf)


def observe(videos: np.ndarray) -> list[Observation]:
    """Measure videos (N, T, H, W, 3), uint8 or float in [0, 1]; some milliseconds a video."""
    contrast = _as_float(videos) - np.array(BACKGROUND, np.float32)
    centroids, totals = _centroids(contrast)
    trajectories, velocities, jitters = _fit_lines(centroids)
    observations = []
    for n in range(len(contrast)):
        shape, size, colour, residual, local_residual = _refit(contrast[n], trajectories[n])
        observations.append(
            Observation(
                visible=bool((totals[n] > VISIBLE_WEIGHT).all()),
                shape=shape,
                size=size,
                colour=colour,
                centre=tuple(trajectories[n].mean(0).tolist()),
                velocity=tuple(velocities[n].tolist()),
                jitter=float(jitters[n]),
                residual=residual,
                local_residual=local_residual,
            )
        )
    return observations


# --- judging ----------------------------------------------------------------------------------------------------


def direction_of(velocity: tuple[float, float]) -> str | None:
    """Name the heading nearest to a velocity, None for a clip that hardly moves."""
    if np.hypot(*velocity) < LEAST_SPEED:
        return None
    return max(HEADINGS, key=lambda name: float(np.dot(HEADINGS[name], velocity)))


def _position_of(centre: tuple[float, float], direction: str) -> str:
    """Name the third in which the centre lies, across the axis of the motion that was asked for."""
    across = 1 if HEADINGS[direction][1] == 0 else 0
    return positions(direction)[int(np.clip(centre[across] * 3 / SIDE, 0, 2))]


def judge(seen: Observation, attributes: Attributes) -> Adherence:
    """Compare what a video shows with what its caption says."""
    if not seen.visible:
        return Adherence(*[False] * len(fields(Adherence)))
    return Adherence(
        shape=seen.shape == attributes.shape,
        colour=seen.colour == attributes.colour,
        size=seen.size == attributes.size,
        position=_position_of(seen.centre, attributes.direction) == attributes.position,
        direction=direction_of(seen.velocity) == attributes.direction,
        speed=abs(float(np.hypot(*seen.velocity)) - SPEEDS[attributes.speed]) < SPEED_TOLERANCE,
        render=seen.residual < RENDER_TOLERANCE and seen.local_residual < LOCAL_RENDER_TOLERANCE,
        smooth=seen.jitter < SMOOTH_TOLERANCE,
    )


def check_batch(videos: np.ndarray, attributes: Sequence[Attributes]) -> list[Adherence]:
    """Judge videos (N, T, H, W, 3), uint8 or float in [0, 1], against one `Attributes` each."""
    if len(videos) != len(attributes):
        raise ValueError(f"got {len(videos)} videos and {len(attributes)} attributes, expected as many of each")
    return [judge(seen, wanted) for seen, wanted in zip(observe(videos), attributes, strict=True)]


# --- recovered space --------------------------------------------------------------------------------------------


def recovered(videos: np.ndarray) -> np.ndarray:
    """Place videos in the space of what the renderer draws from: (N, T, H, W, 3) -> (N, 11).

    Centre in units of 8 pixels (2), velocity in pixels a frame (2), radius in units of 2 pixels, RGB (3), one-hot shape (3).
    A clip that shows nothing is a shape of no kind and no size, in the colour of the background, at rest in the middle.
    """
    return np.array([_vector(seen) for seen in observe(videos)], np.float32)


def _vector(seen: Observation) -> list[float]:
    if not seen.visible:
        return [SIDE / 16, SIDE / 16, 0, 0, 0, *BACKGROUND, 0, 0, 0]
    x, y = seen.centre
    return [x / 8, y / 8, *seen.velocity, RADII[seen.size] / 2, *PALETTE[seen.colour], *(float(seen.shape == name) for name in SHAPES)]


def relative_starts(videos: np.ndarray, attributes: Sequence[Attributes]) -> np.ndarray:
    """Where each video starts in the box of starts that its caption allows, (x, y) in [0, 1]^2 for a lawful one: (N, 2), NaN if invisible.

    The renderer draws these uniformly, so a model that learned one clip for each caption shows here, and only here.
    """
    starts = np.full((len(videos), 2), np.nan, np.float32)
    frames = np.shape(videos)[1]
    for n, (seen, wanted) in enumerate(zip(observe(videos), attributes, strict=True)):
        if seen.visible:
            low, high = start_region(wanted, frames)
            starts[n] = (np.array(seen.centre) - np.array(seen.velocity) * (frames - 1) / 2 - low) / (high - low)
    return starts


# --- reporting --------------------------------------------------------------------------------------------------


def summarise(adherences: Sequence[Adherence]) -> dict:
    """Average over clips: one rate an attribute, `all`, `mean` (of shape, colour, direction, speed), `count`."""
    if not adherences:
        raise ValueError("got no clips to summarise")
    names = [field.name for field in fields(Adherence)] + ["all"]
    rates = {name: float(np.mean([getattr(adherence, name) for adherence in adherences])) for name in names}
    rates["mean"] = float(np.mean([rates[name] for name in MEANT]))
    return {**rates, "count": len(adherences)}
