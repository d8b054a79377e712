"""`kill -9` at every named point of a step, a save and a load: the same command goes on bit for bit, whatever was half done."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dit.runtime.faults import POINTS
from tests.processes import Forks, metrics, train_config

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
    assert metrics(tmp_path / "cut") == metrics(whole)
    last = f"checkpoints/step-{STEPS:08d}"
    for path in sorted((whole / last).glob("*.safetensors")):
        expected, found = load_file(path), load_file(tmp_path / "cut" / last / path.name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    left = [path.name for path in (tmp_path / "cut/checkpoints").iterdir() if path.name.startswith(".")]
    assert left == [], f"what the killed save left is still there: {left}"
    shutil.rmtree(tmp_path / "cut")
