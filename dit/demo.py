"""`dit demo`: from nothing to a few-step student of a small video model, each stage by the project's own commands.

A stage that is done is not done again; a stage that was interrupted goes on where it stopped.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.errors import UserError
from data_pipelines.progress import duration

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "demo"
CLIPS, HELD_OUT_CLIPS = 4096, 256
PROMPTS = (
    "a large red disc moving right quickly near the top",
    "a small blue square moving down slowly near the left",
    "a large yellow cross moving left slowly near the bottom",
    "a small magenta disc moving up quickly near the right",
    "a large cyan square moving up slowly near the centre",
    "a small green cross moving right quickly near the middle",
)


@dataclass(frozen=True)
class Stage:
    """One command of the demo. marker: the file that it writes; finished when it is there and, as a status file, says so."""

    title: str
    command: tuple[str, ...]
    marker: Path

    def finished(self) -> bool:
        if not self.marker.is_file():
            return False
        return self.marker.name != "status.json" or json.loads(self.marker.read_text()).get("state") == "done"


def stages(out: Path) -> list[Stage]:
    """The demo as commands that a user could type."""
    dit = (sys.executable, "-m", "dit")
    shapes = (sys.executable, "-m", "data_pipelines", "shapes")
    teacher, student = out / "teacher", out / "student"
    sources = f"data.sources=[{{path: {out}/latents/train}}]"
    prompts = "prompts=" + json.dumps(PROMPTS)
    both = json.dumps([{"run": str(teacher)}, {"run": str(student)}])
    contestants = [{"run": str(teacher)}, {"run": str(teacher), "steps": 4}, {"run": str(student)}]

    def encode(split: str) -> Stage:
        overrides = (f"sources=[{{path: {out}/shards/{split}}}]", f"out={out}/latents/{split}")
        return Stage(
            f"encode the {split} clips with the frozen VAE and text encoder",
            (*dit, "encode", str(CONFIGS / "encode.yaml"), *overrides),
            out / "latents" / split / "manifest.json",
        )

    def clips(split: str, count: int, seed: int) -> Stage:
        options = ("--clips", str(count), "--seed", str(seed), "--split", "train")
        return Stage(
            f"render {count} captioned {split} clips as WebDataset shards",
            (*shapes, str(out / "shards" / split), *options),
            out / "shards" / split / "manifest.json",
        )

    return [
        clips("train", CLIPS, 0),
        clips("validation", HELD_OUT_CLIPS, 1),
        encode("train"),
        encode("validation"),
        Stage(
            "train the teacher",
            (*dit, "train", str(CONFIGS / "train.yaml"), f"out={teacher}", sources, f"validation.source={out}/latents/validation"),
            teacher / "status.json",
        ),
        Stage(
            "distil the student",
            (*dit, "distill", str(CONFIGS / "distill.yaml"), f"out={student}", f"teacher.run={teacher}"),
            student / "status.json",
        ),
        Stage(
            "sample both from the same prompts and noise",
            (*dit, "sample", str(CONFIGS / "sample.yaml"), f"out={out}/samples", prompts, f"contestants={both}"),
            out / "samples" / "prompts.json",
        ),
        Stage(
            "check the samples against their captions",
            (*dit, "evaluate", str(CONFIGS / "evaluate.yaml"), f"out={out}/evaluation", f"contestants={json.dumps(contestants)}"),
            out / "evaluation" / "results.json",
        ),
    ]


def main(argv: Sequence[str]) -> int:
    """Run every stage that is not done, then say where the results are."""
    parser = argparse.ArgumentParser(prog="dit demo", description="Train, distil and sample a small video model on moving shapes.")
    parser.add_argument("--out", default="runs/demo", help="folder of all results (default: %(default)s)")
    out = Path(parser.parse_args(argv).out)
    start = time.monotonic()
    plan = stages(out)
    for number, stage in enumerate(plan, start=1):
        heading = f"[{number}/{len(plan)}] {stage.title}"
        if stage.finished():
            print(f"{heading}: done before")
            continue
        print(heading, flush=True)
        if not _run(stage):
            print(f"interrupted after {duration(time.monotonic() - start)}; the same command goes on from here")
            return 0
    _results(out, time.monotonic() - start)
    return 0


def _run(stage: Stage) -> bool:
    """Run one stage; False if it was interrupted cleanly."""
    process = subprocess.Popen(stage.command)
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:  # the child has the signal too, and saves before it exits
            continue
    if code not in (0, 130, -2):
        raise UserError(f"the stage «{stage.title}» failed with exit code {code}; its command was\n  {' '.join(stage.command)}")
    return stage.finished()


def _results(out: Path, seconds: float) -> None:
    print(f"\n{(out / 'evaluation' / 'table.md').read_text()}\nfinished in {duration(seconds)}; look at")
    for path, what in (
        ("samples/contact_sheet.png", "teacher and student beside each other, same prompts, same noise"),
        ("samples/grid.gif", "the same, moving (also grid.mp4): teacher above, student below"),
        ("teacher/samples", "how the teacher learned: the same prompts through training"),
        ("evaluation", "what the exact checker says: table.md, results.json, and sheets with its verdicts"),
    ):
        print(f"  {out / path}  {what}")
    print(f"  curves: {Path(sys.executable).parent / 'tensorboard'} --logdir {out}")
