"""Each kind of student by the commands that a user types: distilled, validated, handed on to the next stage, sampled."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dit.distillation import turn_of
from dit.engine.checkpoint import load_weights
from tests.processes import Forks, distill_config, metrics

GUIDANCE = {"s": 2.0, "interval": [0.1, 0.9]}


def test_a_mean_flow_student_is_validated_and_hands_on_to_a_progressive_one(
    forks: Forks, teacher: Path, latents: Path, tmp_path: Path
) -> None:
    validation = {"source": str(latents), "samples": 4, "times": [0.3, 0.7], "every_steps": 3}
    preview = {"prompts": ["a large red disc", "a small blue cross"], "size": [9, 32, 32], "every_steps": 3}
    diagnosis = {"noises": 2, "steps": [1, 2], "teacher_steps": 6, "share": 9}
    method: dict[str, Any] = {"name": "mean_flow", "guidance": GUIDANCE, "student_steps": 3}
    forks.run(
        "distill",
        str(distill_config(tmp_path / "first.yaml", teacher, method=method, validation=validation, preview=preview, diagnosis=diagnosis)),
    ).ok()
    lines = metrics(tmp_path / "first")
    assert np.isfinite([line["jump_error"] for line in lines]).all()
    assert np.isfinite([line["velocity_error"] for line in lines if "velocity_error" in line]).any()
    gaps = [line["held_out"]["cells"] for line in lines if "held_out" in line]
    assert [list(cells) for cells in gaps] == [["all", "t=0.3", "t=0.7"]] * 2
    assert all(cells["t=0.7"]["loss"] > 0 for cells in gaps)
    judged = {line["step"]: line["student"] for line in lines if "student" in line}
    assert list(judged) == [3, 6]
    names = {f"{name}/{n}" for name in ("distance", "teacher", "change", "change_low", "change_high", "verdict") for n in (1, 2, 3)}
    assert names < set(judged[6])
    assert judged[3]["teacher/1"] == judged[6]["teacher/1"] > 0
    note = (tmp_path / "first" / "student.md").read_text()
    assert f"Student of {teacher}, step 6" in note
    assert "`euler` in 3 steps, from t = 1, 0.667, 0.333 for clips of this size." in note
    assert [row.split(" | ")[0] for row in note.splitlines() if row.startswith("| ")] == ["| step", "| 3", "| 6"]
    for step in (3, 6):
        picture = np.asarray(Image.open(tmp_path / "first" / "samples" / f"student-step-{step:08d}.png").convert("RGB"))
        assert picture.std() > 2

    student, taught = load_weights(tmp_path / "first", None, "model"), load_weights(teacher, None, "ema")
    assert {name.split(".")[0] for name in student.keys() - taught.keys()} == {"jump_embedder"}
    assert float(student["jump_embedder.mlp.2.weight"].abs().sum()) > 0

    method = {"name": "progressive", "guidance": {"s": 1.0}, "student_steps": 2}
    forks.run("distill", str(distill_config(tmp_path / "second.yaml", tmp_path / "first", method=method))).ok()
    assert load_weights(tmp_path / "second", None, "model").keys() == student.keys()
    contestants = [{"run": str(tmp_path / "first")}, {"run": str(tmp_path / "second")}, {"run": str(tmp_path / "first"), "steps": 1}]
    values = {"contestants": contestants, "prompts": ["a large red disc"], "size": [9, 32, 32], "out": str(tmp_path / "drawn")}
    (tmp_path / "sample.yaml").write_text(json.dumps(values))
    said = forks.run("sample", str(tmp_path / "sample.yaml")).ok().out
    for run, steps, times in (("first", 3, "1, 0.667, 0.333"), ("second", 2, "1, 0.5"), ("first", 1, "1")):
        assert f"{tmp_path / run}: euler sampler, {steps} steps, guidance s=1 (w=0), from t = {times}\n" in said
    assert np.asarray(Image.open(tmp_path / "drawn" / "contact_sheet.png").convert("RGB")).std() > 2


CRITICS: dict[str, dict[str, Any]] = {
    "distribution_matching": {"critic": {"steps": 2, "heads": {"blocks": [0, 1]}}, "student_steps": 2},
    "score_regularised": {"critic": {"steps": 1}, "student_steps": 2},
    "adversarial": {"critic": {"blocks": [1]}, "student_steps": 2},
    "alternating moments": {"name": "moment_matching", "critic": {}, "student_steps": 2},
    "pixels": {
        "name": "adversarial",
        "critic": {"blocks": [0, 1], "features": {"name": "random_conv"}, "frames": 3},
        "distillation_weight": 2.5,
        "student_steps": 2,
    },
}
FIGURES = {
    "distribution_matching": {"critic_error", "judged_data", "judged_samples", "matching_gradient", "not_finite"},
    "score_regularised": {"critic_error", "tangent_norm", "matching_gradient", "not_finite"},
    "adversarial": {"judged_data", "judged_samples"},
    "alternating moments": {"critic_error", "matching_gradient"},
    "pixels": {"judged_data", "judged_samples", "teacher_distance"},
}


@pytest.mark.parametrize(
    "name", [name if name == "distribution_matching" else pytest.param(name, marks=pytest.mark.slow) for name in CRITICS]
)
def test_a_student_with_a_critic_is_validated_drawn_and_no_teacher(
    forks: Forks, teacher: Path, latents: Path, tmp_path: Path, name: str
) -> None:
    validation = {"source": str(latents), "samples": 4, "times": [0.5], "every_steps": 3}
    preview = {"prompts": ["a large red disc"], "size": [9, 32, 32], "every_steps": 6}
    critic = CRITICS[name]["critic"] | {"optimizer": {"lr": 2e-3}}
    method = {"name": name, "guidance": GUIDANCE, **CRITICS[name], "critic": critic}
    config = distill_config(tmp_path / "student.yaml", teacher, method=method, validation=validation, preview=preview)
    said = forks.run("distill", str(config)).ok().out
    assert "critic loss" in said
    lines = metrics(tmp_path / "student")
    turns = [turn_of(step, critic.get("steps", 1)).network for step in range(6)]
    assert [line["network"] for line in lines] == turns
    assert FIGURES[name] <= {figure for line in lines for figure in line}
    assert {line["lr"] for line in lines} == {1e-3, 2e-3}
    assert [line["held_out"]["cells"]["all"]["loss"] > 0 for line in lines if "held_out" in line] == [True, True]
    student, taught = load_weights(tmp_path / "student", None, "ema"), load_weights(teacher, None, "ema")
    assert student.keys() == taught.keys()
    assert any(not torch.equal(student[name], value) for name, value in taught.items())

    again = {"name": "progressive", "guidance": {"s": 1.0}, "student_steps": 1}
    refused = forks.run("distill", str(distill_config(tmp_path / "second.yaml", tmp_path / "student", method=again)))
    assert (refused.code, "jumps to the data and no flow" in refused.err) == (2, True)
    values = {"contestants": [{"run": str(tmp_path / "student")}], "prompts": ["a large red disc"], "size": [9, 32, 32]}
    (tmp_path / "sample.yaml").write_text(json.dumps(values | {"out": str(tmp_path / "drawn")}))
    sampler = "ancestral" if method["name"] == "moment_matching" else "consistency"
    assert f"{tmp_path}/student: {sampler} sampler, 2 steps" in forks.run("sample", str(tmp_path / "sample.yaml")).ok().out
    forks.run("ckpt", "export", str(tmp_path / "student"), "--out", str(tmp_path / "exported"), "--format", "diffusers").ok()
    assert f"gradient norm {lines[-1]['grad_norm']:.4g}"[:-1] in forks.run("replay", str(tmp_path / "student"), "6").ok().out


def test_heads_that_cannot_see_are_refused(forks: Forks, teacher: Path, tmp_path: Path) -> None:
    method = {"name": "adversarial", "guidance": GUIDANCE, "critic": {"blocks": [2], "optimizer": {"lr": 1e-3}}}
    done = forks.run("distill", str(distill_config(tmp_path / "student.yaml", teacher, method=method)))
    assert done.code == 2
    assert "method.critic: heads on block 2, but the teacher's blocks are 0 to 1" in done.err


def test_continuous_consistency_in_forward_mode_says_its_tangent(forks: Forks, teacher: Path, tmp_path: Path) -> None:
    method = {"name": "continuous_consistency", "guidance": GUIDANCE}
    forks.run("distill", str(distill_config(tmp_path / "student.yaml", teacher, method=method))).ok()
    assert all(line["tangent_norm"] > 0 for line in metrics(tmp_path / "student"))
    student, taught = load_weights(tmp_path / "student", None, "model"), load_weights(teacher, None, "ema")
    assert any(not torch.equal(student[name], value) for name, value in taught.items())


def test_a_student_that_takes_its_guidance_is_sampled_at_any_scale_of_its_range(forks: Forks, teacher: Path, tmp_path: Path) -> None:
    method = {"name": "consistency", "guidance": {"s": 2.0}, "guidance_range": [1.0, 4.0], "solver": "euler", "student_steps": 1}
    preview = {"prompts": ["a large red disc"], "size": [9, 32, 32], "every_steps": 6}
    forks.run("distill", str(distill_config(tmp_path / "student.yaml", teacher, method=method, preview=preview))).ok()
    student, taught = load_weights(tmp_path / "student", None, "model"), load_weights(teacher, None, "ema")
    assert {name.split(".")[0] for name in student.keys() - taught.keys()} == {"guidance_embedder"}
    assert float(student["guidance_embedder.mlp.2.weight"].abs().sum()) > 0
    run = str(tmp_path / "student")
    asked = [{"sampler": "consistency", "steps": 1, "guidance": {"s": s}} for s in (4.0, 9.0)]
    values = {"contestants": [{"run": run}, {"run": run, "sampling": asked[0]}], "prompts": ["a large red disc"], "size": [9, 32, 32]}
    (tmp_path / "sample.yaml").write_text(json.dumps({**values, "out": str(tmp_path / "drawn")}))
    said = forks.run("sample", str(tmp_path / "sample.yaml")).ok().out
    assert f"{run}: consistency sampler, 1 steps, guidance s=2 (w=1)" in said
    assert f"{run}: consistency sampler, 1 steps, guidance s=4 (w=3)" in said
    values["contestants"] = [{"run": run, "sampling": asked[1]}]
    (tmp_path / "sample.yaml").write_text(json.dumps({**values, "out": str(tmp_path / "beyond")}))
    beyond = forks.run("sample", str(tmp_path / "sample.yaml"))
    assert beyond.code == 2
    assert "from s=1 to 4" in beyond.err


def test_moments_are_matched_by_the_teachers_own_gradients(forks: Forks, teacher: Path, tmp_path: Path) -> None:
    method = {"name": "moment_matching", "guidance": GUIDANCE, "student_steps": 2}
    forks.run("distill", str(distill_config(tmp_path / "student.yaml", teacher, method=method))).ok()
    assert np.isfinite([line["loss"] for line in metrics(tmp_path / "student")]).all()
    student, taught = load_weights(tmp_path / "student", None, "model"), load_weights(teacher, None, "ema")
    assert any(not torch.equal(student[name], value) for name, value in taught.items())
