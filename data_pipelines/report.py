"""What a plan will do with the data, in numbers, before the first step: sizes, what is left out and why, packs, their balance."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipelines.plan import Plan, cost_of_pack, deal, tokens_of

PLANNED_SAMPLES = 100_000
"""Samples of the first epoch that are packed for the report; beyond them it extrapolates."""
RANKS = tuple(2**n for n in range(11))
"""World sizes that balance is predicted for."""


@dataclass(frozen=True)
class PlanReport:
    """An epoch in numbers. sizes: samples of each [frames, height, width], latents under their own. Weights are counted in.

    fill: tokens of packs as a fraction of their budget. balance: by world size, mean over max of the ranks' predicted cost, in steps of
    packs_per_step, rounded up to a multiple where the world size does not divide it; absent where the data make no step.
    exact: whether every window of the first epoch was packed; else packs, fill and balance are those of the first ones.
    epochs: how often the run sees the data, None if it was not said how long it is.
    """

    samples: float
    sizes: dict[str, float]
    dropped: dict[str, int]
    packs_per_epoch: float
    packs_per_step: int
    fill: float
    balance: dict[int, float]
    epochs: float | None
    exact: bool
    allowed: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def steps_per_epoch(self) -> float:
        """Steps of an epoch; the rest of its packs begins the next."""
        return self.packs_per_epoch / self.packs_per_step

    def __str__(self) -> str:
        about = "" if self.exact else "about "
        lines = [f"{self.samples:.0f} samples an epoch = {about}{self.packs_per_epoch:.0f} packs = {about}{self.steps_per_epoch:.1f} steps"]
        lines[0] += f"; packs are {100 * self.fill:.1f} % full"
        if self.epochs is not None:
            lines[0] += f"; the run is {self.epochs:.3g} epochs"
        lines += [f"  {count:.0f} x {size}" for size, count in sorted(self.sizes.items())]
        if unused := [size for size in self.allowed if not any(name.endswith(size) for name in self.sizes)]:
            lines.append(f"  allowed, but no sample takes it: {', '.join(unused)}")
        lines += [f"  left out: {count} x {reason}" for reason, count in sorted(self.dropped.items())]
        fits = [f"{ranks}: {value:.3f}" for ranks, value in self.balance.items() if self.packs_per_step % ranks == 0]
        other = [f"{ranks}: {value:.3f}" for ranks, value in self.balance.items() if self.packs_per_step % ranks]
        lines.append(f"  balance by ranks (mean / max of predicted cost): {', '.join(fits) or 'less than one step of data'}")
        if other:
            lines.append(f"  on other ranks, with so many more packs a step: {', '.join(other)}")
        return "\n".join([*lines, *(f"  problem: {problem}" for problem in self.problems)])


def report(plan: Plan, run_samples: int | None = None) -> PlanReport:
    """Sum up `plan` for a run of `run_samples`. Reads at most about `PLANNED_SAMPLES` entries beyond what the manifests hold."""
    sizes: dict[str, float] = {}
    dropped: Counter[str] = Counter()
    tokens = 0.0
    for source in plan.sources:
        dropped.update(source.dropped)
        for facts, count in source.facts.items():
            place = plan.place(facts)
            if place.grid is None:
                dropped[place.reason] += count
            else:
                name = f"{facts.kind} {list(place.size or (facts.frames, facts.height, facts.width))}"
                sizes[name] = sizes.get(name, 0.0) + count * source.weight
                tokens += count * source.weight * tokens_of(place.grid)
    costs: list[float] = []
    packed_tokens, samples, window = 0, 0, 0
    while window < plan.windows and samples < PLANNED_SAMPLES:
        packs = plan.packs(0, window)
        costs += map(cost_of_pack, packs)
        samples += sum(map(len, packs))
        packed_tokens += sum(tokens_of(sample.grid) for pack in packs for sample in pack)
        window += 1
    exact = window == plan.windows
    fill = packed_tokens / max(len(costs) * plan.config.token_budget, 1)
    balances = {ranks: _balance(costs, ranks, plan.config.packs_per_step) for ranks in RANKS}
    return PlanReport(
        samples=sum(sizes.values()),
        sizes=sizes,
        dropped=dict(dropped),
        packs_per_epoch=len(costs) if exact or not fill else tokens / (fill * plan.config.token_budget),
        packs_per_step=plan.config.packs_per_step,
        fill=fill,
        balance={ranks: value for ranks, value in balances.items() if value is not None},
        epochs=None if run_samples is None else run_samples / sum(sizes.values()),
        exact=exact,
        allowed=tuple(str(list(size)) for size in plan.config.sizes),
        problems=tuple(problem for source in plan.sources for problem in source.problems),
    )


def _balance(costs: Sequence[float], ranks: int, packs_per_step: int) -> float | None:
    """Mean over max of what `ranks` ranks compute in a step, over all whole steps; None if there is none."""
    each = -(-packs_per_step // ranks) * ranks
    mean = longest = 0.0
    for start in range(0, len(costs) - each + 1, each):
        step = costs[start : start + each]
        sums = [sum(step[number] for number in numbers) for numbers in deal(step, ranks)]
        mean += sum(sums) / ranks
        longest += max(sums)
    return mean / longest if longest else None
