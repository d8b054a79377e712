"""`dit replay RUN STEP`: one step of a run again, in one process, from the nearest checkpoint before it; nothing is written."""

import argparse
import json
import logging
import math
from collections.abc import Mapping, Sequence
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
from dit.initial import has_begun
from dit.runs import TrainedRun
from dit.runtime import distributed
from dit.stream import Stream

log = logging.getLogger(__name__)


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
    encoders = trained.encoders()
    stream = Stream(run.data or trained.base.data, encoders, trained.base.backbone, run.train.seed)
    if isinstance(run, DistillRun):
        engine, losses_of, _ = distill.compose(run, TrainedRun.open(run.teacher.run, "teacher.run"), encoders, stream)
    else:
        engine, losses_of = train.compose(run, encoders, stream, is_new=not has_begun(trained.path, before=step))
    record = _record(trained.path, step)
    position, since = resume(engine, trained.path, before=step), record.get("since")
    if since and since["step"] == engine.step:  # the run went on from there with other data
        position = since["position"]
    if not engine.step < step or run.train.samples == 0:
        raise UserError(f"STEP={step}: expected a step from 1 on, of a run that has taken any")
    start, steps = engine.step, stream.steps(position)
    for _ in track(range(engine.step + 1, step), f"steps {engine.step + 1} to {step - 1}"):
        batch = next(steps)
        engine.optimizer_step(accumulate(engine, batch, losses_of).reduce(batch.samples, batch.bad, False).loss)
    batch = next(steps)
    _same_samples(trained.path, step, start, {name for pack in batch.packs for name in pack.ids}, record)
    tally = accumulate(engine, batch, losses_of)
    return tally.samples(), engine.optimizer_step(tally.reduce(batch.samples, batch.bad, False).loss)


def _same_samples(run: Path, step: int, start: int, ids: set[str], record: Mapping[str, Any]) -> None:
    """Refuse samples that are not those of the step as it was written down, and warn where the run may have taken others.

    A run that returns to a checkpoint goes on with other data; where that checkpoint is gone, only what was written down tells.
    """
    returns = [_record(run, int(path.stem.removeprefix("step-"))) for path in sorted((run / "bad_steps").glob("step-*.json"))]
    between = sorted({each["since"]["step"] for each in returns if "since" in each and start < each["since"]["step"] < step})
    why = "the run returned to a checkpoint that is gone, and went on from there with other data"
    recorded = {sample["id"] for rank in record.get("ranks", []) for sample in rank["samples"]}
    if recorded and recorded != ids:
        raise UserError(f"STEP={step}: its samples are not those that were written down (bad_steps/step-{step:08d}.json): {why}")
    if between and not recorded:
        log.warning("these may not be the samples of step %d: %s (%s)", step, why, ", ".join(f"step {each}" for each in between))


def _alone(run: TrainRun | DistillRun) -> TrainRun | DistillRun:
    """`run` as one process takes it."""
    return run.model_copy(update={"engine": EngineConfig(zero_stage=0, precision=run.engine.precision)})


def _record(run: Path, step: int) -> dict[str, Any]:
    """What was written down of a step that the guard did not take; nothing of others."""
    path = run / "bad_steps" / f"step-{step:08d}.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _rank(loss: float | str) -> float:
    return loss if isinstance(loss, float) and not math.isnan(loss) else math.inf
