"""The process under test: `python worker.py OUT SCENARIO ...` or the same under torchrun. Results go to OUT as safetensors and JSON."""

import json
import logging
import os
import random
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from data_pipelines.errors import UserError
from dit.engine import checkpoint, durable, loop
from dit.engine.copies import CopiesDiffer
from dit.engine.engine import Engine
from dit.engine.guard import UntrustedStep
from dit.engine.held_out import HeldOut
from dit.engine.loop import FitResult, fit
from dit.engine.optimizer import average, ema_betas, ema_kinds
from dit.engine.saver import Saver
from dit.runtime import distributed
from dit.runtime.losses import Losses

sys.path.insert(0, str(Path(__file__).parent))
from toy_regression import PACK_SIZES, STEP_SAMPLES, Pack, Pair, Step, losses_of, new_net, pair_losses, pair_turns, run_config, stream

ROOT = Path(sys.argv[1])


def new_engine(folder: Path, width: int = 11, **changes: dict[str, object]) -> Engine:
    run = run_config(str(folder), **changes)
    return Engine(new_net(width), run, len(PACK_SIZES) // distributed.world_size())


def steps_from(step: int) -> Iterator[Step]:
    return stream(distributed.rank(), distributed.world_size(), step)


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the whole weights, on every rank; ZeRO stage 3 leaves a rank its share only."""
    import deepspeed

    parameters = dict(module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=hasattr(next(iter(parameters.values())), "ds_id")):
        return {name: p.detach().clone() for name, p in parameters.items()}


def save(engine: Engine, folder: Path) -> None:
    with Saver(engine.run.model_copy(update={"out": str(folder)})) as saver:
        saver.save(engine, {"step": engine.step})


def take(engine: Engine, steps: int) -> list[float]:
    """Optimizer steps without the loop."""
    source = steps_from(engine.step)
    return [take_this(engine, next(source)) for _ in range(steps)]


def take_this(engine: Engine, batch: Step) -> float:
    """One optimizer step; returns the gradient norm."""
    for pack in batch.packs:
        engine.backward(losses_of(engine.module, pack).per_sample.sum(), batch.samples)
    return engine.optimizer_step(0.0).grad_norm


def dump(engine: Engine, name: str, norms: list[float] | None = None) -> None:
    """Write weights, averages and figures to OUT/name."""
    before = weights_of(engine.module)
    with engine.ema_weights() as module:
        averages = weights_of(module)
    for key, p in weights_of(engine.module).items():
        assert torch.equal(p, before[key]), f"{key} is not what it was before ema_weights"
    model, ema = {f"model/{key}": p for key, p in before.items()}, {f"ema/{key}": p for key, p in averages.items()}
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
    """10 steps at all stages, in float32 and bfloat16."""
    for stage in (0, 1, 2, 3):
        for precision in ("fp32", "bf16"):
            name = f"parity-{distributed.world_size()}-{stage}-{precision}"
            engine = new_engine(ROOT / name, engine={"zero_stage": stage, "precision": precision})
            start = dict(new_net().named_parameters())
            for f in engine.fragments():
                exact = start[f.name].detach().flatten()[f.start : f.start + f.size]
                assert torch.equal(f.views["model"], exact), f"{f.name} does not start from its float32 value"
            norms = take_and_average(engine, 10)
            dump(engine, name, norms)
            save(engine, ROOT / name)
    if distributed.world_size() == 2:
        for stage in (2, 3):
            engine = new_engine(ROOT / "offloaded", engine={"zero_stage": stage, "offload": "optimizer"})
            dump(engine, f"offloaded-{stage}", take_and_average(engine, 10))


def take_and_average(engine: Engine, steps: int) -> list[float]:
    """`take`, checking that the averages are, to the last bit, those of the weights that the steps gave."""
    start, kinds = weights_of(engine.module), ema_kinds(engine.run.ema)
    expected = {kind: {key: p.clone() for key, p in start.items()} for kind in kinds}
    norms = []
    for k in range(1, steps + 1):
        norms += take(engine, 1)
        for key, p in weights_of(engine.module).items():
            for kind, beta in ema_betas(engine.run.ema, k).items():
                average(expected[kind][key], p, beta)
    assert len(kinds) == 3
    for kind in kinds:
        with engine.ema_weights(kind) as module:
            is_exact = all(torch.equal(p, expected[kind][key]) for key, p in weights_of(module).items())
        assert is_exact or engine.run.engine.precision == "bf16", f"the averages {kind} are not those of the weights"
    return norms


def turns() -> None:
    """Two networks in turns, at all stages: the one that is not in turn keeps every bit of what it has."""
    modes = [(stage, precision, "none") for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
    modes += [(2, "fp32", "optimizer"), (3, "fp32", "optimizer")] if distributed.world_size() == 2 else []
    for stage, precision, offload in modes:
        name = f"turns-{distributed.world_size()}-{stage}-{precision}-{offload}"
        engine = new_pair(ROOT / name, zero_stage=stage, precision=precision, offload=offload)
        first, second = (sum(p.numel() for p in net.parameters()) for net in (new_net(), new_net(9)))
        held = sum(view.nbytes for f in engine.owned() for view in f.views.values())
        averages = len(ema_kinds(engine.run.ema))
        assert int(distributed.all_reduce_sum(torch.tensor(held))) == 4 * ((3 + averages) * first + 3 * second)
        for _ in range(7):
            take_turn(engine)
        save(engine, ROOT / name)
        for _ in range(2):
            take_turn(engine)
        save(engine, ROOT / name)


def turns_elsewhere() -> None:
    """The checkpoint of step 7 of another stage and world size goes on for two steps."""
    world = distributed.world_size()
    for stage in (0, 1, 2, 3):
        engine = new_pair(ROOT / f"turns-{3 - world}-{3 - stage}-fp32-none", zero_stage=stage)
        checkpoint.resume(engine, Path(engine.run.out), before=9)
        assert (engine.step, engine.taken) == (7, {"first": 2, "second": 5})
        for _ in range(2):
            take_turn(engine)
        save(engine, ROOT / f"turns-moved-to-{world}-{stage}")
        if world == 2:
            poisoned_turn(zero_stage=stage, precision="fp32")
            poisoned_turn(zero_stage=stage, precision="bf16")
    if world == 2:
        poisoned_turn(zero_stage=3, offload="optimizer")


def poisoned_turn(**options: object) -> None:
    """A step of no number is dropped, and leaves nothing that the next step, of the other network, meets."""
    engine = new_pair(ROOT / "unused", **options)
    take_turn(engine)
    take_turn(engine, poison=True)
    assert engine.taken == {"first": 0, "second": 1}
    take_turn(engine)
    assert engine.taken == {"first": 1, "second": 1}


def new_pair(folder: Path, **engine: object) -> Engine:
    run = run_config(str(folder), engine=engine)
    return Engine(Pair(), run, len(PACK_SIZES) // distributed.world_size(), pair_turns(run))


def take_turn(engine: Engine, poison: bool = False) -> None:
    """One step, which changes everything that the network in turn has, and nothing of the other."""
    turn = engine.turn
    before = {(f.name, f.start, kind): view.clone() for f in engine.fragments() for kind, view in f.views.items()}
    batch = next(steps_from(engine.step))
    for pack in batch.packs:
        factor = float("nan") if poison and distributed.rank() == 0 else 1.0
        engine.backward(factor * pair_losses(engine.module, turn, pack).per_sample.sum(), batch.samples)
    outcome = engine.optimizer_step(1.0)
    assert outcome.network == turn
    assert poison != (0 < outcome.grad_norm < 100), outcome
    for f in engine.fragments():
        assert ("ema" in f.views) == f.name.startswith("first."), f
        for kind, view in f.views.items():
            moved = not torch.equal(view, before[f.name, f.start, kind])
            assert moved == (f.name.startswith(f"{turn}.") and not poison), f"{f.name} {kind} in the turn of {turn}"


def elastic() -> None:
    """Go on from the checkpoints of the other world size, at the other stage, for two steps."""
    world = distributed.world_size()
    for stage in (0, 1, 2, 3):
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
    engine = new_engine(ROOT / "killed", train={"async_save": False})  # so that it is known which checkpoint there is

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
    """One rank meets a loss, then a gradient, that is no number: at every stage all ranks drop exactly that step."""
    norms = {}
    for stage in (0, 1, 2, 3):
        for precision in ("fp32", "bf16"):
            folder = ROOT / f"poisoned-{stage}-{precision}"
            engine = new_engine(folder, engine={"zero_stage": stage, "precision": precision})
            norms[f"{stage}-{precision}"] = [take(engine, 1)]
            before = weights_of(engine.module)
            with engine.ema_weights() as module:
                averages = weights_of(module)
            run_fit(engine, folder, poisoned_steps())
            assert (engine.step, engine.skipped, engine.samples_seen) == (3, 2, 3 * STEP_SAMPLES)
            assert_equal(weights_of(engine.module), before)
            with engine.ema_weights() as module:
                assert_equal(weights_of(module), averages)
            take(engine, 1)
            assert engine.skipped == 2
            assert not torch.equal(weights_of(engine.module)["inner.weight"], before["inner.weight"])
    engine = new_engine(ROOT / "poisoned-stop", guard={"on_nonfinite": "stop"})
    engine.step = 1
    with pytest.raises(UntrustedStep, match="step 2: the loss is not finite"):
        run_fit(engine, ROOT / "poisoned-stop", poisoned_steps())


def poisoned_steps() -> Iterator[Step]:
    """Step 2, with a loss on the last rank that is no number; step 3, with gradients of the first rank that are none. Then the end."""
    for number in (1, 2):
        batch = next(steps_from(number))
        first = batch.packs[0]
        if number == 1 and distributed.rank() == distributed.world_size() - 1:
            batch.packs[0] = replace(first, weights=first.weights.clone().index_fill_(0, torch.tensor([0]), float("nan")))
        if number == 2 and distributed.rank() == 0:
            batch.packs[0] = replace(first, breaks_gradient=True)
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch


def spiking() -> None:
    """A gradient ten thousand times its size enters the moments with the norm that the guard allows, at every stage."""
    for stage in (0, 1, 2, 3):
        engine = new_engine(ROOT / "spiking", engine={"zero_stage": stage}, guard={"window": 8}, optimizer={"max_grad_norm": 100.0})
        take(engine, 5)
        limit = engine.guard.max_norm(engine.run.optimizer.max_grad_norm)
        assert limit < 0.9 * engine.run.optimizer.max_grad_norm, "the guard should be stricter than the configured norm"
        before = [f.views["exp_avg"].clone() for f in engine.owned()]
        batch = next(steps_from(5))
        norm = take_this(engine, replace(batch, packs=[replace(pack, weights=pack.weights * 1e4) for pack in batch.packs]))
        assert norm > 1000
        beta = engine.run.optimizer.betas[0]
        entered = [(f.views["exp_avg"] - beta * old) / (1 - beta) for f, old in zip(engine.owned(), before, strict=True)]
        square = distributed.all_reduce_sum(sum((part.square().sum() for part in entered), torch.zeros(())))
        assert float(square) ** 0.5 == pytest.approx(limit, rel=1e-4)


def returned() -> None:
    """A loss that is no number in step 7 sends the run back to step 5; it goes on with the data behind step 7."""
    order = [0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 12, 13]
    expected = new_engine(ROOT / "unused")
    source = {number: next(steps_from(number)) for number in range(14)}
    for number in order:
        take_this(expected, source[number])
    engine = new_engine(ROOT / "returned", guard={"on_nonfinite": "rollback"})

    def with_a_hole() -> Iterator[Step]:
        for number in range(14):
            batch = source[number]
            if number == 6 and distributed.rank() == 0:
                first = batch.packs[0]
                batch = replace(batch, packs=[replace(first, weights=first.weights * float("inf")), *batch.packs[1:]])
            yield batch

    result = run_fit(engine, ROOT / "returned", with_a_hole())
    assert (result.state, result.step, engine.skipped) == ("done", 12, 0), result
    assert_equal(weights_of(engine.module), weights_of(expected.module))
    assert engine.guard.bad == [7]


def ruined() -> None:
    """200 damages of the newest checkpoint: each is found by both ranks before anything is touched, and both take the one before."""
    root, generator = ROOT / "whole" / "checkpoints", random.Random(0)
    folder = durable.step_folder(root, 12)
    files = sorted(folder.iterdir())
    intact = {path: path.read_bytes() for path in files}
    engine = new_engine(ROOT / "whole")
    untouched = weights_of(engine.module)
    for trial in range(200):
        path, how = files[trial % len(files)], generator.choice(["flip", "flip", "cut", "delete"])
        data, place = bytearray(intact[path]), generator.random()
        if distributed.rank() == 0:
            if how == "flip":
                data[int(place * len(data))] ^= 1 << generator.randrange(8)
            path.write_bytes(data[: int(place * len(data))] if how == "cut" else data)
            if how == "delete":
                path.unlink()
        distributed.barrier()
        assert checkpoint.newest_valid(root, distributed.rank(), distributed.world_size()) == 10, f"{how} of {path} at {place}"
        distributed.barrier()
        if distributed.rank() == 0:
            path.write_bytes(intact[path])
    assert_equal(weights_of(engine.module), untouched)
    for hint in (None, "", "step-00000099\n", "nonsense"):  # a pointer that lies changes nothing
        if distributed.rank() == 0:
            (root / "latest").unlink(missing_ok=True)
            if hint is not None:
                (root / "latest").write_text(hint)
        distributed.barrier()
        assert checkpoint.resume(engine, ROOT / "whole") == {"step": 12, "left_out": []}


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(p, expected[key]) for key, p in got.items())


def diverged() -> None:
    """One bit of one weight of the last rank is another, at every stage: all ranks stop at the next comparison, and nothing is saved."""
    shared = [(0, {}), (1, {}), (2, {}), (2, {"precision": "bf16"}), (0, {"precision": "bf16"}), (3, {"whole_below": 12})]
    for stage, engine in shared:
        found_after(2, "published/inner.bias", lambda engine: flip(engine.module.inner.bias), engine={"zero_stage": stage, **engine})
    never = {"log_every_steps": 100, "save_every_steps": 4}
    found_after(4, "ema/inner.weight", lambda engine: flip(ema_of(engine, "inner.weight"), 20), engine={"zero_stage": 0}, train=never)


def found_after(step: int, name: str, harm: Callable[[Engine], None], **changes: dict[str, object]) -> None:
    """`harm` on the last rank in the third step ends the run after `step` steps, and names `name` and both ranks."""
    folder = ROOT / "diverged"
    engine = new_engine(folder, **changes)
    harmed: list[None] = []

    def losses_here(pack: Pack, progress: float) -> Losses:
        losses = losses_of(engine.module, pack)
        if engine.step == 2 and distributed.rank() == 1 and not harmed:
            harm(engine)
            harmed.append(None)
        return losses

    with pytest.raises(CopiesDiffer, match=f"after step {step}: {name} of rank 0 on .*, rank 1 on "):
        fit(engine.run, engine, steps_from(0), losses_here, max_bad_fraction=1.0)
    assert engine.step == step
    assert not durable.published(folder / "checkpoints")


def flip(tensor: torch.Tensor, bit: int = 0) -> None:
    """Change one bit of the fourth element; the lowest is a relative difference of 1e-7 in float32."""
    tensor.data.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])[3] ^= 1 << bit


def ema_of(engine: Engine, name: str) -> torch.Tensor:
    return next(f.views["ema"] for f in engine.fragments() if f.name == name)


def straggling() -> None:
    """The last rank sleeps for 0.1 s in each step: the first says so once a window, and of nobody else."""
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dit.engine.stragglers").addHandler(listener)
    engine = new_engine(ROOT / "straggling", train={"samples": 30 * STEP_SAMPLES, "save_every_steps": 100})

    def losses_here(pack: Pack, progress: float) -> Losses:
        time.sleep(0.05 * distributed.rank())
        return losses_of(engine.module, pack)

    fit(engine.run, engine, steps_from(0), losses_here, max_bad_fraction=1.0)
    assert len(said) == (distributed.rank() == 0), said
    assert all(re.match(r"steps 1-25: rank 1 on \S+ is slow", line) for line in said), said


def written() -> None:
    """How tests/dit/engine/format-1 was made, once for all: `python tests/dit/engine/worker.py tests/dit/engine/format-1 written`."""
    engine = new_engine(ROOT)
    take(engine, 2)
    save(engine, ROOT)


def read_again() -> None:
    """A checkpoint of format 1, as the first release with that format wrote it, goes on for two steps."""
    for stage in (1, 3):
        engine, start = resumed(Path(__file__).parent / "format-1", engine={"zero_stage": stage})
        assert (engine.step, start, engine.samples_seen) == (2, 2, 2 * STEP_SAMPLES)
        take(engine, 2)
        dump(engine, f"format-1-on-{distributed.world_size()}-{stage}")


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


def overlapped() -> None:
    """A save is copied slower than the next step computes: it holds the state of its own step."""

    class SlowSaver(Saver):
        def _copy(self, *inputs: Any) -> None:
            time.sleep(0.3)
            super()._copy(*inputs)

    engine = new_engine(ROOT / "overlapped", train={"samples": 2 * STEP_SAMPLES, "save_every_steps": 1})
    kept: list[dict[str, torch.Tensor]] = []

    def watched() -> Iterator[Step]:
        for batch in steps_from(0):
            kept.append(weights_of(engine.module))
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Saver", SlowSaver)
        run_fit(engine, ROOT / "overlapped", watched())
    saved = checkpoint.load_weights(ROOT / "overlapped", 1, "model")
    assert_equal(saved, kept[1])
    assert not torch.equal(saved["outer.bias"], weights_of(engine.module)["outer.bias"])

    left_out = ["found before"]
    with SlowSaver(engine.run) as saver:
        saver.save(engine, {"left_out": left_out})
        left_out.append("found by the next step")
    state = ROOT / "overlapped/checkpoints/step-00000002/state.json"
    assert json.loads(state.read_text())["position"] == {"left_out": ["found before"]}


def full() -> None:
    """The disk of the last rank takes no more: nobody hangs, nothing is published, the last checkpoint stays."""
    engine = new_engine(ROOT / "full", train={"keep_checkpoints": 1})
    take(engine, 1)
    save(engine, ROOT / "full")
    take(engine, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if distributed.rank() == distributed.world_size() - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    with pytest.raises(UserError, match=f"cannot write a checkpoint to .* rank {distributed.world_size() - 1}: "):
        save(engine, ROOT / "full")
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    distributed.barrier()
    assert sorted(path.name for path in (ROOT / "full/checkpoints").iterdir()) == ["latest", "step-00000001"]
    save(engine, ROOT / "full")
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
        before = weights_of(engine.module)
        try:
            checkpoint.resume(engine, ROOT / name)
        except UserError as error:
            found[name] = {"code": error.exit_code, "text": str(error)}
        assert_equal(weights_of(engine.module), before)
    if distributed.rank() == 0:
        (ROOT / "unusable.json").write_text(json.dumps(found))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    distributed.init()
    for scenario in sys.argv[2:]:
        globals()[scenario]()
    distributed.shutdown()
