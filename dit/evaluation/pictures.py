"""Pictures that a person looks at: contact sheets, and grids of videos that play together."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data_pipelines.video import write_gif, write_mp4

BACKGROUND, INK, FAINT = (250, 250, 248), (30, 30, 30), (120, 120, 120)
GAP, LINE = 8, 15


def contact_sheet(
    videos: Tensor,
    captions: Sequence[str],
    path: Path,
    *,
    title: str = "",
    frames: int = 5,
    width: int = 1200,
    columns: int | None = None,
) -> None:
    """Write a PNG: a strip of up to `frames` frames for each video (B, T, H, W, 3) uint8, its caption below it.

    columns: None for as many as `width` pixels hold.
    """
    strips = [_strip(video, frames) for video in videos.numpy()]
    cell_width = strips[0].shape[1]
    scale = max(1, min(4, (72 if videos.shape[1] > 1 else 96) // videos.shape[2]))
    cell_width, cell_height = max(cell_width * scale, 96), strips[0].shape[0] * scale
    columns = columns or max(1, min(len(strips), (width - GAP) // (cell_width + GAP)))
    font = ImageFont.load_default(11)
    texts = [_wrap(caption, cell_width, font) for caption in captions]
    text_height = LINE * max(len(lines) for lines in texts)
    row_height = cell_height + text_height + GAP
    top = GAP + (2 * LINE if title else 0)
    rows = -(-len(strips) // columns)
    sheet = Image.new("RGB", (columns * (cell_width + GAP) + GAP, top + rows * row_height + GAP), BACKGROUND)
    ink = ImageDraw.Draw(sheet)
    if title:
        ink.text((GAP, GAP), title, fill=INK, font=ImageFont.load_default(14))
    for index, (strip, lines) in enumerate(zip(strips, texts, strict=True)):
        x, y = GAP + index % columns * (cell_width + GAP), top + index // columns * row_height
        picture = Image.fromarray(strip)
        sheet.paste(picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST), (x, y))
        ink.multiline_text((x, y + cell_height + 2), "\n".join(lines), fill=FAINT, font=font, spacing=2)
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


def write_video_grid(videos: Tensor, path: Path, *, fps: float = 6.0, columns: int | None = None, enlarge: int | None = None) -> None:
    """Write the videos (B, T, H, W, 3) uint8 as one looping GIF or as an MP4, by the suffix of `path`."""
    grid = video_grid(videos, columns)
    factor = enlarge or max(1, 640 // grid.shape[2])
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


def _wrap(caption: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, most: int = 2) -> list[str]:
    lines: list[str] = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1][:-1] + "…"]
    return lines
