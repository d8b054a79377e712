"""A contact sheet: some samples of a folder of shards with their captions, and histograms of all, to be looked at before training."""

import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data_pipelines import randomness
from data_pipelines.decode import decode_image, decode_npy, fit
from data_pipelines.errors import UserError
from data_pipelines.histograms import PANEL_HEIGHT, histograms
from data_pipelines.index import Entry
from data_pipelines.samples import CAPTION_EXTENSION, LATENTS_EXTENSION, BadSample, media_extension, read_caption
from data_pipelines.sources import read_source
from data_pipelines.storage import read_members
from data_pipelines.video import Frames, frames_at

CELL = 192  # pixels, side of a picture
CAPTION = 66  # pixels of text below it
COLUMNS = 6
FRAMES = 4  # of a video, two by two


def contact_sheet(folder: str, out: Path, count: int) -> int:
    """Draw `count` samples, chosen by hash, to the image `out`; returns how many there were."""
    source = read_source(folder, config_key="DIR")
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"OUT = {str(out)!r}: expected a name that ends in .png, .jpg or .webp")
    every = ((shard.address, entry) for shard in source.shards for entry in source.index(shard).entries)
    chosen = sorted(every, key=lambda item: randomness.key("show", item[0].rpartition("/")[2], item[1].key))[:count]
    columns = min(COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    bars = histograms(entry for shard in source.shards for entry in source.index(shard).entries)
    top = rows * (CELL + CAPTION) + 8
    width = max(columns, min(COLUMNS, len(bars)))
    sheet = Image.new("RGB", (width * (CELL + 8) + 8, top + -(-len(bars) // width) * (PANEL_HEIGHT + 8)), "white")
    for number, panel in enumerate(bars):
        sheet.paste(panel, (8 + number % width * (CELL + 8), top + number // width * (PANEL_HEIGHT + 8)))
    for number, (shard, entry) in enumerate(chosen):
        x, y = 8 + number % columns * (CELL + 8), 8 + number // columns * (CELL + CAPTION)
        _draw_sample(sheet, x, y, shard, entry)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    return len(chosen)


def _draw_sample(sheet: Image.Image, x: int, y: int, shard: str, entry: Entry) -> None:
    facts = entry.facts
    try:
        data = read_members(shard, entry.members)
        picture = _picture(data, facts.frames)
        caption = read_caption(data.get(CAPTION_EXTENSION, b"")) or "(no caption)"
    except BadSample as error:
        picture, caption = np.full((CELL, CELL, 3), (255, 220, 220), np.uint8), f"unreadable: {error.reason}"
    sheet.paste(Image.fromarray(picture).resize((CELL, CELL), Image.Resampling.NEAREST), (x, y))
    span = f", {entry.meta['start']:.1f}-{entry.meta['end']:.1f} s" if "start" in entry.meta else ""
    lines = [f"{facts.kind} {facts.frames} x {facts.height} x {facts.width}{span}", *textwrap.wrap(caption[:200], 32)[:3]]
    ImageDraw.Draw(sheet).text((x, y + CELL + 2), "\n".join(lines).encode("latin-1", "replace").decode("latin-1"), fill="black")


def _picture(data: dict[str, bytes], frames: int) -> Frames:
    """One square picture of a sample: (side, side, 3) uint8."""
    extension = media_extension(set(data))
    if extension == LATENTS_EXTENSION:
        return _of_latents(decode_npy(data[extension]))
    if frames == 1:
        pictures = [decode_image(data[extension])] if extension not in ("gif", "mp4", "webm", "mkv", "mov", "avi") else []
        if pictures:
            return fit(pictures[0], CELL, CELL, key=None)
    numbers = [round(number * (frames - 1) / (FRAMES - 1)) for number in range(FRAMES)]
    a, b, c, d = (fit(frame, CELL // 2, CELL // 2, key=None) for frame in frames_at(data[extension], extension, numbers))
    return np.concatenate([np.concatenate([a, b], axis=1), np.concatenate([c, d], axis=1)])  # CELL CELL 3


def _of_latents(latents: np.ndarray) -> Frames:
    """The first three channels of the middle frame, each stretched to its range."""
    channels = latents[:3, latents.shape[1] // 2].astype(np.float32)  # 3 H W
    channels = channels.repeat(3, axis=0)[:3] if len(channels) < 3 else channels
    low, high = channels.min((1, 2), keepdims=True), channels.max((1, 2), keepdims=True)
    scaled = (channels - low) / np.maximum(high - low, 1e-6) * 255
    return fit(np.ascontiguousarray(scaled.transpose(1, 2, 0)).astype(np.uint8), CELL, CELL, key=None)
