"""Contestants: names as short as tells them apart, never the same for two, and one checkpoint from beginning to end."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from data_pipelines.errors import UserError
from data_pipelines.packed import Conditioning
from dit.config import Contestant
from dit.config.engine import PreviewConfig
from dit.config.objective import Guidance, SamplingConfig, WeakModel
from dit.diffusion import RECTIFIED_FLOW
from dit.drawing import Opened, Preview, draw, guide, told_apart
from dit.engine.checkpoint import load_weights
from dit.runs import Encoders, TrainedRun


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


@pytest.mark.parametrize(
    ("section", "changes", "said"),
    [
        ("backbone", {"num_classes": 5}, "its num_classes is 5, expected None"),
        ("backbone", {"patch_size": [1, 1, 1]}, r"its patch_size is \(1, 1, 1\), expected \(1, 2, 2\)"),
        ("encoders", {"latents": {"name": "pixels"}}, "its latents encoder's "),
    ],
)
def test_a_weak_model_of_other_tokens_is_refused(teacher: Path, tmp_path: Path, section: str, changes: dict[str, Any], said: str) -> None:
    run = tmp_path / "weak"
    shutil.copytree(teacher, run)
    values = yaml.safe_load((run / "config.resolved.yaml").read_text())
    values[section] |= changes
    (run / "config.resolved.yaml").write_text(yaml.safe_dump(values))
    (run / "encoders.json").unlink()  # then what the config names is asked
    base = TrainedRun.open(str(teacher), "run").base
    encoders, guidance = Encoders.load(base.encoders, torch.device("cpu")), Guidance(s=2.0, weak=WeakModel(run=str(run)))
    with pytest.raises(UserError, match=f"^guidance.weak.run={run}: {said}"):
        guide(no_number, encoders, base, guidance, RECTIFIED_FLOW)


def no_number(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    return torch.full_like(x_t, torch.nan)


def test_samples_that_are_no_numbers_are_no_videos(teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = TrainedRun.open(str(teacher), "run").base
    encoders = Encoders.load(base.encoders, torch.device("cpu"))
    sampling = SamplingConfig.model_validate({"sampler": "unipc", "steps": 3, "guidance": {"s": 2, "rescale": 0.5}})
    with pytest.raises(UserError, match=r"sampler=unipc, steps=3, schedule=shifted, guidance s=2 \(w=1\), rescale=0.5"):
        draw(no_number, encoders, base, ["a"], None, (1, 8, 8), sampling, [1])
    preview = Preview(PreviewConfig(prompts=["a"], size=(1, 8, 8)), sampling, encoders, base, tmp_path)
    with caplog.at_level(logging.WARNING):
        assert preview(no_number, 7) is None  # which training goes on without
    assert "preview of step 7: sampling: got samples that are not finite" in caplog.text
