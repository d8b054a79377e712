"""The process under test: `python worker.py OUT SCENARIO ...` or the same under torchrun. Results go to OUT as safetensors and JSON."""

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data_pipelines.errors import UserError
from dit.engine import checkpoint
from dit.engine.deepspeed import Engine, NonFinite
from dit.engine.held_out import HeldOut
from dit.engine.loop import FitResult, fit
from dit.engine.optimizer import average, ema_beta
from dit.runtime import distributed

sys.path.insert(0, str(Path(__file__).parent))
from toy_regression import PACK_SIZES, Pack, Step, losses_of, new_net, run_config, stream

ROOT = Path(sys.argv[1])


def new_engine(folder: Path, width: int = 11, **changes: dict[str, object]) -> Engine:
    run = run_config(str(folder), **changes)
    return Engine(new_net(width), run, len(PACK_SIZES) // distributed.world_size())


def steps_from(step: int) -> Iterator[Step]:
    return stream(distributed.rank(), distributed.world_size(), step)


def take(engine: Engine, steps: int) -> list[float]:
    """Optimizer steps without the loop."""
    source, norms = steps_from(engine.step), []
    for _ in range(steps):
        batch = next(source)
        for pack in batch.packs:
            engine.backward(losses_of(engine.module, pack).per_sample.sum(), batch.samples)
        norms.append(engine.optimizer_step())
    return norms


def dump(engine: Engine, name: str, norms: list[float] | None = None) -> None:
    """Write weights, averages and figures to OUT/name."""
    model = {f"model/{key}": p.detach().clone() for key, p in engine.module.named_parameters()}
    with engine.ema_weights() as module:
        ema = {f"ema/{key}": p.detach().clone() for key, p in module.named_parameters()}
    for key, p in engine.module.named_parameters():
        assert torch.equal(p, model[f"model/{key}"]), f"{key} is not what it was before ema_weights"
    if distributed.rank() == 0:
        save_file({**model, **ema}, ROOT / f"{name}.safetensors")
        (ROOT / f"{name}.json").write_text(json.dumps({"norms": norms, "step": engine.step, "samples_seen": engine.samples_seen}))


def run_fit(engine: Engine, folder: Path, steps: Iterator[Step], max_bad_fraction: float = 1.0) -> FitResult:
    return fit(engine.run, engine, steps, lambda pack, progress: losses_of(engine.module, pack), max_bad_fraction=max_bad_fraction)


def resumed(folder: Path, **changes: dict[str, object]) -> tuple[Engine, int]:
    engine = new_engine(folder, **changes)
    position = checkpoint.resume(engine, folder)
    return engine, position["step"] if position else 0


def parity() -> None:
    """10 steps at both stages, in float32 and bfloat16."""
    for stage in (1, 2):
        for precision in ("fp32", "bf16"):
            name = f"parity-{distributed.world_size()}-{stage}-{precision}"
            engine = new_engine(ROOT / name, engine={"zero_stage": stage, "precision": precision})
            start = dict(new_net().named_parameters())
            for f in engine.fragments():
                exact = start[f.name].detach().flatten()[f.start : f.start + f.size]
                assert torch.equal(f.views["model"], exact), f"{f.name} does not start from its float32 value"
            norms = take_and_average(engine, 10)
            dump(engine, name, norms)
            checkpoint.save(engine, ROOT / name, {"step": engine.step}, 1)


def take_and_average(engine: Engine, steps: int) -> list[float]:
    """`take`, checking that the averages are, to the last bit, those of the weights that the steps gave."""
    expected = {key: p.detach().clone() for key, p in engine.module.named_parameters()}
    norms = []
    for k in range(1, steps + 1):
        norms += take(engine, 1)
        for key, p in engine.module.named_parameters():
            average(expected[key], p.detach(), ema_beta(engine.run.ema.decay, k))
    with engine.ema_weights() as module:
        is_exact = all(torch.equal(p, expected[key]) for key, p in module.named_parameters())
    assert is_exact or engine.run.engine.precision == "bf16", "the averages are not those of the weights"
    return norms


def elastic() -> None:
    """Go on from the checkpoints of the other world size, at the other stage, for two steps."""
    world = distributed.world_size()
    for stage in (1, 2):
        engine, _ = resumed(ROOT / f"parity-{3 - world}-{3 - stage}-fp32", engine={"zero_stage": stage})
        dump(engine, f"moved-to-{world}-{stage}")
        take(engine, 2)
        dump(engine, f"continued-on-{world}-{stage}")


def whole() -> None:
    """A run without interruption."""
    engine = new_engine(ROOT / "whole")
    assert checkpoint.resume(engine, ROOT / "whole") is None
    previews: list[tuple[int, bool]] = []

    def preview(module: torch.nn.Module, step: int) -> torch.Tensor:
        holds_master = all(
            torch.equal(f.views["model"], dict(module.named_parameters())[f.name].detach().flatten()[f.start : f.start + f.size])
            for f in masters.values()
        )
        previews.append((step, holds_master))
        return torch.zeros(1, 2, 4, 4, 3, dtype=torch.uint8)

    def validate(module: torch.nn.Module) -> HeldOut:
        return HeldOut(torch.tensor([[float(engine.step)]]), (0.5,), ("1x1x1",), "one")

    masters = {f.name: replace(f, views={"model": f.views["model"]}) for f in engine.fragments()}
    result = fit(
        engine.run,
        engine,
        steps_from(0),
        lambda pack, progress: losses_of(engine.module, pack),
        max_bad_fraction=0.0,
        validate=validate,
        preview=preview,
    )
    assert (result.state, result.step) == ("done", 12), result
    if distributed.rank() == 0:
        assert previews == [(0, True), (6, False), (12, False)], previews  # averages equal the weights only at the start
    dump(engine, "whole-end")


def killed() -> None:
    """A run that dies in step 9 without a chance to clean up."""
    engine = new_engine(ROOT / "killed")

    def dying() -> Iterator[Step]:
        for batch in steps_from(0):
            if engine.step == 8:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    run_fit(engine, ROOT / "killed", dying())


def resurrected() -> None:
    """The same command again."""
    engine, start = resumed(ROOT / "killed")
    assert engine.step == start == 5, (engine.step, start)
    result = run_fit(engine, ROOT / "killed", steps_from(start))
    assert (result.state, result.step) == ("done", 12), result
    dump(engine, "killed-end")


def stopped() -> None:
    """SIGTERM on the last rank, then a STOP file, then the rest."""
    folder = ROOT / "stopped"
    folder.mkdir(exist_ok=True)
    engine = new_engine(folder)

    def with_stops(start: int) -> Iterator[Step]:
        for batch in steps_from(start):
            if engine.step == 2 and distributed.rank() == distributed.world_size() - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if engine.step == 6 and distributed.rank() == 0:
                (folder / "STOP").touch()
            yield batch

    states = []
    for _ in range(3):
        engine, start = resumed(folder)
        states.append(run_fit(engine, folder, with_stops(start)))
        if distributed.rank() == 0:
            assert json.loads((folder / "status.json").read_text())["state"] == states[-1].state
    assert [(s.state, s.step) for s in states] == [("interrupted", 3), ("interrupted", 7), ("done", 12)], states
    dump(engine, "stopped-end")


def poisoned() -> None:
    """One rank meets a loss, then a gradient, that is no number: all ranks say so, and the weights stay."""
    engine = new_engine(ROOT / "poisoned")
    take(engine, 1)
    before = {key: p.detach().clone() for key, p in engine.module.named_parameters()}
    batch = next(steps_from(1))
    if distributed.rank() == distributed.world_size() - 1:
        bad = batch.packs[0]
        batch.packs[0] = Pack(bad.x, bad.ids, bad.weights.clone().index_fill_(0, torch.tensor([0]), float("nan")))
    with pytest.raises(NonFinite, match=f"step 2: .* shard-1/{len(PACK_SIZES) - len(PACK_SIZES) // distributed.world_size()}-0$"):
        run_fit(engine, ROOT / "poisoned", iter([batch]))
    batch = next(steps_from(1))
    for pack in batch.packs:
        huge = 1e30 if distributed.rank() == 0 else 1.0
        engine.backward(losses_of(engine.module, pack).per_sample.sum() * huge, batch.samples)
    with pytest.raises(NonFinite, match="step 2: the gradients"):
        engine.optimizer_step()
    assert all(torch.equal(p, before[key]) for key, p in engine.module.named_parameters())


def rotten() -> None:
    """A tenth of the samples cannot be read."""
    engine = new_engine(ROOT / "rotten")

    def rotting() -> Iterator[Step]:
        for batch in steps_from(0):
            first = batch.packs[0]
            hole = Pack(first.x, first.ids, first.weights.clone().index_fill_(0, torch.tensor([0]), 0.0))
            yield replace(batch, packs=[hole, *batch.packs[1:]], bad=[(first.ids[0], "truncated")])

    try:
        run_fit(engine, ROOT / "rotten", rotting(), max_bad_fraction=0.05)
    except UserError as error:
        found = {"code": error.exit_code, "step": engine.step, "text": str(error)}
        (ROOT / f"rotten-{distributed.rank()}.json").write_text(json.dumps(found))


def full() -> None:
    """The disk of the last rank takes no more: nobody hangs, nothing is published, the last checkpoint stays."""
    engine = new_engine(ROOT / "full")
    take(engine, 1)
    checkpoint.save(engine, ROOT / "full", {"step": 1}, 1)
    take(engine, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if distributed.rank() == distributed.world_size() - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    with pytest.raises(UserError, match=f"cannot write a checkpoint to .* rank {distributed.world_size() - 1}: "):
        checkpoint.save(engine, ROOT / "full", {"step": 2}, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    distributed.barrier()
    assert sorted(path.name for path in (ROOT / "full/checkpoints").iterdir()) == ["latest", "step-00000001"]
    checkpoint.save(engine, ROOT / "full", {"step": 2}, 1)
    assert [path.name for path in (ROOT / "full/checkpoints").glob("step-*")] == ["step-00000002"]


def fallback() -> None:
    """The newest checkpoint is damaged: both ranks take the one before."""
    engine, start = resumed(ROOT / "damaged")
    dump(engine, "fallback")
    assert start == engine.step


def unusable() -> None:
    """All checkpoints are damaged, or of another model."""
    found = {}
    for name, width in (("lost", 11), ("whole", 13)):
        engine = new_engine(ROOT / name, width)
        before = [p.detach().clone() for p in engine.module.parameters()]
        try:
            checkpoint.resume(engine, ROOT / name)
        except UserError as error:
            found[name] = {"code": error.exit_code, "text": str(error)}
        assert all(torch.equal(p, q) for p, q in zip(before, engine.module.parameters(), strict=True))
    if distributed.rank() == 0:
        (ROOT / "unusable.json").write_text(json.dumps(found))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    distributed.init()
    for scenario in sys.argv[2:]:
        globals()[scenario]()
    distributed.shutdown()
