"""Histograms of what the index says of samples: frames, sizes, rates, lengths of captions, and every score."""

from array import array
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw

from data_pipelines.index import Entry

PANEL_WIDTH, PANEL_HEIGHT = 192, 96
_BINS = 24
_NOT_MEASURED = ("label", "scene", "start", "end")


def histograms(entries: Iterable[Entry]) -> list[Image.Image]:
    """One panel for each number that differs among the samples; those that all have alike share a panel of text."""
    fields: dict[str, array[float]] = defaultdict(lambda: array("d"))
    for entry in entries:
        facts = entry.facts
        numbers = {"frames": facts.frames, "height": facts.height, "width": facts.width, "fps": facts.fps, "caption": entry.caption_length}
        for name, value in (numbers | {k: v for k, v in entry.meta.items() if k not in _NOT_MEASURED}).items():
            if isinstance(value, int | float):
                fields[name].append(value)
    varied = {name: np.array(values) for name, values in fields.items() if min(values) < max(values)}
    same = [f"{name} {values[0]:g}" for name, values in fields.items() if name not in varied]
    return [_panel(name, values) for name, values in varied.items()] + ([_text_panel(["all:", *same])] if same else [])


def _panel(name: str, values: np.ndarray) -> Image.Image:
    image = _text_panel([f"{name}: median {np.median(values):.4g} of {len(values)}"])
    draw = ImageDraw.Draw(image)
    counts, _ = np.histogram(values, _BINS)
    room = PANEL_HEIGHT - 34
    for number, count in enumerate(counts):
        left, high = number * PANEL_WIDTH // _BINS, int(np.ceil(room * count / counts.max()))
        if high:
            draw.rectangle((left, PANEL_HEIGHT - 16 - high, left + PANEL_WIDTH // _BINS - 2, PANEL_HEIGHT - 17), fill="steelblue")
    draw.text((0, PANEL_HEIGHT - 14), f"{values.min():.4g}", fill="black")
    draw.text((PANEL_WIDTH, PANEL_HEIGHT - 14), f"{values.max():.4g}", fill="black", anchor="ra")
    return image


def _text_panel(lines: list[str]) -> Image.Image:
    image = Image.new("RGB", (PANEL_WIDTH, PANEL_HEIGHT), "white")
    ImageDraw.Draw(image).text((0, 0), "\n".join(lines), fill="black")
    return image
