"""What a plan will do with the data, in numbers, before the first step: sizes, what is left out and why, packs, how full they are."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from data_pipelines.plan import Plan, tokens_of

PLANNED_SAMPLES = 100_000
"""Samples of the first epoch that are packed for the report; beyond them it extrapolates."""


@dataclass(frozen=True)
class PlanReport:
    """An epoch in numbers. sizes: samples of each [frames, height, width], latents under their own. Weights are counted in.

    exact: whether every window of the first epoch was packed; else packs and fill are extrapolated from the first ones.
    """

    samples: float
    sizes: dict[str, float]
    dropped: dict[str, int]
    packs_per_epoch: float
    steps_per_epoch: float
    fill: float
    exact: bool
    problems: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        about = "" if self.exact else "about "
        lines = [f"{self.samples:.0f} samples an epoch = {about}{self.packs_per_epoch:.0f} packs = {about}{self.steps_per_epoch:.1f} steps"]
        lines[0] += f"; packs are {100 * self.fill:.1f} % full"
        lines += [f"  {count:.0f} x {size}" for size, count in sorted(self.sizes.items())]
        lines += [f"  left out: {count} x {reason}" for reason, count in sorted(self.dropped.items())]
        return "\n".join([*lines, *(f"  problem: {problem}" for problem in self.problems)])


def report(plan: Plan) -> PlanReport:
    """Sum up `plan`. Reads at most about `PLANNED_SAMPLES` entries beyond what the manifests hold."""
    sizes: dict[str, float] = {}
    dropped: Counter[str] = Counter()
    tokens = 0.0
    for source in plan.sources:
        for facts, count in source.facts.items():
            place = plan.place(facts)
            if place.grid is None:
                dropped[place.reason] += count
            else:
                name = f"{facts.kind} {list(place.size or (facts.frames, facts.height, facts.width))}"
                sizes[name] = sizes.get(name, 0.0) + count * source.weight
                tokens += count * source.weight * tokens_of(place.grid)
    packed, packed_tokens, samples, window = 0, 0, 0, 0
    while window < plan.windows and samples < PLANNED_SAMPLES:
        packs = plan.packs(0, window)
        packed += len(packs)
        samples += sum(map(len, packs))
        packed_tokens += sum(tokens_of(sample.grid) for pack in packs for sample in pack)
        window += 1
    exact = window == plan.windows
    fill = packed_tokens / max(packed * plan.config.token_budget, 1)
    packs_per_epoch = packed if exact or not fill else tokens / (fill * plan.config.token_budget)
    return PlanReport(
        samples=sum(sizes.values()),
        sizes=sizes,
        dropped=dict(dropped),
        packs_per_epoch=packs_per_epoch,
        steps_per_epoch=packs_per_epoch / plan.config.packs_per_step,
        fill=fill,
        exact=exact,
        problems=tuple(problem for source in plan.sources for problem in source.problems),
    )
