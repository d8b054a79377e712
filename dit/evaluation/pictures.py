"""Pictures that a person looks at: contact sheets, and grids of videos that play together."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data_pipelines.video import write_gif, write_mp4

GAP, LINE, LETTER = 8, 15, 6  # pixels, a letter on the average
WIDTH = 1200


def contact_sheet(videos: Tensor, captions: Sequence[str], path: Path, frames: int = 5, columns: int | None = None) -> None:
    """Write a PNG: a strip of up to `frames` frames for each video (B, T, H, W, 3) uint8, its caption below it.

    columns: None for as many as `WIDTH` pixels hold.
    """
    strips = [_strip(video, frames) for video in videos.numpy()]
    cell_width = strips[0].shape[1]
    scale = max(1, min(4, (72 if videos.shape[1] > 1 else 96) // videos.shape[2]))
    cell_width, cell_height = max(cell_width * scale, 96), strips[0].shape[0] * scale
    columns = columns or max(1, min(len(strips), (WIDTH - GAP) // (cell_width + GAP)))
    font, ink = ImageFont.load_default(11), (120, 120, 120)
    texts = [textwrap.wrap(caption, cell_width // LETTER, max_lines=2, placeholder="…") for caption in captions]
    row_height = cell_height + LINE * max(map(len, texts)) + GAP
    rows = -(-len(strips) // columns)
    sheet = Image.new("RGB", (columns * (cell_width + GAP) + GAP, rows * row_height + 2 * GAP), (250, 250, 248))
    for index, (strip, lines) in enumerate(zip(strips, texts, strict=True)):
        x, y = GAP + index % columns * (cell_width + GAP), GAP + index // columns * row_height
        picture = Image.fromarray(strip)
        sheet.paste(picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST), (x, y))
        ImageDraw.Draw(sheet).multiline_text((x, y + cell_height + 2), "\n".join(lines), fill=ink, font=font, spacing=2)
    sheet.save(path)


def video_grid(videos: Tensor, columns: int | None = None) -> np.ndarray:
    """(B, T, H, W, 3) uint8 -> (T, rows*H, columns*W, 3) uint8, the videos beside each other with a thin line between them."""
    count, frames, height, width, _ = videos.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    grid = np.full((frames, rows * (height + 1) + 1, columns * (width + 1) + 1, 3), 255, np.uint8)
    for index, video in enumerate(videos.numpy()):
        y, x = 1 + index // columns * (height + 1), 1 + index % columns * (width + 1)
        grid[:, y : y + height, x : x + width] = video
    return grid


def write_video_grid(videos: Tensor, path: Path, *, fps: float = 6.0, columns: int | None = None) -> None:
    """Write the videos (B, T, H, W, 3) uint8 as one looping GIF or as an MP4, by the suffix of `path`."""
    grid = video_grid(videos, columns)
    factor = max(1, 640 // grid.shape[2])
    grid = grid.repeat(factor, axis=1).repeat(factor, axis=2)
    if path.suffix == ".gif":
        write_gif(path, grid, fps)
    else:
        write_mp4(path, grid, fps, lossless=False)


def _strip(video: np.ndarray, frames: int) -> np.ndarray:
    """(T, H, W, 3) -> (H, n*(W+1)-1, 3): evenly spaced frames in a row."""
    chosen = np.unique(np.linspace(0, len(video) - 1, min(frames, len(video))).round().astype(int))
    line = np.full((video.shape[1], 1, 3), 255, np.uint8)
    parts = [part for index in chosen for part in (video[index], line)]
    return np.concatenate(parts[:-1], axis=1)
