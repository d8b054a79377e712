"""Whether a model of moving shapes earns its adherence: `python tests/benchmarks/gates.py runs/demo/teacher [--samples 288]`.

Three gates beside `dit evaluate`'s (adherence on held-out captions, positions, diversity), printed as a table:
- memory: clips drawn for trained captions are no nearer to the training clips than fresh clips of the renderer are, seen through the codec;
- null caption: what the model draws without a caption has the marginals of the training set, attribute by attribute;
- other captions: judged by captions of other clips, adherence is that of chance, so the captions are what is obeyed.
"""

import argparse
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data_pipelines import moving_shapes
from dit.config.objective import Guidance, SamplingConfig
from dit.drawing import draw, sample_keys
from dit.evaluation.moving_shapes import Observation, check_batch, direction_of, observe
from dit.runs import Encoders, TrainedRun

ATTRIBUTES = ("shape", "colour", "size", "direction", "speed")


def kolmogorov_smirnov(smaller: Tensor, larger: Tensor) -> float:
    """p-value of `smaller` being stochastically smaller than `larger`, one-sided (Smirnov's asymptotic exp(-2 D^2 n m / (n + m)))."""
    at = torch.cat([smaller, larger]).sort().values
    below = [torch.searchsorted(values.sort().values, at, right=True) / len(values) for values in (smaller, larger)]
    gap = float((below[0] - below[1]).max().clamp(min=0))
    return float(np.exp(-2 * gap**2 * len(smaller) * len(larger) / (len(smaller) + len(larger))))


def chi_square(counts: Sequence[int], shares: Sequence[float]) -> float:
    """p-value of `counts` under `shares`."""
    found, expected = torch.tensor(counts, dtype=torch.float64), sum(counts) * torch.tensor(shares, dtype=torch.float64)
    statistic = ((found - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(shares) - 1) / 2, dtype=torch.float64), statistic / 2))


def nearest(videos: Tensor, others: Tensor) -> Tensor:
    """Distance of each video (N, T, H, W, 3) to the nearest of the others: root mean square over pixels of [0, 1]."""
    flat = [v.flatten(1).float() / 255 for v in (videos, others)]
    return torch.cdist(*flat).min(1).values / flat[0].shape[1] ** 0.5


def through_codec(videos: Tensor, encoders: Encoders) -> Tensor:
    """Videos (N, T, H, W, 3) uint8 as the codec gives them back."""
    pixels = encoders.latents.decode(encoders.latents.encode(videos.permute(0, 4, 1, 2, 3).float() / 127.5 - 1))
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)


def attribute(seen: Observation, name: str) -> str:
    """What a clip shows: the direction and the speed nearest to its motion."""
    if name == "direction":
        return direction_of(seen.velocity) or "none"
    if name == "speed":
        return min(moving_shapes.SPEEDS, key=lambda word: abs(moving_shapes.SPEEDS[word] - float(np.hypot(*seen.velocity))))
    return str(getattr(seen, name))


Rows = list[tuple[str, str, str]]


def memory(videos: Tensor, fresh: Tensor, training: Tensor, encoders: Encoders) -> Rows:
    """The clips drawn, and as a control those of the training set, beside clips of the renderer, which the codec has blurred alike."""
    others = nearest(through_codec(fresh, encoders), training)
    rows: Rows = []
    for name, clips in (("drawn clips", videos), ("control: training clips", through_codec(training[: len(fresh)], encoders))):
        found = nearest(clips, training)
        p = kolmogorov_smirnov(found, others)
        rows.append((f"memory, {name}", f"median distance {found.median():.4f}, of fresh clips {others.median():.4f}", f"p = {p:.3g}"))
    return rows


def null_caption(videos: Tensor) -> Rows:
    """Each attribute of what is drawn without a caption beside its share of the training captions."""
    seen, truth = [one for one in observe(videos.numpy()) if one.visible], moving_shapes.all_attributes("train")
    rows: Rows = [("null caption", f"{len(seen)} of {len(videos)} show a shape", "")]
    for name in ATTRIBUTES:
        share = Counter(getattr(one, name) for one in truth)
        counts = Counter(attribute(one, name) for one in seen)
        p = chi_square([counts[value] for value in share], [count / len(truth) for count in share.values()])
        rows.append((f"null caption, {name}", ", ".join(f"{value} {counts[value]}" for value in share), f"p = {p:.3g}"))
    return rows


def other_captions(videos: Tensor, wanted: list[moving_shapes.Attributes]) -> Rows:
    """Adherence to the captions that were asked, and to those of the next clip."""
    others = wanted[1:] + wanted[:1]
    own, swapped = (check_batch(videos.numpy(), asked) for asked in (wanted, others))
    rows: Rows = []
    for name in (*ATTRIBUTES, "all"):
        rates = [float(np.mean([getattr(verdict, name) for verdict in verdicts])) for verdicts in (own, swapped)]
        equal = [a == b if name == "all" else getattr(a, name) == getattr(b, name) for a, b in zip(wanted, others, strict=True)]
        rows.append((f"captions of others, {name}", f"own {rates[0]:.3f}, others' {rates[1]:.3f}", f"chance {np.mean(equal):.3f}"))
    return rows


def main() -> None:
    """Draw, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run directory of a training on moving shapes")
    parser.add_argument("--samples", type=int, default=288, help="clips of each gate (default: %(default)s)")
    parser.add_argument("--training-clips", type=int, default=3072, help="clips of the training set, of seed 0 (default: %(default)s)")
    options = parser.parse_args()
    trained = TrainedRun.open(options.run, "RUN")
    encoders = Encoders.load(trained.base.encoders, torch.device("cpu"))
    network = trained.backbone(encoders, None, "ema", torch.device("cpu"))
    size = (moving_shapes.FRAMES, moving_shapes.SIDE, moving_shapes.SIDE)

    def drawn(prompts: list[str], s: float) -> Tensor:
        sampling, keys, clips = SamplingConfig(steps=16, guidance=Guidance(s=s)), sample_keys(7, len(prompts)), []
        for i in range(0, len(prompts), 48):
            part = slice(i, i + 48)
            clips.append(draw(network, encoders, trained.base, prompts[part], None, size, sampling, keys[part], trained.flow))
        return torch.cat(clips)

    def rendered(seed: int, count: int) -> Tensor:
        return torch.stack([torch.from_numpy(moving_shapes.draw(seed, index).video) for index in range(count)])

    wanted = [moving_shapes.draw(2, index).attributes for index in range(options.samples)]
    videos = drawn([moving_shapes.caption(attributes) for attributes in wanted], 3.0)
    rows = memory(videos, rendered(2, options.samples), rendered(0, options.training_clips), encoders)
    rows += null_caption(drawn([""] * options.samples, 1.0)) + other_captions(videos, wanted)
    print("| gate | found | |\n|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
