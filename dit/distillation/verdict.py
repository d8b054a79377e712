"""What the figures of a diagnosis mean, in words. Figures in, text out; no torch."""

from collections.abc import Mapping, Sequence

Figures = Mapping[str, float | None]
"""By name, as `Judge` gives them; None for what is no number."""
History = Sequence[tuple[int, Figures]]
"""Step and figures of every diagnosis so far."""
UNCHANGED = 0.02
"""Part of a distance by which it moves without having changed."""
STILL, ALIKE = 0.7, 0.8
"""Motion and diversity, as parts of the teacher's, below which the note says so."""


def is_worse(figures: Figures, steps: int) -> bool:
    """Whether the student is worse than its teacher in as many steps, beyond the 95 % interval."""
    return figures.get(f"verdict/{steps}") == -1


def verdict(figures: Figures, steps: int) -> str:
    """A sentence on the student in `steps` steps, and on other numbers of steps where it is worse."""
    found = {1.0: "better than", -1.0: "WORSE than", 0.0: "not distinguishable from", None: "not compared with an interval to"}
    mine, theirs, change, low, high = (
        _shown(figures.get(f"{name}/{steps}")) for name in ("distance", "teacher", "change", "change_low", "change_high")
    )
    text = f"the student is {found[figures.get(f'verdict/{steps}')]} the undistilled model in {steps} steps "
    text += f"(distance {mine}, teacher {theirs}; difference {change}, 95 % interval {low} to {high})."
    others = [name.removeprefix("verdict/") for name, value in figures.items() if name.startswith("verdict/") and value == -1]
    others = [n for n in others if n != str(steps)]
    return text + (f" It is worse in {', '.join(others)} too." if others else "")


def advice(history: History, steps: int) -> list[str]:
    """What the figures point to, from (step, figures) of all diagnoses so far."""
    figures, said = history[-1][1], list[str]()
    now, before = (past.get(f"distance/{steps}") for past in (figures, history[-2][1] if len(history) > 1 else {}))
    if is_worse(figures, steps):
        if now is None:
            said.append("It draws no numbers any more: lower optimizer.lr, and begin anew or from a checkpoint before.")
        elif before is None:
            said.append("It is the first look: judge by the next. If it has not come nearer by then, lower optimizer.lr.")
        elif now > (1 + UNCHANGED) * before:
            said.append(
                f"It goes away from the teacher ({before:.3g} before, {now:.3g} now): lower optimizer.lr, a fraction of the teacher's."
            )
        elif now < (1 - UNCHANGED) * before:
            said.append(f"It comes nearer ({before:.3g} before, {now:.3g} now): train on, or set an easier task (phases, less guidance).")
        else:
            said.append(
                f"It stays where it is ({before:.3g} before, {now:.3g} now): `dit evaluate` says what its clips are worth as they are."
            )
    gap, own = _mean(figures, "gap/"), _mean(figures, "self_consistency/")
    if is_worse(figures, steps) and gap and own is not None and own < 0.1 * gap:
        said.append(
            "It agrees with itself, and not with the teacher: its target has drifted. More accurate teacher steps (solver), fewer stages."
        )
    if (motion := figures.get("motion")) is not None and motion < STILL:
        said.append(f"It moves {motion:.2f} as much as the teacher: draw more times near t = 1 (method.times), where motion is decided.")
    if (diversity := figures.get("diversity")) is not None and diversity < ALIKE:
        said.append(f"Its clips of one prompt differ {diversity:.2f} as much as the teacher's: lower method.guidance, or stop earlier.")
    return said


def table(history: History, counts: Sequence[int]) -> list[str]:
    """All diagnoses as lines of Markdown. counts: numbers of steps that the student is drawn in."""
    heads = [*(f"{n} steps" for n in counts), "gap", "self-consistency", "motion", "diversity"]
    lines = ["| step | " + " | ".join(heads) + " |", "|" + "---|" * (len(heads) + 1)]
    marks = {1.0: " better", -1.0: " **worse**"}
    for step, figures in history:
        pairs = [[_shown(figures.get(f"{name}/{n}")) for name in ("distance", "teacher")] for n in counts]
        cells = [f"{mine} / {theirs}{marks.get(figures.get(f'verdict/{n}') or 0.0, '')}" for n, (mine, theirs) in zip(counts, pairs)]
        means = (_mean(figures, "gap/"), _mean(figures, "self_consistency/"), figures.get("motion"), figures.get("diversity"))
        lines.append(f"| {step} | " + " | ".join([*cells, *map(_shown, means)]) + " |")
    return lines


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _mean(figures: Figures, prefix: str) -> float | None:
    values = [value for name, value in figures.items() if name.startswith(prefix) and value is not None]
    return sum(values) / len(values) if values else None
