"""`dit replay RUN STEP`: one step of a run again, in one process, from the nearest checkpoint before it; nothing is written."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipelines.errors import UserError
from data_pipelines.progress import track
from dit import distill, train
from dit.config import DistillRun, TrainRun
from dit.config.engine import EngineConfig
from dit.engine.checkpoint import resume
from dit.engine.engine import Outcome
from dit.engine.loop import accumulate
from dit.runs import Encoders, TrainedRun
from dit.runtime import distributed
from dit.stream import Stream


def main(argv: Sequence[str]) -> int:
    """Run the step and print what each of its samples gave, beside what was recorded if the guard did not take it."""
    parser = argparse.ArgumentParser(prog="dit replay", description="Run one step of a run again, in one process. Writes nothing.")
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("step", metavar="STEP", type=int, help="number of the step, from 1, as in metrics.jsonl")
    arguments = parser.parse_args(argv)
    samples, outcome = replay(arguments.run, arguments.step)
    ranks = _record(Path(arguments.run), arguments.step).get("ranks", [])
    recorded = {sample["id"]: sample["loss"] for rank in ranks for sample in rank["samples"]}
    for sample in sorted(samples, key=lambda sample: -_rank(sample["loss"])):
        before = f"  recorded {recorded[sample['id']]}" if sample["id"] in recorded else ""
        print(f"{sample['id']}  t {sample['t']:.6f}  loss {sample['loss']}{before}")
    print(f"step {arguments.step}: {len(samples)} samples, gradient norm {outcome.grad_norm:.6g}, {outcome.verdict.action}")
    if outcome.verdict.reason:
        print(outcome.verdict.reason)
    return 0


def replay(path: str, step: int) -> tuple[list[dict[str, Any]], Outcome]:
    """Id, t and loss of each sample of `step` of the run at `path`, and how the step ended.

    The steps since the checkpoint are taken again, so in one process they differ from those of the run by the order of sums.
    """
    trained = TrainedRun.open(path, "RUN")
    distributed.init()
    run: Any = _alone(trained.run)
    encoders = Encoders.load(trained.base.encoders, distributed.device())
    stream = Stream(run.data or trained.base.data, encoders, trained.base.backbone, run.train.seed)
    if isinstance(run, DistillRun):
        engine, losses_of, _ = distill.compose(run, TrainedRun.open(run.teacher.run, "teacher.run"), encoders, stream)
    else:
        engine, losses_of = train.compose(run, encoders, stream)
    position, since = resume(engine, trained.path, before=step), _record(trained.path, step).get("since")
    if since and since["step"] == engine.step:  # the run went on from there with other data
        position = since["position"]
    steps = stream.steps(position)
    if not engine.step < step:
        raise UserError(f"STEP={step}: expected a step from 1 on")
    for _ in track(range(engine.step + 1, step), f"steps {engine.step + 1} to {step - 1}"):
        batch = next(steps)
        engine.optimizer_step(accumulate(engine, batch, losses_of).reduce(batch.samples, batch.bad, False).loss)
    batch = next(steps)
    tally = accumulate(engine, batch, losses_of)
    return tally.samples(), engine.optimizer_step(tally.reduce(batch.samples, batch.bad, False).loss)


def _alone(run: TrainRun | DistillRun) -> TrainRun | DistillRun:
    """`run` as one process takes it."""
    return run.model_copy(update={"engine": EngineConfig(zero_stage=0, precision=run.engine.precision)})


def _record(run: Path, step: int) -> dict[str, Any]:
    """What was written down of a step that the guard did not take; nothing of others."""
    path = run / "bad_steps" / f"step-{step:08d}.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _rank(loss: float | str) -> float:
    return loss if isinstance(loss, float) and not math.isnan(loss) else math.inf
