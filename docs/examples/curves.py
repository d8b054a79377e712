"""Loss curves of runs as a picture: `python docs/examples/curves.py runs/a [runs/b ...] curves.png`.

Lines: the loss of training, mean of 25 steps, each run's own quantity. Dots: the held-out loss, which compares between runs.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 720, 320, 56, 28, 12
COLOURS = ("steelblue", "indianred", "seagreen", "darkorange")
MEAN_OF = 25
Series = list[tuple[float, float]]


def curves(run: Path) -> tuple[Series, Series]:
    """(samples, loss) of training, smoothed, and of the held-out set."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["samples_seen"], line["loss"]) for line in lines if "loss" in line]
    means = np.array(steps[: len(steps) // MEAN_OF * MEAN_OF]).reshape(-1, MEAN_OF, 2).mean(1)
    held_out = [(line["samples_seen"], line["held_out"]["cells"]["all"]["loss"]) for line in lines if "held_out" in line]
    return [(x, y) for x, y in means], held_out


def draw(runs: list[Path], out: Path) -> None:
    """Write the curves of `runs` to `out`; the axis of the loss is logarithmic."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    ink, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    both = [curves(run) for run in runs]
    points = np.array([point for pair in both for series in pair for point in series])
    most, low, high = points[:, 0].max(), np.log(points[:, 1].min() / 1.1), np.log(points[:, 1].max() * 1.1)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x, y = point[0] / most, (np.log(point[1]) - low) / (high - low)
        return LEFT + x * (WIDTH - LEFT - 12), HEIGHT - BOTTOM - y * (HEIGHT - BOTTOM - TOP)

    for tick in [m * 10.0**e for e in range(-4, 4) for m in (1, 1.5, 2, 3, 5, 7)]:
        if low <= np.log(tick) <= high:
            y = place((0, tick))[1]
            ink.line((LEFT, y, WIDTH - 12, y), fill="gainsboro")
            ink.text((LEFT - 6, y), f"{tick:g}", fill="black", anchor="rm", font=font)
    step = next(m * 10**e for e in range(9) for m in (1, 2, 5) if most <= 6 * m * 10**e)
    for x in range(0, int(most) + 1, step):
        ink.text((place((x, 1))[0], HEIGHT - BOTTOM + 8), f"{x:,}", fill="black", anchor="mt", font=font)
    for number, (run, (train, held_out)) in enumerate(zip(runs, both, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        ink.line([place(point) for point in train], fill=colour, width=2)
        for x, y in map(place, held_out):
            ink.ellipse((x - 4, y - 4, x + 4, y + 4), outline=colour, width=2)
        ink.text((WIDTH - 16, TOP + 16 * number), run.name, fill=colour, anchor="rt", font=font)
    image.save(out, optimize=True)


if __name__ == "__main__":
    *runs, target = sys.argv[1:]
    draw([Path(run) for run in runs], Path(target))
