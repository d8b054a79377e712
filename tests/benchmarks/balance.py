"""Simulated balance and useful tokens on a mixed set of images and clips: `python tests/benchmarks/balance.py`.

Cost is the closed form of a backbone's operations. Balance is mean over max of the ranks' cost in a step, over all steps of an epoch
(total of means over total of maxima). Compared with packs filled first fit in shuffled order, which knows tokens only.
"""

import random
import statistics
import time
from collections.abc import Iterable, Sequence
from functools import cache

from data_pipelines import packing
from data_pipelines.packed import Grid
from data_pipelines.plan import deal
from dit.config.backbone import SpatioTemporalDiTConfig
from dit.models.flops import forward_flops

BACKBONES = {
    "28 blocks of 2048": SpatioTemporalDiTConfig(hidden_size=2048, depth=28, num_heads=16, ffn_size=8192),
    "30 blocks of 1536": SpatioTemporalDiTConfig(hidden_size=1536, depth=30, num_heads=12, ffn_size=8960),
}
SIZES = {
    (1, 256, 256): 20, (1, 512, 512): 15, (1, 384, 640): 7, (1, 640, 384): 5, (1, 1024, 1024): 3, (17, 256, 256): 9, (33, 256, 448): 12,
    (49, 320, 576): 13, (81, 256, 448): 7, (33, 480, 832): 4, (49, 480, 832): 3, (81, 480, 832): 2,
}  # fmt: skip
"""Frames, height, width and share in percent: half images, half clips of up to 32,760 tokens (4 x 8 x 8 codec, 1 x 2 x 2 patch)."""
RANKS = (64, 128, 256, 512, 1024)
WINDOW = 120_000
"""Samples planned together, as in 16 shards of 7,500."""


def samples(count: int) -> list[tuple[Grid, int]]:
    """Token grid and text tokens of `count` samples; captions are log-normal with a median of 55 tokens."""
    draw = random.Random(0)
    sizes = draw.choices(list(SIZES), list(SIZES.values()), k=count)
    return [((1 + (f - 1) // 4, h // 16, w // 16), min(512, int(draw.lognormvariate(4, 0.7)) + 1)) for f, h, w in sizes]


def first_fit(tokens: Sequence[int], budget: int, open_packs: int = 16) -> list[list[int]]:
    """Packs in the order given: each item into the first of some open packs that has room, else the fullest is closed."""
    done: list[list[int]] = []
    packs: list[list[int]] = []
    used: list[int] = []
    for item, size in enumerate(tokens):
        place = next((number for number, taken in enumerate(used) if taken + size <= budget), None)
        if place is None:
            if len(packs) == open_packs:
                fullest = used.index(max(used))
                used.pop(fullest)
                done.append(packs.pop(fullest))
            place = len(packs)
            packs.append([])
            used.append(0)
        packs[place].append(item)
        used[place] += size
    return done + packs


def balance(costs: Sequence[float], ranks: int, packs_per_step: int) -> float:
    """Mean over max of the ranks' cost, over all whole steps."""
    mean = longest = 0.0
    for start in range(0, len(costs) - packs_per_step + 1, packs_per_step):
        step = costs[start : start + packs_per_step]
        sums = [sum(step[number] for number in numbers) for numbers in deal(step, ranks)]
        mean += statistics.mean(sums)
        longest += max(sums)
    return mean / longest


def row(name: str, packs: Iterable[Sequence[int]], tokens: Sequence[int], costs: Sequence[float], budget: int, step: int) -> None:
    """One line of the table: useful tokens, then balance by ranks."""
    shuffled = list(packs)
    random.Random(1).shuffle(shuffled)
    sums = [sum(costs[item] for item in pack) for pack in shuffled]
    useful = sum(tokens) / (budget * len(shuffled))
    print(f"| {name} | {step} | {useful:.4f} | " + " | ".join(f"{balance(sums, ranks, step):.4f}" for ranks in RANKS) + " |")


def main() -> None:
    """Print the table."""
    print(f"| packs | packs a step | useful tokens | {' | '.join(f'{ranks} ranks' for ranks in RANKS)} |")
    print("|---" * (3 + len(RANKS)) + "|")
    drawn = samples(WINDOW)
    for name, config in BACKBONES.items():

        @cache
        def cost(grid: Grid, text: int, config: SpatioTemporalDiTConfig = config) -> float:
            return float(forward_flops(config, [grid], [text], channels=16, text_width=4096))

        tokens, costs = [t * h * w for (t, h, w), _ in drawn], [cost(*sample) for sample in drawn]
        for budget, step in ((131072, 1024), (65536, 1024), (65536, 4096)):
            began = time.perf_counter()
            alike = packing.balance(tokens, costs, budget)
            seconds = time.perf_counter() - began
            row(f"{name}, {budget} tokens, balanced", alike, tokens, costs, budget, step)
            row(f"{name}, {budget} tokens, first fit", first_fit(tokens, budget), tokens, costs, budget, step)
    print(f"\npacking: {1e6 * seconds / WINDOW:.0f} us a sample")


if __name__ == "__main__":
    main()
