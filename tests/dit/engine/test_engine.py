"""The engine in real processes: parity with plain torch, elastic and damaged checkpoints, kills and stops. gloo, 1 and 2 ranks."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data_pipelines.errors import NoValidCheckpoint, UserError
from dit.config import FitRun
from dit.engine import durable
from dit.engine.checkpoint import load_weights
from dit.engine.copies import odd_ones
from dit.engine.stragglers import slow_ranks

sys.path.insert(0, str(Path(__file__).parent))
from toy_regression import STEP_SAMPLES, Net, pair_reference, reference, run_config

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[2]
pytestmark = pytest.mark.timeout(900)  # the first test waits for five launches
DATA_BUDGET_EXIT = 3
ULPS = 4 * torch.finfo(torch.float32).eps
"""Fused and plain AdamW, and sums of gradients in another order, differ by less than this, relative to weights of size 1, in 12 steps."""


def launch(root: Path, ranks: int, *scenarios: str, code: int = 0, **env: str) -> str:
    """Run the worker; returns what it printed."""
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [sys.executable, *launcher, str(HERE / "worker.py"), str(root), *scenarios]
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")}
    environment = {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "", **env}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode == 0) == (code == 0), f"exit code {done.returncode}\n{done.stdout}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def compilers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    """An extension cache with nothing in it but the lock of a build that died, and compilers that only note that they were called."""
    base = tmp_path_factory.mktemp("compilers")
    cache, calls, tools = base / "cache", base / "calls", base / "bin"
    lock = cache / "deepspeed_shm_comm" / "lock"
    for folder in (lock.parent, tools):
        folder.mkdir(parents=True)
    lock.touch()
    for name in ("c++", "g++", "gcc", "cc", "clang", "ninja", "nvcc"):
        tool = tools / name
        tool.write_text(f'#!/bin/sh\necho "{name} $@" >> {calls}\nexit 1\n')
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    return cache, calls, {"TORCH_EXTENSIONS_DIR": str(cache), "PATH": path, "CXX": str(tools / "c++"), "CC": str(tools / "cc")}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, compilers: tuple[Path, Path, dict[str, str]]) -> Path:
    """The folder where every scenario has run. Five launches, for most of the time goes into starting processes."""
    root = tmp_path_factory.mktemp("engine")
    env = compilers[2]
    launch(root, 1, "parity", "turns", "read_again", **env)
    launch(
        root,
        2,
        "parity",
        "turns",
        "turns_elsewhere",
        "elastic",
        "whole",
        "stopped",
        "poisoned",
        "spiking",
        "returned",
        "diverged",
        "straggling",
        "read_again",
        "rotten",
        "overlapped",
        "full",
        **env,
    )
    launch(root, 2, "killed", code=-signal.SIGKILL, **env)
    shutil.copytree(root / "whole", root / "damaged")
    flip_bit(root / "damaged/checkpoints/step-00000012/rank-00001-of-00002.safetensors", 7777)
    shutil.copytree(root / "whole", root / "lost")
    for checkpoint in (root / "lost/checkpoints").glob("step-*"):
        os.truncate(checkpoint / "state.json", 10)
    said = launch(root, 2, "resurrected", "fallback", "unusable", "ruined", **env)
    (root / "said.txt").write_text(said)
    launch(root, 1, "elastic", "turns_elsewhere", **env)
    return root


def flip_bit(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[(bit // 8) % len(data)] ^= 1 << (bit % 8)
    path.write_bytes(data)


def weights(root: Path, name: str, kind: str) -> dict[str, Tensor]:
    return {k.split("/", 1)[1]: v for k, v in load_file(root / f"{name}.safetensors").items() if k.startswith(kind)}


def lines(path: Path) -> list[dict[str, Any]]:
    """Metrics of every step, without validations, which only one of the scenarios has."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "held_out"} for record in records]


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        difference = float((got[name].float() - value).abs().max())
        assert difference <= tolerance, f"{name} is off by {difference}"


@pytest.fixture(scope="module")
def plain() -> tuple[FitRun, Net, dict[str, Tensor], list[float]]:
    run = run_config("unused")
    return run, *reference(run, 10)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_ten_steps_equal_plain_torch(root: Path, plain: tuple[FitRun, Net, dict[str, Tensor], list[float]], world: int, stage: int) -> None:
    run, net, ema, norms = plain
    name = f"parity-{world}-{stage}-fp32"
    assert min(norms) < run.optimizer.max_grad_norm < max(norms), "the reference should clip some steps and not others"
    assert_close(weights(root, name, "model"), {k: v.detach() for k, v in net.named_parameters()}, ULPS)
    assert_close(weights(root, name, "ema"), ema, ULPS)
    figures = json.loads((root / f"{name}.json").read_text())
    assert figures["norms"] == pytest.approx(norms, rel=1e-6)
    assert (figures["step"], figures["samples_seen"]) == (10, 10 * STEP_SAMPLES)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_step_taken_in_host_memory_is_the_same(root: Path, stage: int) -> None:
    for kind in ("model", "ema"):
        assert_close(weights(root, f"offloaded-{stage}", kind), weights(root, f"parity-2-{stage}-fp32", kind), ULPS)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_bfloat16_keeps_float32_masters(
    root: Path, plain: tuple[FitRun, Net, dict[str, Tensor], list[float]], world: int, stage: int
) -> None:
    _, net, ema, norms = plain
    name = f"parity-{world}-{stage}-bf16"
    masters = load_weights(root / name, None, "model")
    assert any(not torch.equal(w, w.bfloat16().float()) for w in masters.values())
    # gradients carry 8 bits, and Adam turns a relative error of a gradient into that of a step: 10 steps of 0.01 at most
    assert_close(masters, {k: v.detach() for k, v in net.named_parameters()}, 0.02)
    assert_close(load_weights(root / name, None, "ema"), ema, 0.02)
    assert_close(weights(root, name, "model"), {k: v.bfloat16().float() for k, v in masters.items()}, 0.0)
    assert json.loads((root / f"{name}.json").read_text())["norms"] == pytest.approx(norms, rel=0.01)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_a_checkpoint_of_another_world_size_and_stage_goes_on(root: Path, world: int, stage: int) -> None:
    for kind in ("model", "ema"):
        moved, saved = weights(root, f"moved-to-{world}-{stage}", kind), weights(root, f"parity-{3 - world}-{3 - stage}-fp32", kind)
        assert_close(moved, saved, 0.0)
    net, ema, _ = reference(run_config("unused"), 12)
    assert_close(weights(root, f"continued-on-{world}-{stage}", "model"), {k: v.detach() for k, v in net.named_parameters()}, ULPS)
    assert_close(weights(root, f"continued-on-{world}-{stage}", "ema"), ema, ULPS)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_a_checkpoint_of_format_1_is_read_for_ever(root: Path, world: int, stage: int) -> None:
    """Whoever changes the format keeps this: convert what is read, and add a folder of the new one. `written` in worker.py made it."""
    net, ema, _ = reference(run_config("unused"), 4)
    assert_close(weights(root, f"format-1-on-{world}-{stage}", "model"), {k: v.detach() for k, v in net.named_parameters()}, ULPS)
    assert_close(weights(root, f"format-1-on-{world}-{stage}", "ema"), ema, ULPS)


@pytest.fixture(scope="module")
def plain_pair() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    pair, ema = pair_reference(run_config("unused"), 9)
    return {k: v.detach() for k, v in pair.first.named_parameters()}, ema


@pytest.mark.parametrize(
    "name",
    [f"turns-{world}-{stage}-fp32-none" for world in (1, 2) for stage in (0, 1, 2, 3)]
    + [f"turns-moved-to-{world}-{stage}" for world in (1, 2) for stage in (0, 1, 2, 3)]
    + ["turns-2-2-fp32-optimizer", "turns-2-3-fp32-optimizer"],
)
def test_networks_in_turns_equal_plain_torch(root: Path, plain_pair: tuple[dict[str, Tensor], dict[str, Tensor]], name: str) -> None:
    """The first network depends on every step of the second."""
    assert_close(load_weights(root / name, 9, "model"), plain_pair[0], ULPS)
    assert_close(load_weights(root / name, 9, "ema"), plain_pair[1], ULPS)


@pytest.mark.parametrize("which", ["model", "ema"])
def test_weights_merge_without_an_engine(root: Path, which: Any) -> None:
    assert_close(load_weights(root / "whole", None, which), weights(root, "whole-end", which), 0.0)
    with pytest.raises(UserError, match=r"no checkpoint 11; it has \[10, 12\]"):
        load_weights(root / "whole", 11, which)


def test_a_killed_run_goes_on_bit_for_bit(root: Path) -> None:
    whole, killed = lines(root / "whole/metrics.jsonl"), lines(root / "killed/metrics.jsonl")
    assert [record["step"] for record in whole] == list(range(1, 13))
    assert killed == whole
    for kind in ("model", "ema"):
        assert_close(weights(root, "killed-end", kind), weights(root, "whole-end", kind), 0.0)


def test_sigterm_and_a_stop_file_end_cleanly_and_go_on(root: Path) -> None:
    assert lines(root / "stopped/metrics.jsonl") == lines(root / "whole/metrics.jsonl")
    assert_close(weights(root, "stopped-end", "ema"), weights(root, "whole-end", "ema"), 0.0)
    assert not (root / "stopped/STOP").exists()


def test_too_many_bad_samples_end_the_run_on_all_ranks(root: Path) -> None:
    for rank in (0, 1):
        found = json.loads((root / f"rotten-{rank}.json").read_text())
        assert (found["code"], found["step"]) == (DATA_BUDGET_EXIT, 5), found  # 2 a step: 10 > 0.05 * 192 > 8
        assert "data.max_bad_fraction" in found["text"]
    report = lines(root / "rotten/bad_samples.jsonl")
    assert len(report) == 10
    assert report[1] == {"step": 1, "id": "shard-0/2-0", "reason": "truncated"}
    assert durable.published(root / "rotten/checkpoints") == [5]


def test_curves_have_the_usual_tags(root: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = EventAccumulator(str(root / "whole/tensorboard"))
    curves.Reload()
    tags = set(curves.Tags()["scalars"])
    assert {"train/loss", "train/grad_norm", "train/lr", "val/loss", "perf/step_time", "perf/data_time", "perf/samples_per_sec"} <= tags
    assert {f"train/loss_t/{bin}" for bin in ("0.0-0.2", "0.2-0.4", "0.4-0.6", "0.6-0.8", "0.8-1.0")} <= tags
    assert [event.step for event in curves.Scalars("val/loss")] == [4, 8, 12]
    assert [event.step for event in curves.Images("samples/first_frame")] == [0, 6, 12]
    by_step = {record["step"]: record["loss"] for record in lines(root / "whole/metrics.jsonl")}
    assert {event.step: event.value for event in curves.Scalars("train/loss")} == pytest.approx({k: by_step[k] for k in (3, 6, 9, 12)})


def test_both_ranks_fall_back_from_a_damaged_checkpoint(root: Path) -> None:
    figures = json.loads((root / "fallback.json").read_text())
    assert figures["step"] == 10
    assert_close(weights(root, "fallback", "model"), load_weights(root / "whole", 10, "model"), 0.0)
    said = (root / "said.txt").read_text()
    assert "FALLING BACK to checkpoint 10" in said
    assert "step-00000012/rank-00001-of-00002.safetensors: its checksum does not match" in said


def test_unusable_checkpoints_stop_the_run_with_their_reasons(root: Path) -> None:
    found = json.loads((root / "unusable.json").read_text())
    assert found["lost"]["code"] == 4
    for step in (10, 12):
        assert f"step-{step:08d}/state.json: 10 bytes, its manifest says" in found["lost"]["text"]
    assert found["whole"]["code"] == 2
    assert "inner.weight: (11, 7) there, (13, 7) here" in found["whole"]["text"]
    with pytest.raises(NoValidCheckpoint, match=r"state\.json"):
        load_weights(root / "lost", None, "ema")


def test_nothing_is_ever_compiled(root: Path, compilers: tuple[Path, Path, dict[str, str]]) -> None:
    cache, calls, _ = compilers
    assert not calls.exists(), calls.read_text()
    assert [str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()] == ["deepspeed_shm_comm/lock"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_no_number_is_dropped_alone_and_written_down(root: Path, stage: int) -> None:
    for precision in ("fp32", "bf16"):  # that nothing changed on any rank is asserted there, in the processes
        folder = root / f"poisoned-{stage}-{precision}"
        assert [(line["step"], line["guard"]) for line in lines(folder / "metrics.jsonl")] == [(2, "skip"), (3, "skip")]
        record = json.loads((folder / "bad_steps/step-00000002.json").read_text())
        samples = [sample for rank in record["ranks"] for sample in rank["samples"]]
        assert [sample["id"] for sample in samples if sample["loss"] == "nan"] == ["shard-1/2-0"]
        assert len(samples) == STEP_SAMPLES
        assert [len(grids) for rank in record["ranks"] for grids in rank["grids"]] == [3, 5, 1, 7]


@pytest.mark.parametrize(("held", "odd"), [([7, 7, 8, 7], [2]), ([1, 5, 5, 2], [0, 3]), ([3, 4], [0, 1]), ([1, 1, 2, 2], [0, 1, 2, 3])])
def test_ranks_that_hold_something_else_are_named(held: list[int], odd: list[int]) -> None:
    """That all ranks stop, with names, when one bit of one of them is flipped is asserted in the processes: scenario `diverged`."""
    assert odd_ones(held) == odd


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        ([1.0, 1.1, 0.9, 1.2], []),
        ([1.0, 1.0, 1.4, 1.0], []),
        ([1.0, 1.0, 1.5, 1.0], [(2, 1.5)]),
        ([1.0, 2.0], [(1, 2.0)]),
        ([2.0, 2.0, 8.0, 1.0, 3.0], [(2, 4.0), (4, 1.5)]),
    ],
)
def test_a_slow_rank_is_told_from_an_uneven_one(seconds: list[float], slow: list[tuple[int, float]]) -> None:
    """That a rank which is slow in fact is named, and no other, is asserted in the processes: scenario `straggling`."""
    assert slow_ranks(seconds) == slow


def test_a_rollback_leaves_one_line_a_step(root: Path) -> None:
    assert [line["step"] for line in lines(root / "returned/metrics.jsonl")] == list(range(1, 13))
    record = json.loads((root / "returned/bad_steps/step-00000007.json").read_text())
    assert record["action"] == "rollback"
    assert (record["since"]["step"], record["since"]["position"]["step"]) == (5, 5), "where a replay of step 7 takes up the data"
