"""`kill -9` at every named point of a step, a save and a load: the same command goes on bit for bit, whatever was half done."""

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dit.runtime.faults import POINTS
from tests.processes import Forks, metrics, train_config, wait_for

STEPS, SAVE_EVERY, RANKS = 8, 2, 2
ON_THE_FIRST_RANK = ("save.sealed", "save.manifested", "save.published", "save.retained")
"""Publishing and deleting is done by one rank."""
CASES = [
    (point, rank, mode)
    for point in POINTS
    for rank in range(RANKS)
    for mode in ("sync", "async")
    if rank == 0 or point not in ON_THE_FIRST_RANK
]
QUICK = {("step.taken", 1, "async"), ("save.half_written", 1, "async"), ("save.published", 0, "sync"), ("load.filled", 0, "async")}


@pytest.fixture(scope="module")
def whole(forks: Forks, tmp_path_factory: pytest.TempPathFactory, latents: Path) -> Path:
    """The run that nothing happens to."""
    config = write(tmp_path_factory.mktemp("whole") / "whole.yaml", latents, "sync")
    forks.run("train", str(config), ranks=RANKS).ok()
    return config.with_suffix("")


def write(path: Path, latents: Path, mode: str) -> Path:
    train = {"train__samples": 16 * STEPS, "train__save_every_steps": SAVE_EVERY, "train__async_save": mode == "async"}
    return train_config(path, latents, engine={"zero_stage": 2}, **train)


@pytest.mark.parametrize(
    ("point", "rank", "mode"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_killed_there(forks: Forks, tmp_path: Path, latents: Path, whole: Path, point: str, rank: int, mode: str) -> None:
    config = write(tmp_path / "cut.yaml", latents, mode)
    faults = [f"{point}:{rank}:2"]
    if point.startswith("load."):  # there must be something to load
        faults = ["step.begun:0:6", f"{point}:{rank}:1"]
    for fault in faults:
        assert forks.run("train", str(config), ranks=RANKS, fault=fault).code == -signal.SIGKILL
    forks.run("train", str(config), ranks=RANKS).ok()
    assert_same(tmp_path / "cut", whole)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(100))
def test_killed_at_random(forks: Forks, tmp_path: Path, latents: Path, whole: Path, trial: int) -> None:
    """All ranks at once, at any moment between the first step and the end."""
    config = write(tmp_path / "cut.yaml", latents, "async" if trial % 2 else "sync")
    process = forks.start("train", str(config), ranks=RANKS)
    wait_for(lambda: len(metrics(tmp_path / "cut")) > 0)
    time.sleep(random.Random(trial).uniform(0, 0.3))  # as long as the other steps take
    process.send(signal.SIGKILL)
    wait_for(lambda: process.poll() is not None)
    forks.run("train", str(config), ranks=RANKS).ok()
    assert_same(tmp_path / "cut", whole)


def assert_same(run: Path, whole: Path) -> None:
    """`run` has the records and the last checkpoint of `whole`, and nothing of the killed save is left."""
    assert metrics(run) == metrics(whole)
    last = f"checkpoints/step-{STEPS:08d}"
    for path in sorted((whole / last).glob("*.safetensors")):
        expected, found = load_file(path), load_file(run / last / path.name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")] == []
    shutil.rmtree(run)
