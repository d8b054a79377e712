"""The process under test, one of four: `sequence_worker.py OUT SCENARIO ...`. Results go to OUT as JSON."""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from data_pipelines.config import DataConfig, Source
from data_pipelines.errors import UserError
from data_pipelines.packed import Conditioning, PackedLatents, pack_conditioning
from data_pipelines.plan import Plan
from data_pipelines.sources import read_source
from dit.config import FitRun, SpatioTemporalDiTConfig
from dit.config.objective import RectifiedFlowConfig, VariationalConfig
from dit.diffusion import build_objective, equip
from dit.engine import checkpoint
from dit.engine.engine import Engine
from dit.engine.saver import Saver
from dit.engine.tally import Tally
from dit.models import SequenceParallelDiT, SpatioTemporalDiT, build_backbone
from dit.runtime import distributed
from dit.runtime.duals import dual, parts
from dit.stream import Steps

ROOT = Path(sys.argv[1])
CHANNELS, TEXT = 3, 5
SIZES = {"hidden_size": 24, "depth": 2, "num_heads": 4, "ffn_size": 40, "patch_size": (1, 2, 1), "frequency_size": 16}
MIXED, UNIFORM = ((2, 3, 4), (1, 5, 2), (3, 2, 2)), ((2, 3, 2),) * 4
ROUNDING = 1e-11
"""Of float64, in sums in another order."""


def config(**options: object) -> SpatioTemporalDiTConfig:
    return SpatioTemporalDiTConfig.model_validate(SIZES | options)


def network(options: SpatioTemporalDiTConfig, dtype: torch.dtype = torch.float64) -> SpatioTemporalDiT:
    """Equal on every rank and for every number of ranks to a pack; no layer is zero."""
    with distributed.seeded(0):
        model = build_backbone(options, channels=CHANNELS, text_width=TEXT).to(dtype)
        for p in model.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
    return model


def derivatives(model: SpatioTemporalDiT, x: Tensor, t: Tensor, cond: Conditioning) -> dict[str, Tensor]:
    """The answer, its gradients to weights and inputs, and with jumps its derivative along the inputs."""
    x, t = x.clone().requires_grad_(), t.clone().requires_grad_()
    answer = torch.cat([model(x, t, cond), *model.features(x, t, cond, (1, 0))], dim=1)
    target = torch.linspace(-1, 1, answer.numel(), dtype=answer.dtype).view_as(answer)
    loss = (answer - target).square().sum() / distributed.sequence_parallel()
    leaves = {**dict(model.named_parameters()), "x": x, "t": t}
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    summed = distributed.all_reduce_sum(torch.cat([g.flatten() for g in gradients])) / distributed.data_world_size()
    found = {"answer": answer.detach(), **dict(zip(leaves, summed.split([g.numel() for g in gradients]), strict=True))}
    if cond.jump is None or cond.rows is not None:
        return found
    with torch.no_grad():
        _, tangent = parts(model(*(dual(value.detach(), torch.ones_like(value)) for value in (x, t)), cond))
    return found | {"tangent": tangent}


def inputs(grids: tuple[tuple[int, int, int], ...], labels: bool, rows: bool, jumps: bool) -> tuple[Tensor, Tensor, Conditioning]:
    g = torch.Generator().manual_seed(1)
    texts = [torch.randn(n, TEXT, generator=g, dtype=torch.float64) for n in (3, 1, 4, 2)[: len(grids)]]
    cond = pack_conditioning(grids, texts, torch.arange(len(grids)) if labels else None)
    x = torch.randn(sum(cond.lengths), 2 * CHANNELS, generator=g, dtype=torch.float64)
    if rows:  # every other token at the level of row 0
        own = torch.where(torch.arange(len(x)) % 2 == 0, 0, cond.sample_of_token + 1)
        cond = Conditioning(cond.grids, cond.text, cond.text_lengths, own, cond.labels)
    t = torch.rand(len(grids) + rows, generator=g, dtype=torch.float64)
    return x, t, cond.over(0.5 * t.detach()) if jumps else cond


def backbone() -> None:
    """Every segmentation and kind of conditioning."""
    attentions: list[dict[str, object]] = [
        {"attention": "full"},
        {"attention": "factorised"},
        {"attention": "windowed", "window": (2, 2, 2)},
    ]
    cases: list[tuple[dict[str, object], tuple[tuple[int, int, int], ...], bool]] = [
        *[(options, grids, False) for options in attentions for grids in (MIXED, UNIFORM)],
        ({"modulation": "per_block", "num_classes": 4}, MIXED, False),
        ({"num_classes": 4, "jumps": True}, MIXED, True),
        ({"jumps": True}, MIXED, False),
        ({"jumps": True, "activation_checkpointing": "full"}, UNIFORM, True),
        ({"activation_checkpointing": "selective"}, MIXED, False),
    ]
    expected = []
    for ranks in (1, 2, 4):
        distributed.init(ranks)
        for number, (options, grids, rows) in enumerate(cases):
            model = network(config(**options))
            assert isinstance(model, SequenceParallelDiT) == (ranks > 1)
            found = derivatives(model, *inputs(grids, "num_classes" in options, rows, "jumps" in options))
            if ranks == 1:
                expected.append(found)
            for name, value in found.items():
                is_equal = torch.allclose(value, expected[number][name], ROUNDING, ROUNDING)
                assert is_equal, f"{ranks} ranks to a pack, {options}: {name}"
    small = inputs(((1, 1, 3),), False, False, False)
    try:
        model(*small)
    except UserError as error:
        assert "a pack of 3 tokens cannot be shared by engine.sequence_parallel=4" in str(error)  # noqa: PT017  the worker has no pytest
    else:
        raise AssertionError("a rank without tokens")


def pack_of(step: int, number: int) -> PackedLatents:
    """Pack `number` of four, with samples of other sizes in each; one sample is a hole."""
    g = torch.Generator().manual_seed(10 * step + number)
    grids = (MIXED, UNIFORM[:2], MIXED[:2], MIXED[1:])[number]
    cond = pack_conditioning(grids, [torch.randn(n, TEXT, generator=g) for n in (3, 1, 4)[: len(grids)]])
    keys = tuple(1000 * step + 10 * number + i for i in range(len(grids)))
    weights = torch.ones(len(grids))
    weights[0] = 0.0 if number == 1 else 1.0
    return PackedLatents(torch.randn(sum(cond.lengths), 2 * CHANNELS, generator=g), cond, keys, tuple(f"s/{k}" for k in keys), weights)


def engine_of(objective: RectifiedFlowConfig | VariationalConfig, run: FitRun) -> Engine:
    return Engine(equip(network(config(), torch.float32), objective), run, 4 // distributed.data_world_size())


def take(engine: Engine, objective: RectifiedFlowConfig | VariationalConfig, steps: range) -> list[list[float]]:
    """Loss, gradient norm, hash of the ids and number of holes of each step of four packs."""
    losses_of = build_objective(objective, torch.ones(2, TEXT), None)
    each, found = 4 // distributed.data_world_size(), []
    for step in steps:
        tally, first = Tally(), distributed.data_rank() * each
        for number in range(first, first + each):
            pack = pack_of(step, number)
            losses = losses_of(engine.module, pack, 0.0)
            engine.backward(losses.per_sample.sum(), 10)
            tally.add(pack.ids, losses, 1.0)
        holes = [(pack_of(step, 1).ids[0], "torn")] if first <= 1 < first + each and distributed.sequence_rank() == 0 else []
        totals = tally.reduce(10, holes, stop=distributed.rank() == 3)
        assert totals.stop
        assert totals.flops == 4
        outcome = engine.optimizer_step(totals.loss)
        found.append([totals.loss, outcome.grad_norm, int(totals.ids_hash, 16), totals.bad, *totals.bins.values()])
    return found


def weights_of(engine: Engine) -> Tensor:
    """All weights, on every rank."""
    whole = {name: torch.zeros(shape).flatten() for name, shape in engine.shapes.items()}
    for f in engine.owned():
        whole[f.name][f.start : f.start + f.size] = f.views["model"]
    return distributed.all_reduce_sum(torch.cat(list(whole.values())))


def run_of(name: str, ranks: int, stage: int, within: int = 1) -> FitRun:
    return FitRun.model_validate(
        {
            "out": str(ROOT / name),
            "optimizer": {"lr": 1e-3, "max_grad_norm": 1.0},
            "engine": {"zero_stage": stage, "whole_below": 200, "sequence_parallel": ranks, "gather_within": within},
            "train": {"samples": 100, "async_save": False},
        }
    )


def training() -> None:
    """Two steps of four packs: one, two and four ranks to a pack, so one, two and four packs each; a checkpoint of four moves to one."""
    train({"flow": [(1, 0), (2, 0), (4, 3)], "variational": [(1, 0), (2, 3)]}, [(1, 0, "flow-4-3")])


def training_everywhere() -> None:
    """The same at every ZeRO stage, with checkpoints that move every way."""
    stages = [(1, 0), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (4, 0), (4, 1), (4, 2), (4, 3)]
    train({"flow": stages, "variational": stages}, [(1, 0, "flow-2-3"), (4, 3, "flow-1-0"), (2, 1, "flow-4-3"), (2, 3, "flow-1-3")])


def train(shapes: dict[str, list[tuple[int, int]]], moves: list[tuple[int, int, str]]) -> None:
    """Objective by objective, at (ranks to a pack, ZeRO stage); then from the checkpoint of another shape."""
    found = {}
    objectives = {
        "flow": RectifiedFlowConfig(condition_dropout=0.3),
        "variational": VariationalConfig(name="variational"),  # whose schedule has weights outside the backbone
    }
    for name, objective in objectives.items():
        for ranks, stage in shapes[name]:
            distributed.init(ranks)
            run = run_of(f"{name}-{ranks}-{stage}", ranks, stage)
            engine = engine_of(objective, run)
            steps = take(engine, objective, range(1))
            if name == "flow":
                with Saver(run) as saver:
                    saver.save(engine, {"step": 1})
            steps += take(engine, objective, range(1, 2))
            found[f"{name} {ranks} {stage}"] = {"steps": steps, "weights": weights_of(engine).tolist()}
    for ranks, stage, before in moves:
        distributed.init(ranks)
        engine = engine_of(objectives["flow"], run_of("moved", ranks, stage))
        assert checkpoint.resume(engine, ROOT / before) == {"step": 1}
        steps = take(engine, objectives["flow"], range(1, 2))
        found[f"flow from {before} to {ranks} {stage}"] = {"steps": steps, "weights": weights_of(engine).tolist()}
    if distributed.rank() == 0:
        (ROOT / "found.json").write_text(json.dumps(found))


def copies() -> None:
    """ZeRO stage 3 with copies of the weights in groups of two ranks; averages go in and out, and a checkpoint moves on without copies."""
    objective, found = RectifiedFlowConfig(condition_dropout=0.3), {}
    for name, ranks, stage, within in (("flow 1 0", 1, 0, 1), ("flow 1 3 within 2", 1, 3, 2), ("flow 2 3 within 2", 2, 3, 2)):
        distributed.init(ranks)
        run = run_of(name, ranks, stage, within)
        engine = engine_of(objective, run)
        steps = take(engine, objective, range(1))
        with engine.ema_weights() as module:
            x, t, cond = inputs(MIXED, False, False, False)
            with torch.no_grad():
                averaged = module(x.float(), t.float(), cond).sum()
        with Saver(run) as saver:
            saver.save(engine, {"step": 1})
        steps += take(engine, objective, range(1, 2))
        if stage == 3:
            zero = engine._shards._zero
            assert zero.zero_hpz_partition_size == within
        found[name] = {"steps": [*steps, [float(averaged)]], "weights": weights_of(engine).tolist()}
    distributed.init()
    engine = engine_of(objective, run_of("moved", 1, 1))
    assert checkpoint.resume(engine, ROOT / "flow 2 3 within 2") == {"step": 1}
    found["flow moved"] = {"steps": take(engine, objective, range(1, 2)), "weights": weights_of(engine).tolist()}
    if distributed.rank() == 0:
        (ROOT / "found.json").write_text(json.dumps(found))


def holes() -> None:
    """OUT/N/latents has what rank N reads; that of rank 1 has damaged samples."""
    distributed.init(2)
    source = str(ROOT / str(distributed.rank()) / "latents")
    data = DataConfig(sources=[Source(path=source)], token_budget=192, packs_per_step=2, num_workers=0)
    plan = Plan(data, [read_source(source, config_key="data.sources")], lambda facts: (facts.frames, 4, 4), 0)
    with Steps(plan, distributed.data_rank(), distributed.data_world_size()) as steps:
        batches = [next(steps) for _ in range(6)]
    errors = [[(sample.id, sample.error) for sample in pack.samples] for batch in batches for pack in batch.packs]
    first, second = distributed.gather_json(errors)
    assert first == second
    named = distributed.gather_json([name for batch in batches for name, _ in batch.bad])
    assert len(named[0]) == len({name for pack in first for name, error in pack if error}) == 3
    assert not named[1]


def refused() -> None:
    """What cannot be shared is refused before anything is built."""
    said = []
    for attempt in (lambda: distributed.init(3), lambda: (distributed.init(4), network(config(num_heads=2)))):
        try:
            attempt()
        except UserError as error:
            said.append(str(error))
    if distributed.rank() == 0:
        (ROOT / "refused.json").write_text(json.dumps(said))


if __name__ == "__main__":
    distributed.init()
    for scenario in sys.argv[2:]:
        globals()[scenario]()
    distributed.shutdown()
