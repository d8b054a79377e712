"""`dit demo`: from nothing to a few-step student of a small video model, each stage by the project's own commands.

A stage that is done is not done again; a stage that was interrupted goes on where it stopped.
"""

import argparse
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.errors import UserError
from data_pipelines.progress import duration

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "demo"
CLIPS, VALIDATION_CLIPS = 3072, 64
PROMPTS = (
    "a large red disc moving right quickly near the top",
    "a small blue square moving down slowly near the left",
    "a large yellow cross moving left slowly near the bottom",
    "a small magenta disc moving up quickly near the right",
    "a large cyan square moving up slowly near the centre",
    "a small green cross moving right quickly near the middle",
)
SHOWN = (*(f"adherence/{name}" for name in ("mean", "shape", "colour", "direction", "speed", "all")), "s/clip")
"""Rows of the evaluation's table that end the demo."""


@dataclass(frozen=True)
class Stage:
    """One command of the demo. marker: the file that it writes; finished when it is there and, as a status file, says so.
    processes: ranks of a data-parallel run."""

    title: str
    command: tuple[str, ...]
    marker: Path
    processes: int = 1

    def finished(self) -> bool:
        if not self.marker.is_file():
            return False
        return self.marker.name != "status.json" or json.loads(self.marker.read_text()).get("state") == "done"


def stages(out: Path, ranks: int) -> list[Stage]:
    """The demo as commands that a user could type; training runs in `ranks` processes."""
    dit = (sys.executable, "-m", "dit")
    shapes = (sys.executable, "-m", "data_pipelines", "shapes")
    teacher, student = out / "teacher", out / "student"
    sources = f"data.sources=[{{path: {out}/latents}}]"
    prompts = "prompts=" + json.dumps(PROMPTS)
    both = json.dumps([{"run": str(teacher)}, {"run": str(student)}])
    contestants = [{"run": str(teacher)}, {"run": str(teacher), "steps": 4}, {"run": str(student)}]

    def clips(split: str, count: int, seed: int) -> Stage:
        options = ("--clips", str(count), "--seed", str(seed), "--split", "train", "--shard-samples", "512")
        return Stage(
            f"render {count} captioned {split} clips as WebDataset shards",
            (*shapes, str(out / "shards" / split), *options),
            out / "shards" / split / "manifest.json",
        )

    return [
        clips("train", CLIPS, 0),
        clips("validation", VALIDATION_CLIPS, 1),
        Stage(
            "encode the clips with the frozen VAE and text encoder",
            (*dit, "encode", str(CONFIGS / "encode.yaml"), f"sources=[{{path: {out}/shards/train}}]", f"out={out}/latents"),
            out / "latents" / "manifest.json",
            ranks,
        ),
        Stage(
            "train the teacher",
            (*dit, "train", str(CONFIGS / "train.yaml"), f"out={teacher}", sources, f"validation.source={out}/shards/validation"),
            teacher / "status.json",
            ranks,
        ),
        Stage(
            "distil the student",
            (*dit, "distill", str(CONFIGS / "distill.yaml"), f"out={student}", f"teacher.run={teacher}"),
            student / "status.json",
            ranks,
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
            ranks,
        ),
    ]


def main(argv: Sequence[str]) -> int:
    """Run every stage that is not done, then say where the results are."""
    parser = argparse.ArgumentParser(prog="dit demo", description="Train, distil and sample a small video model on moving shapes.")
    parser.add_argument("--out", default="runs/demo", help="folder of all results (default: %(default)s)")
    out = Path(parser.parse_args(argv).out)
    start = time.monotonic()
    plan = stages(out, _ranks())
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


def _ranks() -> int:
    """One process where there is a GPU; else two that share the cores, which small matrices use better than one with two threads."""
    has_gpu = (
        shutil.which("nvidia-smi") is not None and subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0
    )
    return 1 if has_gpu or len(os.sched_getaffinity(0)) < 2 else 2


def _run(stage: Stage) -> bool:
    """Run one stage; False if it was interrupted cleanly."""
    ranks = [subprocess.Popen(stage.command, env=environment) for environment in _environments(stage.processes)]
    while any(rank.poll() is None for rank in ranks):
        try:
            time.sleep(0.1)
            if any(rank.poll() not in (None, 0) for rank in ranks):  # the others would wait for it for ever
                _end([rank for rank in ranks if rank.poll() is None])
        except KeyboardInterrupt:  # the ranks have the signal too, and save before they exit
            continue
    codes = sorted({rank.returncode for rank in ranks} - {0})
    if codes and codes != [130]:
        raise UserError(f"the stage «{stage.title}» failed with exit code {codes[-1]}; its command was\n  {shlex.join(stage.command)}")
    return stage.finished()


def _environments(processes: int) -> list[dict[str, str]]:
    """What torchrun would tell each rank of one machine."""
    if processes == 1:
        return [dict(os.environ)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        try:
            rank.wait(timeout=5)
        except subprocess.TimeoutExpired:
            rank.kill()


def _results(out: Path, seconds: float) -> None:
    head, rule, *rows = (out / "evaluation" / "table.md").read_text().splitlines()
    short = [row for row in rows if row.split("|")[1].strip() in SHOWN]
    print("\n".join(["", head, rule, *short, "", f"finished in {duration(seconds)}; look at"]))
    for path, what in (
        ("samples/contact_sheet.png", "teacher and student beside each other, same prompts, same noise"),
        ("samples/grid.gif", "the same, moving (also grid.mp4): teacher above, student below"),
        ("teacher/samples", "how the teacher learned: the same prompts through training"),
        ("evaluation", "what the exact checker says: table.md, results.json, and sheets with its verdicts"),
    ):
        print(f"  {out / path}  {what}")
    print(f"  curves: {Path(sys.executable).parent / 'tensorboard'} --logdir {out}")
