"""Methods of distillation on one teacher under one budget: `python tests/benchmarks/students.py [--teacher runs/demo/teacher]`.

Distils the teacher by each method with the schedule of configs/demo/distill.yaml, then judges students and teacher in 1, 2, 4 and 8
steps by `dit evaluate` on the same captions and noise, and prints the table. A method with one number of steps a student has a run for
each, which share its budget. Every cell (method, seed) is done once; the same command goes on after an interruption. See
docs/results/students.md.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

STEPS = (1, 2, 4, 8)
FEATURES = "features: {name: random_conv}"
METRICS = f"[{{name: adherence}}, {{name: positions}}, {{name: frechet, {FEATURES}}}, {{name: diversity, {FEATURES}}}]"


@dataclass(frozen=True)
class Part:
    """One run of a method: what differs from configs/demo/distill.yaml, its share of the clips, and the steps it is judged in.

    chained: its teacher is the student of the part before. drawn: from clips that the guided teacher made for the captions.
    """

    method: str
    share: float
    steps: tuple[int, ...]
    changes: tuple[str, ...] = ()
    chained: bool = False
    drawn: bool = False


ADVERSE = "optimizer.betas=[0.0, 0.99]"
CRITIC_OPTIMIZER = "{lr: 1.0e-3, betas: [0.0, 0.99], warmup_samples: 320}"
SCORE_CRITIC = f"{{steps: 3, optimizer: {CRITIC_OPTIMIZER}}}"
MOMENT_CRITIC = f"{{steps: 1, optimizer: {CRITIC_OPTIMIZER}}}"
HEADS = f"{{steps: 1, blocks: [1, 3], times: {{name: logit_normal, mean: -2.0}}, optimizer: {CRITIC_OPTIMIZER}}}"
PIXEL_HEADS = f"{{steps: 1, blocks: [0, 1], features: {{name: random_conv}}, frames: 3, optimizer: {CRITIC_OPTIMIZER}}}"


def progressive(steps: int, parts: int, *, chained: bool) -> Part:
    guidance = "{s: 1}" if chained else "GUIDANCE"
    method = f"{{name: progressive, guidance: {guidance}, teacher_steps: {parts}, student_steps: {steps}}}"
    return Part(method, 0.25, (steps,), chained=chained)


METHODS: dict[str, tuple[Part, ...]] = {
    "consistency": (Part("{name: consistency, guidance: GUIDANCE, solver: euler, stages: 4}", 1.0, STEPS),),
    "consistency, 4 phases": (
        Part("{name: consistency, guidance: GUIDANCE, solver: euler, phases: 4, stages: 1, q: 1.3, student_steps: 4}", 1.0, (4,)),
    ),
    "mean_flow": (
        Part("{name: mean_flow, guidance: GUIDANCE, power: 1, derivative: difference, step: 0.05}", 1.0, STEPS, ("optimizer.lr=5e-4",)),
    ),
    "continuous_consistency": (Part("{name: continuous_consistency, guidance: GUIDANCE}", 1.0, STEPS, ("optimizer.lr=5e-4",)),),
    "progressive": (
        progressive(8, 2, chained=False),
        *(progressive(steps, 2, chained=True) for steps in (4, 2, 1)),
    ),
    "consistency, from data": (Part("{name: consistency, guidance: {s: 1}, flow: data, stages: 4}", 1.0, STEPS),),
    "distribution_matching": (
        Part(f"{{name: distribution_matching, guidance: GUIDANCE, critic: {SCORE_CRITIC}}}", 1.0, STEPS, ("optimizer.lr=6e-4", ADVERSE)),
    ),
    "distribution_matching, 1 step": (
        Part(
            f"{{name: distribution_matching, guidance: GUIDANCE, student_steps: 1, critic: {SCORE_CRITIC}}}",
            1.0,
            STEPS[:2],
            ("optimizer.lr=6e-4", ADVERSE),
        ),
    ),
    "score_regularised": (
        Part(f"{{name: score_regularised, guidance: GUIDANCE, critic: {SCORE_CRITIC}}}", 1.0, STEPS, ("optimizer.lr=3e-4", ADVERSE)),
    ),
    "moment_matching": (Part("{name: moment_matching, guidance: GUIDANCE, student_steps: 4}", 1.0, (4,), ("optimizer.lr=3e-4",)),),
    "moment_matching, critic": (
        Part(
            f"{{name: moment_matching, guidance: GUIDANCE, student_steps: 4, critic: {MOMENT_CRITIC}}}",
            1.0,
            (4,),
            ("optimizer.lr=3e-4", ADVERSE),
        ),
    ),
    "adversarial": (
        Part(f"{{name: adversarial, guidance: GUIDANCE, critic: {HEADS}}}", 1.0, STEPS, ("optimizer.lr=3e-4", ADVERSE), drawn=True),
    ),
    "adversarial, pixels": (
        Part(
            f"{{name: adversarial, guidance: GUIDANCE, distillation_weight: 2.5, critic: {PIXEL_HEADS}}}",
            1.0,
            STEPS,
            ("optimizer.lr=3e-4", ADVERSE),
        ),
    ),
}
"""The parts of a method are distilled one after another. Clips of a critic's steps count as those of the student's."""


@dataclass(frozen=True)
class Cost:
    """Of all attempts at a cell. cpu_seconds: of all threads, which a busy machine does not stretch. gib: the largest resident set."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    gib: float = 0.0


def command(*arguments: str, record: Path | None = None) -> None:
    """Run a command of the project, or end with its exit code; add what it cost to the file `record`."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    if record is not None:
        before = read_cost(record)
        cost = Cost(
            before.seconds + time.monotonic() - start,
            before.cpu_seconds + usage.ru_utime + usage.ru_stime,
            max(before.gib, usage.ru_maxrss / 2**20),
        )
        record.write_text(json.dumps(vars(cost)))
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(code)


def read_cost(path: Path) -> Cost:
    return Cost(**json.loads(path.read_text())) if path.is_file() else Cost()


def keep(path: Path, record: object) -> None:
    """Write what results are made of beside them, or end if those that are there were made otherwise."""
    text = json.dumps(record, indent=1)
    if path.is_file() and path.read_text() != text:
        raise SystemExit(f"{path.parent} was made otherwise (see {path}): delete it, or give another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def distil(options: argparse.Namespace, name: str, seed: int) -> Path:
    """Make the students of a cell and judge them; returns its folder."""
    folder = options.out / f"{options.clips}" / name.replace(", ", "-").replace(" ", "-") / f"seed-{seed}"
    runs = [folder / f"part-{number}" for number in range(len(METHODS[name]))]
    recipes = [recipe(options, part, source, seed) for part, source in zip(METHODS[name], [options.teacher, *runs])]
    keep(folder / "recipe.json", recipes)
    if (folder / "evaluation" / "results.json").is_file():
        return folder
    for part, run, changes in zip(METHODS[name], runs, recipes, strict=True):
        data = [f"data={drawn_data(options)}"] if part.drawn else []
        command("dit", "distill", "configs/demo/distill.yaml", f"out={run}", *changes, *data, record=folder / "cost.json")
    contestants = [{"run": str(run), "steps": steps} for part, run in zip(METHODS[name], runs, strict=True) for steps in part.steps]
    judge(options, contestants, folder / "evaluation")
    return folder


def recipe(options: argparse.Namespace, part: Part, teacher: Path, seed: int) -> list[str]:
    """What a part changes of the config. teacher: the run, or the part before if it is chained."""
    method = part.method.replace("GUIDANCE", f"{{s: {options.guidance:g}}}")
    source = teacher if part.chained else options.teacher
    clips = round(options.clips * part.share)
    return [f"method={method}", f"teacher.run={source}", f"train.seed={seed}", f"train.samples={clips}", "preview=null", *part.changes]


def drawn_data(options: argparse.Namespace) -> str:
    """The teacher's `data`, with the latents that it draws in half of its steps, as YAML; makes them once."""
    out = options.out / "drawn"
    if not (out / "manifest.json").is_file():
        sampling = f"{{steps: {options.teacher_steps // 2}, guidance: {{s: {options.guidance}}}}}"
        command("dit", "encode", "configs/demo/encode.yaml", f"drawn.run={options.teacher}", f"drawn.sampling={sampling}", f"out={out}")
    data = yaml.safe_load((options.teacher / "config.resolved.yaml").read_text())["data"]
    return json.dumps({**data, "sources": [{"path": str(out)}]})


def judge(options: argparse.Namespace, contestants: list[dict[str, Any]], out: Path) -> None:
    """Evaluate the contestants, all of the table on the same captions and noise."""
    sizes = (f"samples={options.samples}", "per_caption=2", f"metrics={METRICS}")
    command("dit", "evaluate", "configs/demo/evaluate.yaml", f"contestants={json.dumps(contestants)}", f"out={out}", *sizes)


def figures(folder: Path, position: int) -> dict[str, float]:
    """Means over both kinds of captions of what a row of the table shows. position: of the contestant; -1 is the reference."""
    row = json.loads((folder / "results.json").read_text())["rows"][position]
    values: Mapping[str, Mapping[str, Any]] = row["figures"]

    def of(name: str, field: str = "value") -> float:
        found = [split[name][field] for split in values.values() if name in split]
        return mean(found) if found else float("nan")

    half = (of("adherence/mean", "high") - of("adherence/mean", "low")) / 2 / len(values) ** 0.5
    return {
        "adherence": of("adherence/mean"),
        "half": half,
        "all": of("adherence/all"),
        "frechet": of("frechet/random_conv"),
        "diversity": of("diversity/random_conv"),
        "seconds": row["seconds_per_clip"] or 0.0,
    }


def table(options: argparse.Namespace, cells: Mapping[tuple[str, int], Path]) -> str:
    """The table in Markdown: a row for each method and number of steps, means over seeds with the range; who fails; what it cost."""
    teacher, judged = options.out / "teacher", (options.teacher_steps, *reversed(STEPS))
    reference, best = figures(teacher, -1), figures(teacher, 0)
    equal = {steps: figures(teacher, position) for position, steps in enumerate(judged)}
    lines = [
        "| model | steps | adherence | / teacher | all | Fréchet | diversity / real |",
        "|---|---|---|---|---|---|---|",
        *(_row(f"teacher, s = {options.guidance}", steps, [equal[steps]], best, reference) for steps in judged),
    ]
    failures: list[str] = []
    for name in options.methods:
        parts = [steps for part in METHODS[name] for steps in part.steps]
        for position, steps in sorted(enumerate(parts), key=lambda pair: -pair[1]):
            seen = [figures(cells[name, seed] / "evaluation", position) for seed in range(options.seeds)]
            lines.append(_row(name, steps, seen, best, reference))
            rival = equal[steps]
            change, half = mean(one["adherence"] for one in seen) - rival["adherence"], (seen[0]["half"] ** 2 + rival["half"] ** 2) ** 0.5
            nearer = mean(one["frechet"] for one in seen) < rival["frechet"]
            if change <= half or not nearer:
                lines_of = f"adherence {change:+.3f} ±{half:.3f}, Fréchet {'nearer' if nearer else 'no nearer'}"
                failures.append(f"- {name} in {steps}: {lines_of}")
    heading = "Not better than the teacher in as many steps (adherence beyond its 95 % interval, and a smaller Fréchet distance):"
    return "\n".join([*lines, "", heading, "", *(failures or ["- none"]), "", *_costs(options, cells)])


def _row(name: str, steps: int, seen: list[dict[str, float]], best: Mapping[str, float], reference: Mapping[str, float]) -> str:
    def cell(values: list[float], digits: int = 3) -> str:
        spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
        return f"{mean(values):.{digits}f}{spread}"

    adherence = [one["adherence"] for one in seen]
    parts = [
        f"{cell(adherence)} ±{seen[0]['half']:.3f}",
        cell([value / best["adherence"] for value in adherence]),
        cell([one["all"] for one in seen]),
        cell([one["frechet"] for one in seen], 4),
        cell([one["diversity"] / reference["diversity"] for one in seen], 2),
    ]
    return f"| {name} | {steps} | " + " | ".join(parts) + " |"


def _costs(options: argparse.Namespace, cells: Mapping[tuple[str, int], Path]) -> list[str]:
    lines = ["| method | updates | CPU seconds | wall seconds | largest resident set, GiB |", "|---|---|---|---|---|"]
    for name in options.methods:
        folders = [cells[name, seed] for seed in range(options.seeds)]
        costs = [read_cost(folder / "cost.json") for folder in folders]
        updates = sum(json.loads((folders[0] / f"part-{i}" / "status.json").read_text())["step"] for i in range(len(METHODS[name])))
        seconds = (f"{mean(getattr(cost, field) for cost in costs):.0f}" for field in ("cpu_seconds", "seconds"))
        lines.append(f"| {name} | {updates} | " + " | ".join(seconds) + f" | {max(cost.gib for cost in costs):.2f} |")
    return lines


def main() -> None:
    """Distil and judge what is not done, print the table and write it to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, default=Path("runs/demo/teacher"), help="run directory (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=3.0, help="of the teacher, as s (default: %(default)s)")
    parser.add_argument("--teacher-steps", type=int, default=16, help="of the teacher at its best (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=9600, help="training clips of each method (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="students of each method (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=144, help="judged clips of each kind of captions (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="which (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/students"), help="folder of all results (default: %(default)s)")
    options = parser.parse_args()
    options.out = options.out / f"judged-by-{options.samples}"  # figures of other counts are not to be compared
    teacher, guided = options.out / "teacher", {"sampler": "euler", "guidance": {"s": options.guidance}}
    keep(options.out / "settings.json", {"teacher": str(options.teacher), "steps": options.teacher_steps, **guided})
    if not (teacher / "results.json").is_file():
        steps = (options.teacher_steps, *reversed(STEPS))
        judge(options, [{"run": str(options.teacher), "sampling": {**guided, "steps": n}} for n in steps], teacher)
    cells = {(name, seed): distil(options, name, seed) for seed in range(options.seeds) for name in options.methods}
    text = table(options, cells)
    (options.out / f"{options.clips}" / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
