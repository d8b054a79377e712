"""`train N` is `train k, kill -9, the same command again`, bit for bit: losses, sample ids, weights, averages and moments."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from tests.processes import Forks, children, distill_config, metrics, torchrun, train_config, wait_for

STEPS = 16
SAVE_EVERY = 3
LENGTH = {"train__samples": 16 * STEPS, "train__save_every_steps": SAVE_EVERY}


def final_tensors(run: Path) -> dict[str, Tensor]:
    """Everything in the files of the last checkpoint."""
    files = sorted((run / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors"))
    assert files, f"{run} did not save step {STEPS}"
    return {f"{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_run(resumed: Path, reference: Path) -> None:
    assert len(metrics(reference)) == STEPS
    assert metrics(resumed) == metrics(reference)
    expected, found = final_tensors(reference), final_tensors(resumed)
    assert {name.split("/")[1] for name in expected} == {"model", "ema", "exp_avg", "exp_avg_sq"}
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert different == []


def kill_at_random(run: Path, kill: Callable[[], None]) -> None:
    """Kill at some moment between the first checkpoint and the last steps."""
    target = random.randrange(SAVE_EVERY + 1, STEPS - 5)
    wait_for(lambda: any((run / "checkpoints").glob("step-*")) and len(metrics(run)) >= target)
    kill()
    assert len(metrics(run)) < STEPS, "the run was over before the kill: raise STEPS"


def kill_node(launcher: int) -> None:
    """What the loss of a machine does: no process of it does anything more."""
    ranks = children(launcher)
    assert len(ranks) >= 2
    for pid in (launcher, *ranks):
        os.kill(pid, signal.SIGKILL)


def killed_and_resumed(forks: Forks, verb: str, config: Path, ranks: int) -> None:
    process = forks.start(verb, str(config), ranks=ranks)
    kill_at_random(config.with_suffix(""), lambda: process.send(signal.SIGKILL))
    wait_for(lambda: process.poll() == -signal.SIGKILL)
    forks.run(verb, str(config), ranks=ranks).ok()


def test_training_in_one_process(forks: Forks, tmp_path: Path, latents: Path) -> None:
    changes = {**LENGTH, "data__num_workers": 1}
    whole, cut = (train_config(tmp_path / f"{name}.yaml", latents, **changes) for name in ("whole", "cut"))
    forks.run("train", str(whole)).ok()
    killed_and_resumed(forks, "train", cut, 1)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_training_under_torchrun(tmp_path: Path, latents: Path) -> None:
    whole, cut = (train_config(tmp_path / f"{name}.yaml", latents, engine={"zero_stage": 2}, **LENGTH) for name in ("whole", "cut"))
    launches = [torchrun("train", str(config)) for config in (whole, cut)]
    kill_at_random(tmp_path / "cut", lambda: kill_node(launches[1].pid))
    finished = [launches[0], torchrun("train", str(cut))]
    launches[1].communicate()
    for process in finished:
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err.decode()[-6000:]
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


WITH_CRITIC = {
    "name": "distribution_matching",
    "guidance": {"s": 2.0},
    "student_steps": 2,
    "critic": {"steps": 2, "optimizer": {"lr": 2e-3, "betas": [0.5, 0.9]}, "heads": {"blocks": [0, 1], "critic_weight": 1.0}},
}
PREVIEW = {"prompts": ["a large red disc", "a small blue cross"], "size": [9, 32, 32], "every_steps": 4}
DIAGNOSIS = {"noises": 2, "steps": [1], "teacher_steps": 4, "share": 9}


METHODS: dict[str, dict[str, object]] = {
    "consistency": {"name": "consistency"},
    "guided": {"name": "consistency", "guidance_range": [1.0, 3.0]},
    "mean_flow": {"name": "mean_flow"},
    "continuous_consistency": {"name": "continuous_consistency"},
    "progressive": {"name": "progressive"},
    "moment_matching": {"name": "moment_matching"},
    "critic": WITH_CRITIC,
    "alternating_moments": {"name": "moment_matching", "student_steps": 2, "critic": {"optimizer": {"lr": 2e-3}}},
    "pixels": {
        "name": "adversarial",
        "student_steps": 2,
        "distillation_weight": 2.5,
        "critic": {"optimizer": {"lr": 2e-3}, "blocks": [0, 1], "features": {"name": "random_conv"}, "frames": 3},
    },
}
CASES = [(1, 1, "mean_flow"), (1, 1, "critic"), (2, 1, "consistency")]
SLOW_CASES = [
    pytest.param(2, stage, name, marks=pytest.mark.slow)
    for name in METHODS
    for stage in (1, 2 if name == "moment_matching" else 3)
    if (stage, name) != (1, "consistency")
]


@pytest.mark.parametrize(("ranks", "stage", "method"), [*CASES, *SLOW_CASES])
def test_distillation(forks: Forks, tmp_path: Path, teacher: Path, ranks: int, stage: int, method: str) -> None:
    """With what is said of the student on the way, which depends on its weights alone."""
    told = {"preview": PREVIEW, "diagnosis": DIAGNOSIS, "engine": {"zero_stage": stage, "whole_below": 100}}
    options = {**LENGTH, **told, "method": {**METHODS[method], "guidance": {"s": 2.0}}}
    whole, cut = (distill_config(tmp_path / f"{name}.yaml", teacher, **options) for name in ("whole", "cut"))
    forks.run("distill", str(whole), ranks=ranks).ok()
    killed_and_resumed(forks, "distill", cut, ranks)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert [line["step"] for line in metrics(tmp_path / "whole") if "student" in line] == [4, 8, 12, 16]
    assert (tmp_path / "cut" / "student.md").read_bytes() == (tmp_path / "whole" / "student.md").read_bytes()


FLOAT32_SUMS = 1e-5
"""As in test_invariance.py: sums over ranks in another order."""
PLACES = ((2, 1), (4, 3), (1, 2), (2, 0))
"""World size and ZeRO stage before each kill."""


@pytest.mark.parametrize(
    "method", ["", "consistency", *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != "consistency")]
)
def test_another_world_size_and_stage_after_each_kill(forks: Forks, tmp_path: Path, latents: Path, teacher: Path, method: str) -> None:
    verb = "distill" if method else "train"

    def config(name: str) -> Path:
        path = tmp_path / f"{name}.yaml"
        if not method:
            return train_config(path, latents, **LENGTH)
        return distill_config(path, teacher, method={**METHODS[method], "guidance": {"s": 2.0}}, **LENGTH)

    forks.run(verb, str(config("whole")), ranks=2).ok()
    moved = config("moved")
    for number, (ranks, stage) in enumerate(PLACES):
        stage = min(stage, 2) if method == "moment_matching" else stage  # it needs a whole teacher
        values = yaml.safe_load(moved.read_text()) | {"engine": {"zero_stage": stage, "whole_below": 100}}
        moved.write_text(yaml.safe_dump(values))
        is_last = number == len(PLACES) - 1
        done = forks.run(verb, str(moved), ranks=ranks, fault="" if is_last else f"step.begun:{ranks - 1}:5")  # after 4 steps
        assert done.code == (0 if is_last else -signal.SIGKILL), done.err[-3000:]
    whole, found = metrics(tmp_path / "whole"), metrics(tmp_path / "moved")
    assert len(found) == STEPS
    assert [line["ids_hash"] for line in found] == [line["ids_hash"] for line in whole]
    losses = pytest.approx(
        [line["loss"] for line in whole], rel=FLOAT32_SUMS, abs=FLOAT32_SUMS
    )  # of moments, one may be near zero: it has signs
    assert [line["loss"] for line in found] == losses
