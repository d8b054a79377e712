"""The training loop, for training and distilling alike. Knows nothing of diffusion or of how data is read."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from torch import Tensor, nn

from data_pipelines.errors import DataBudgetExceeded
from dit.config import FitRun
from dit.engine import checkpoint, held_out
from dit.engine.engine import Engine, Outcome
from dit.engine.guard import UntrustedStep
from dit.engine.held_out import HeldOut
from dit.engine.metrics import Records
from dit.engine.progress import Progress, peak_flops
from dit.engine.saver import Saver
from dit.engine.stragglers import Stragglers
from dit.engine.tally import Tally, Totals
from dit.runtime import distributed, faults, heartbeat
from dit.runtime.losses import Losses
from dit.runtime.signals import StopSignals

log = logging.getLogger(__name__)
Made = TypeVar("Made")
FEWEST_SAMPLES = 10_000
"""The share of bad samples is taken of at least this many (or of the whole run), so that one early bad sample ends no run."""


class StepPacks(Protocol):
    """What this rank consumes in one optimizer step.

    packs: micro-batches, each with `ids` of its samples and their token `grids`. samples: how many the step has over all ranks.
    position: named tuple, where the stream goes on after this step. bad: (id, reason) of this rank's samples that could not be
    read, holes in the packs; of the ranks that compute a pack together, one names them.
    """

    @property
    def packs(self) -> Sequence[Any]: ...
    @property
    def samples(self) -> int: ...
    @property
    def position(self) -> Any: ...
    @property
    def bad(self) -> Sequence[tuple[str, str]]: ...


class Judge(Protocol):
    """Figures of the averaged weights, by name, every so many steps."""

    @property
    def every_steps(self) -> int: ...

    def __call__(self, module: nn.Module, step: int, /) -> Mapping[str, float | None]: ...


LossesOf = Callable[[Any, float], Losses]
"""From a pack and the progress of the run in [0, 1] to the losses of its samples."""


@dataclass(frozen=True)
class FitResult:
    state: Literal["done", "interrupted"]
    step: int
    samples_seen: int
    loss: float | None
    """Mean loss of the last step, None if there was none to take."""


def fit(
    run: FitRun,
    engine: Engine,
    steps: Iterator[StepPacks],
    losses_of: LossesOf,
    *,
    max_bad_fraction: float,
    left_out: Sequence[str] = (),
    leave_out: Callable[[Sequence[str]], None] | None = None,
    validate: Callable[[nn.Module], HeldOut] | None = None,
    preview: Callable[[nn.Module, int], Tensor | None] | None = None,
    judge: Judge | None = None,
    flops_of: Callable[[Any], float] | None = None,
) -> FitResult:
    """Train until `train.samples`, or until asked to stop; either way the last step is saved.

    losses_of(pack, progress) is called on every rank, and so is validate(module), which returns the same losses on all.
    left_out: ids that were unusable before the checkpoint it goes on from. leave_out(ids) is told those of each step, on all ranks alike.
    preview(module, step) draws with the averaged weights, on the first rank, on all under ZeRO stage 3 and where ranks share packs;
    videos (B, T, H, W, 3) that it returns go to TensorBoard. judge(module, step) is called in the same way; its figures join the line of
    the step as "student".
    flops_of(pack): floating-point operations of its forward and backward pass.
    Raises UntrustedStep, CopiesDiffer, DataBudgetExceeded, UserError (disk), on all ranks.
    """
    folder, train = Path(run.out), run.train
    if engine.samples_seen >= train.samples:
        log.info("%s is finished: %d of %d samples", folder, engine.samples_seen, train.samples)
        with Saver(run) as saver:
            _conclude(run, engine, max_bad_fraction, left_out)
            saver.settle()
        return FitResult("done", engine.step, engine.samples_seen, None)
    with Records(folder, engine.step, distributed.rank() == 0) as records, Saver(run) as saver, StopSignals(folder) as stop:
        saver.check_space(engine)
        progress = Progress(train.samples, train.log_every_steps, _peak_of_all_devices(run))
        budget = BadBudget(max_bad_fraction, train.samples, records, left_out)
        budget.check(engine.samples_seen)
        stragglers, loss = Stragglers(), None
        if preview and engine.step == 0:
            _draw(preview, engine, records)
        while engine.samples_seen < train.samples:
            heartbeat.beat(engine.step, "step")
            started = time.perf_counter()
            batch = next(steps)
            waited = time.perf_counter() - started

            tally = accumulate(engine, batch, losses_of, flops_of)
            totals = tally.reduce(batch.samples, batch.bad, stop.reason is not None)
            if not engine.is_called_together:  # there one's time is everybody's
                stragglers.add(waited + tally.own.seconds(), engine.step + 1)
            outcome = _update(engine, totals, saver)

            loss = totals.loss
            progress.add(loss, batch.samples, time.perf_counter() - started, waited, totals.flops, outcome.network)
            figures = _evaluate(run, engine, records, validate, judge)
            _record(records, progress, engine, totals, outcome, figures, saver.failures)
            if outcome.verdict.action != "take":
                answer(outcome, engine, records, saver, tally, batch)
            found = budget.spend(totals.bad, batch.bad, engine.step)
            if leave_out and found:
                leave_out(found)
            if preview and run.preview and engine.step % run.preview.every_steps == 0:
                _draw(preview, engine, records)

            must_stop = totals.stop or budget.is_exceeded(engine.samples_seen)
            if must_stop or engine.step % train.save_every_steps == 0 or engine.samples_seen >= train.samples:
                heartbeat.beat(engine.step, "save")
                engine.compare_copies()
                saver.save(engine, {**batch.position._asdict(), "left_out": budget.ids})
            if must_stop:
                break
        progress.end()
        saver.finish()
        budget.check(engine.samples_seen)
        state: Literal["done", "interrupted"] = "done" if engine.samples_seen >= train.samples else "interrupted"
        records.status(state, engine.step, samples_seen=engine.samples_seen, loss=loss, reason=stop.honoured())
        saver.settle()
        return FitResult(state, engine.step, engine.samples_seen, loss)


def _conclude(run: FitRun, engine: Engine, max_bad_fraction: float, left_out: Sequence[str]) -> None:
    """Say of a run whose last step is saved that it is done, if it was ended before it could, and was not ended for its data."""
    status = Path(run.out) / "status.json"
    said = json.loads(status.read_text())["state"] if status.is_file() else None
    if distributed.gather_json(said)[0] == "done":
        return
    with Records(Path(run.out), engine.step, distributed.rank() == 0) as records:
        BadBudget(max_bad_fraction, run.train.samples, records, left_out).check(engine.samples_seen)
        records.status("done", engine.step, samples_seen=engine.samples_seen)


class BadBudget:
    """Unusable samples of a run, over all ranks and restarts, against the fraction that is tolerated. ids: each once, as found."""

    def __init__(self, fraction: float, total: int, records: Records, ids: Sequence[str]) -> None:
        self.fraction, self.fewest, self.records = fraction, min(total, FEWEST_SAMPLES), records
        self.count = sum(distributed.gather_json(records.bad_before))
        self.ids = list(ids)

    def spend(self, count: int, bad: Sequence[tuple[str, str]], step: int) -> list[str]:
        """Count `count` unusable samples of all ranks, `bad` of them this rank's, report each, return the new ids of all ranks."""
        if not count:
            return []
        self.count += count
        ranks = distributed.gather_json([list(sample) for sample in bad])
        samples = sorted((name, reason) for rank in ranks for name, reason in rank)
        self.records.bad(step, samples)
        known = set(self.ids)
        new = sorted({name for name, _ in samples} - known)
        self.ids += new
        return new

    def is_exceeded(self, samples_seen: int) -> bool:
        """True, on all ranks alike, if the run must end."""
        return self.count > self.fraction * max(samples_seen, self.fewest)

    def check(self, samples_seen: int) -> None:
        """Raise DataBudgetExceeded if the run had to end."""
        if self.is_exceeded(samples_seen):
            raise DataBudgetExceeded(
                f"{self.count} unusable samples: more than data.max_bad_fraction={self.fraction} of {max(samples_seen, self.fewest)}. "
                f"{self.records.bad_file} names each with its reason; a checkpoint is saved. Mend the data, or raise data.max_bad_fraction"
            )


def accumulate(engine: Engine, batch: StepPacks, losses_of: LossesOf, flops_of: Callable[[Any], float] | None = None) -> Tally:
    """Forward and backward over this rank's packs of a step."""
    faults.point("step.begun")
    tally = Tally()
    for pack in batch.packs:
        with tally.own:
            losses = losses_of(pack, engine.samples_seen / engine.run.train.samples)
        engine.backward(losses.per_sample.sum(), batch.samples)
        tally.add(pack.ids, losses, flops_of(pack) if flops_of else 0.0)
    faults.point("step.accumulated")
    return tally


def answer(outcome: Outcome, engine: Engine, records: Records, saver: Saver, tally: Tally, batch: StepPacks) -> None:
    """Do what the guard says of a step that it did not take as it was, and write down what is needed to run that step again.

    Raises UntrustedStep on all ranks if the run must not go on.
    """
    step, (action, reason) = engine.step, (outcome.verdict.action, outcome.verdict.reason)
    facts = [{"rank": distributed.rank(), "grids": [list(pack.grids) for pack in batch.packs], "samples": tally.samples()}]
    facts = facts if distributed.sequence_rank() == 0 else []  # the others have the same packs
    norm = outcome.grad_norm if math.isfinite(outcome.grad_norm) else str(outcome.grad_norm)
    record: dict[str, Any] = {"step": step, "action": action, "reason": reason, "grad_norm": norm, "lr": engine.lr}
    record["ranks"] = [fact for facts in distributed.gather_json(facts) for fact in facts]
    records.untrusted(record)
    if distributed.rank() == 0:
        log.warning("step %d: %s: %s (bad_steps/step-%08d.json)", step, action, reason, step)
    if action == "rollback":
        saver.finish()
        guard = engine.guard.state()
        if (position := checkpoint.resume(engine, records.run_dir)) is None:
            raise UntrustedStep(f"step {step}: {reason}, and there is no checkpoint to return to")
        records.untrusted(record | {"since": {"step": engine.step, "position": position}})  # the next save of that step moves its data on
        engine.guard.restore({name: guard[name] for name in ("judged", "bad")})
        records.rewind(engine.step)
    if action == "stop":
        raise UntrustedStep(
            f"step {step}: {reason}. {records.run_dir}/bad_steps names its samples; `dit replay {records.run_dir} {step}` runs it again. "
            "Lower optimizer.lr, mend the data, or change guard.on_nonfinite, guard.on_spike"
        )


def _update(engine: Engine, totals: Totals, saver: Saver) -> Outcome:
    """The optimizer step, once nothing else needs the weights as they were."""
    if (engine.step + 1) % engine.run.train.log_every_steps == 0:
        engine.compare_copies()  # before the step: under ZeRO it writes all of them anew
    saver.wait_copied()  # of the step before, which this one is about to change
    return engine.optimizer_step(totals.loss)


def _evaluate(
    run: FitRun, engine: Engine, records: Records, validate: Callable[[nn.Module], HeldOut] | None, judge: Judge | None
) -> dict[str, Any]:
    """Figures of the weights as they are now that are due after this step, for its line; their curves are drawn."""
    figures: dict[str, Any] = {}
    if validate and run.validation and engine.step % run.validation.every_steps == 0:
        figures["held_out"] = held_out.compared(validate(engine.module), records.held_out)
        cells = figures["held_out"]["cells"]
        records.scalars({f"val/{name}": value for name, value in held_out.scalars(cells).items()}, engine.step)
        if records.is_writer:
            log.info("held-out loss %.4g: %s", cells["all"]["loss"], held_out.in_words(cells["all"]))
    if judge and engine.step % judge.every_steps == 0:
        figures["student"] = dict(_with_averages(judge, engine, records) or {})  # one rank may judge for all; None is no number
        records.scalars({f"student/{name}": value for name, value in figures["student"].items() if value is not None}, engine.step)
    return figures


def _record(
    records: Records,
    progress: Progress,
    engine: Engine,
    totals: Totals,
    outcome: Outcome,
    figures: Mapping[str, Any],
    failures: Mapping[str, int],
) -> None:
    measured = {"loss": totals.loss, "grad_norm": outcome.grad_norm, "lr": engine.lr, **totals.figures}
    line: dict[str, Any] = {
        "step": engine.step,
        "samples_seen": engine.samples_seen,
        **{name: value if math.isfinite(value) else None for name, value in measured.items()},  # JSON has no NaN
        "ids_hash": totals.ids_hash,
        "bad": totals.bad,
        **failures,
        **figures,
    }
    if outcome.network:
        line["network"] = outcome.network
    if outcome.verdict.action != "take":
        line["guard"] = outcome.verdict.action
    records.step(line)
    bins = {f"loss_t/{name}": value for name, value in totals.bins.items()}
    folder = f"train/{outcome.network}" if outcome.network else "train"
    progress.curves |= {f"{folder}/{name}": value for name, value in {**measured, **bins}.items()}
    if not progress.is_due(engine.step):
        return
    records.scalars({**progress.curves, **progress.rates()}, engine.step)
    records.status("running", engine.step, samples_seen=engine.samples_seen, **failures)
    if records.is_writer:
        progress.show(engine.step, engine.samples_seen, outcome.grad_norm, engine.lr)


def _draw(preview: Callable[[nn.Module, int], Tensor | None], engine: Engine, records: Records) -> None:
    videos = _with_averages(preview, engine, records)
    if videos is not None:
        records.videos(videos, engine.step)


def _with_averages(call: Callable[[nn.Module, int], Made], engine: Engine, records: Records) -> Made | None:
    """What `call` makes of the averaged weights; None where it is not called."""
    heartbeat.beat(engine.step, "draw")  # on one rank it takes as long as it takes, and the others wait
    with engine.ema_weights() as module:
        made = call(module, engine.step) if records.is_writer or engine.is_called_together else None
        distributed.barrier()
    return made


def _peak_of_all_devices(run: FitRun) -> float | None:
    peak = peak_flops(run.engine.precision)
    return None if peak is None else peak * distributed.world_size()
