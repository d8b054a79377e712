"""Contestants: names as short as tells them apart, never the same for two, and one checkpoint from beginning to end."""

import shutil
from pathlib import Path

import pytest
import torch

from dit.config import Contestant
from dit.drawing import Opened, told_apart
from dit.engine.checkpoint import load_weights
from dit.runs import Encoders


def test_names_tell_contestants_apart() -> None:
    teacher, strong, student = ("t 16 steps", "euler", "s=1"), ("t 16 steps", "euler", "s=3"), ("s 4 steps", "euler", "s=1")
    assert told_apart([teacher]) == ["t 16 steps"]
    assert told_apart([teacher, student]) == ["t 16 steps", "s 4 steps"]
    assert told_apart([teacher, strong, student]) == ["t 16 steps s=1", "t 16 steps s=3", "s 4 steps s=1"]
    assert told_apart([teacher, teacher, student]) == ["t 16 steps no. 1", "t 16 steps no. 2", "s 4 steps"]


@pytest.mark.parametrize("step", [None, 4])
def test_what_a_run_saves_after_it_was_opened_is_not_drawn(teacher: Path, tmp_path: Path, step: int | None) -> None:
    run = tmp_path / "run"
    shutil.copytree(teacher, run)
    (run / "checkpoints" / "step-00000006").rename(tmp_path / "later")
    opened = Opened.of(Contestant(run=str(run), step=step), "contestants.0.")
    (tmp_path / "later").rename(run / "checkpoints" / "step-00000006")
    network = opened.network(Encoders.load(opened.trained.base.encoders, torch.device("cpu")), "ema")
    then, now = (load_weights(run, number, "ema") for number in (4, 6))
    assert all(torch.equal(value, then[name]) for name, value in network.state_dict().items())
    assert not all(torch.equal(value, now[name]) for name, value in network.state_dict().items())
