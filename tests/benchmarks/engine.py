"""What the engine costs, as ratios measured side by side in one run. Prints Markdown tables.

    python tests/benchmarks/engine.py step
    torchrun --nproc_per_node 2 tests/benchmarks/engine.py zero
    torchrun --nproc_per_node 2 tests/benchmarks/engine.py sequence
    python tests/benchmarks/engine.py memory
    python tests/benchmarks/engine.py checkpoint [FOLDER]

Contestants take turns, step by step, so that a busy machine slows all of them; a figure is the median of the ratios of the turns
(of disks: the ratio of the best turns).
Times are CPU times of the process where only computing is compared, and wall times where disks or messages are.
"""

import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data_pipelines.packed import pack_conditioning
from dit.config import FitRun, SpatioTemporalDiTConfig
from dit.engine import checkpoint, durable
from dit.engine.engine import Engine
from dit.engine.loop import fit
from dit.engine.optimizer import parameter_groups
from dit.engine.saver import Saver
from dit.models import build_backbone
from dit.runtime import distributed
from dit.runtime.losses import Losses


class Net(nn.Module):
    """A residual perceptron; `width` and `depth` set its weight, the batch its time."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Pack(NamedTuple):
    x: Tensor
    ids: tuple[str, ...]
    grids: list[tuple[int, int, int]]


class Place(NamedTuple):
    step: int


class Step(NamedTuple):
    packs: list[Pack]
    samples: int
    position: Place
    bad: list[tuple[str, str]]


def make(width: int, depth: int) -> Net:
    torch.manual_seed(0)
    return Net(width, depth)


def pack_of(samples: int, tokens: int, width: int) -> Pack:
    return Pack(torch.randn(samples, tokens, width), tuple(f"s{i}" for i in range(samples)), [(1, 1, tokens)] * samples)


def losses_of(module: nn.Module, pack: Pack) -> Losses:
    return Losses((module(pack.x) - pack.x.roll(1, 1)).square().mean((1, 2)), torch.linspace(0, 1, len(pack.x)))


def config(out: str, **changes: object) -> FitRun:
    values: dict[str, object] = {"out": out, "optimizer": {"lr": 1e-4}, "train": {"samples": 10**9, "save_every_steps": 10**6}}
    return FitRun.model_validate(values | changes)


class Bare:
    """Plain torch: fused AdamW, clipping, one average; DistributedDataParallel if there are several ranks."""

    def __init__(self, module: nn.Module) -> None:
        self.module = nn.parallel.DistributedDataParallel(module) if distributed.world_size() > 1 else module
        self.parameters = list(module.parameters())
        self.optimizer = torch.optim.AdamW(parameter_groups(module, 0.0), lr=1e-4, betas=(0.9, 0.95), fused=True)
        self.ema = [p.detach().clone() for p in self.parameters]

    def step(self, pack: Pack) -> None:
        self.optimizer.zero_grad()
        losses_of(self.module, pack).per_sample.mean().backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1e-3)


def table(title: str, rows: list[tuple[str, ...]]) -> None:
    head, *body = rows
    if distributed.rank() == 0:
        print(f"\n{title}\n\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
        print("\n".join("| " + " | ".join(row) + " |" for row in body), flush=True)


def step() -> None:
    """The whole loop, with records and guard, against a bare one; the average apart."""
    rows = [one_size(width, samples) for width, samples in ((256, 2), (256, 24))]
    head = ("step of the bare loop", "fit / bare", "average / step")
    table("One process: `fit` (records, guard, tally) against a bare torch loop with clipping and one average", [head, *rows])


def one_size(width: int, samples: int) -> tuple[str, ...]:
    """A row: how long a bare step takes, how much longer `fit` takes, and what the average takes of it. CPU times."""
    bare, pack = Bare(make(width, 4)), pack_of(samples, 64, width)
    ours: list[float] = []
    theirs: list[float] = []
    with tempfile.TemporaryDirectory() as out:
        engine = Engine(make(width, 4), config(out), 1)

        def turns() -> Iterator[Step]:
            for number in range(40):
                start = time.process_time()
                bare.step(pack)
                theirs.append(time.process_time() - start)
                if number == 39:
                    Path(out, "STOP").touch()
                start = time.process_time()
                yield Step([pack], samples, Place(number), [])
                ours.append(time.process_time() - start)

        fit(engine.run, engine, turns(), lambda pack, progress: losses_of(engine.module, pack), max_bad_fraction=1.0)
    state, start = engine._optimizer.state, time.process_time()
    for _ in range(20):
        for master in engine._shards.masters:
            state[master]["ema"].lerp_(master.data, 1e-3)
    average = (time.process_time() - start) / 20
    ratios = [a / b for a, b in zip(ours[5:], theirs[5 : len(ours)], strict=True)]
    usual = median(theirs[5:])
    return f"{1000 * usual:.0f} ms", f"{median(ratios):.3f}", f"{average / usual:.1%}"


def zero() -> None:
    """ZeRO stages against DistributedDataParallel, over the ranks that there are, at few and at many tokens a rank."""
    for samples in (4, 32):
        one_load(384, 6, samples)


def one_load(width: int, depth: int, samples: int) -> None:
    pack = pack_of(samples, 64, width)
    bare = Bare(make(width, depth))
    engines = {stage: Engine(make(width, depth), config("unused", engine={"zero_stage": stage}), 1) for stage in (0, 1, 2, 3)}

    def take(engine: Engine) -> None:
        losses = losses_of(engine.module, pack).per_sample
        engine.backward(losses.sum(), samples * distributed.world_size())
        engine.optimizer_step(1.0)

    contestants: dict[str, Callable[[], object]] = {"DDP": lambda: bare.step(pack)}
    contestants |= {f"ZeRO-{stage}": lambda engine=engine: take(engine) for stage, engine in engines.items()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(25 if samples < 16 else 13):
        for name, run in contestants.items():
            distributed.barrier()
            start = time.perf_counter()
            run()
            distributed.barrier()
            times[name].append(time.perf_counter() - start)
    rows: list[tuple[str, ...]] = [("", "wall time of a step", "/ DDP")]
    for name, found in times.items():
        ratios = [a / b for a, b in zip(found[5:], times["DDP"][5:], strict=True)]
        rows.append((name, f"{1000 * median(found[5:]):.0f} ms", f"{median(ratios):.2f}"))
    size = sum(p.numel() for p in bare.parameters) / 1e6
    table(f"{distributed.world_size()} ranks on gloo, {size:.1f} M parameters, {64 * samples:,} tokens a rank, float32", rows)


def backbone(**options: object) -> Callable[[tuple[int, int, int]], None]:
    """A backward pass of a backbone over one sample of a grid."""
    sizes = {"hidden_size": 384, "depth": 6, "num_heads": 6, "ffn_size": 1536}
    with distributed.seeded(0):
        network = build_backbone(SpatioTemporalDiTConfig.model_validate(sizes | options), channels=16, text_width=64)

    def run(grid: tuple[int, int, int]) -> None:
        cond = pack_conditioning([grid], [torch.ones(16, 64)])
        network(torch.ones(cond.lengths[0], 64), torch.full((1,), 0.5), cond).square().mean().backward()

    return run


def sequence() -> None:
    """A pack on all ranks together against a pack on one of them, while the others wait. Wall times."""
    ranks, rows = distributed.world_size(), [("tokens", "alone", "together", "speed-up")]
    alone = backbone()
    distributed.init(ranks)
    together = backbone()
    for grid in ((1, 16, 16), (4, 16, 16)):
        pairs = []
        for _ in range(4):
            times = []
            for run, takes_part in ((alone, distributed.rank() == 0), (together, True)):
                distributed.barrier()
                start = time.perf_counter()
                if takes_part:
                    run(grid)
                distributed.barrier()
                times.append(time.perf_counter() - start)
            pairs.append(times)
        one, all_ = (median(pair[i] for pair in pairs[1:]) for i in (0, 1))
        speed = median(a / b for a, b in pairs[1:])
        rows.append((str(math.prod(grid)), f"{one:.2f} s", f"{all_:.2f} s", f"{speed:.2f}"))
    table(f"A forward and backward pass on {ranks} ranks", rows)


def memory() -> None:
    """Peak memory and CPU time of a forward and backward pass, a process for each way of keeping activations."""
    rows = [("activation_checkpointing", "tokens", "CPU time", "peak above the weights")]
    for grid in ("1x16x16", "4x16x16"):
        for mode in ("none", "selective", "full"):
            env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}  # freed memory goes back at once
            command = [sys.executable, __file__, "one_pass", mode, grid]
            rows.append(tuple(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.split("|")))
    table("What activations cost", rows)


def one_pass() -> None:
    mode, grid = sys.argv[2], tuple(map(int, sys.argv[3].split("x")))
    run = backbone(activation_checkpointing=mode)
    run((1, 2, 2))  # gradients
    before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(3):
        start = time.process_time()
        run((grid[0], grid[1], grid[2]))
        times.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{mode}|{math.prod(grid)}|{min(times):.2f} s|{peak / 1024:.0f} MiB", end="")


def checkpoint_() -> None:
    """Saving and loading against the disk, and against what others do with as many bytes."""
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as folder:
        in_folder(Path(folder))


def in_folder(base: Path) -> None:
    module = make(1024, 3)
    run = config(str(base / "run"), train={"samples": 1, "keep_checkpoints": 1, "async_save": False})
    later = run.model_copy(update={"out": str(base / "later"), "train": run.train.model_copy(update={"async_save": True})})
    engine = Engine(module, run, 1)
    losses = losses_of(module, pack_of(1, 4, 1024)).per_sample
    engine.backward(losses.sum(), 1)
    engine.optimizer_step(1.0)
    views = {f"{kind}/{f.name}": view for f in engine.owned() for kind, view in f.views.items()}
    size = sum(view.nbytes for view in views.values())
    raw, sync, pause = base / "raw", Saver(run), Saver(later)

    def write_raw() -> None:  # beside the old file, as whoever wants to keep one must
        with raw.with_suffix(".new").open("wb", buffering=0) as file:
            for view in views.values():
                file.write(memoryview(view.numpy()).cast("B"))
            os.fsync(file.fileno())
        raw.with_suffix(".new").replace(raw)

    def flushed(path: Path) -> None:
        for file in [path] if path.is_file() else path.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())

    def torch_save() -> None:
        torch.save(dict(views), base / "torch.pt")
        flushed(base / "torch.pt")

    def dcp() -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(dict(views), checkpoint_id=base / "dcp")
        flushed(base / "dcp")

    theirs = deepspeed_engine(make(1024, 3))

    def deepspeed() -> None:
        theirs.save_checkpoint(str(base / "deepspeed"))
        flushed(base / "deepspeed")

    batch, blocked = pack_of(8, 32, 1024), list[float]()
    gradients: dict[bool, list[float]] = {False: [], True: []}

    def save_later() -> None:
        """The gradients of a step with and without a save behind them, and how long the second was blocked by it."""
        for saves in (False, True):
            begun = time.perf_counter()
            if saves:
                pause.save(engine, {"step": 1})
            saving = time.perf_counter() - begun
            engine.backward(losses_of(module, batch).per_sample.sum(), 8)
            computed = time.perf_counter()
            pause.wait_copied()
            gradients[saves].append(time.perf_counter() - begun)
            if saves:
                blocked.append(saving + time.perf_counter() - computed)
            pause.finish()

    savers: dict[str, Callable[[], object]] = {
        "raw write and fsync": write_raw,
        "save": lambda: sync.save(engine, {"step": 1}),
        "gradients twice, and a save behind the second": save_later,
        "torch.save and fsync": torch_save,
        "dcp.save and fsync": dcp,
        "DeepSpeed save_checkpoint and fsync": deepspeed,
    }
    times = turns(savers, "raw write and fsync", 6)
    table(f"Saving {size / 1e6:.0f} MB", rows_of(times, size))
    alone, with_save = (f"{1000 * median(gradients[saves][1:]):.0f} ms" for saves in (False, True))
    wait, whole = median(blocked[1:]), min(own for _, own in times["save"])
    heads = ("gradients of a step", "with a save behind them", "blocked", "blocked / save")
    table("What training waits for", [heads, (alone, with_save, f"{1000 * wait:.0f} ms", f"{wait / whole:.3f}")])

    def read_raw() -> None:
        with raw.open("rb", buffering=0) as handle:
            block = bytearray(1 << 24)
            while handle.readinto(block):
                pass

    folder = durable.step_folder(base / "run" / "checkpoints", engine.step)
    loaders: dict[str, tuple[Path, Callable[[], object]]] = {
        "raw read": (raw, read_raw),
        "verify": (folder, lambda: durable.problems(folder)),
        "verify and load": (folder, lambda: checkpoint.resume(engine, base / "run")),
    }
    times = turns({name: action for name, (_, action) in loaders.items()}, "raw read", 6, lambda name: forget(loaders[name][0]))
    table("Loading it again, its pages dropped from the cache", rows_of(times, size))


def deepspeed_engine(module: nn.Module) -> Any:
    """DeepSpeed alone, stage 1, with weights, master weights and two moments: as many bytes as ours."""
    import deepspeed

    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    options = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=options)
    engine.backward(engine(torch.randn(1, 4, 1024)).sum())
    engine.step()
    return engine


def forget(path: Path) -> None:
    """Drop the clean pages of `path` from the page cache."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def turns(
    contestants: dict[str, Callable[[], object]], peer: str, count: int, before: Callable[[str], None] = lambda name: None
) -> dict[str, list[tuple[float, float]]]:
    """Wall times of `count` turns after one that does not count, each with that of the peer right before it."""

    def timed(name: str) -> float:
        before(name)
        start = time.perf_counter()
        contestants[name]()
        return time.perf_counter() - start

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for turn in range(count + 1):
        for name in contestants:
            pair = (timed(peer), timed(name))
            if turn:
                times[name].append(pair)
    return times


def rows_of(times: dict[str, list[tuple[float, float]]], size: int) -> list[tuple[str, ...]]:
    """Best wall time, rate, and speed relative to the best of the peer: others' use of the disk only ever adds to a time."""
    rows: list[tuple[str, ...]] = [("", "best time", "MB/s", "relative speed")]
    peer = min(before for pairs in times.values() for before, _ in pairs)
    for name, pairs in times.items():
        best = min(own for _, own in pairs)
        rows.append((name, f"{best:.2f} s", f"{size / 1e6 / best:.0f}", f"{peer / best:.2f}"))
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] != "one_pass":
        distributed.init()
    {"step": step, "zero": zero, "checkpoint": checkpoint_, "sequence": sequence, "memory": memory, "one_pass": one_pass}[sys.argv[1]]()
    distributed.shutdown()
