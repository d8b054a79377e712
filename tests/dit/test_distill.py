"""What `dit distill` decides before it runs."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_pipelines.config_file import save_resolved
from data_pipelines.errors import NoValidCheckpoint, UserError
from data_pipelines.packed import Conditioning
from dit.config import DistillRun, TrainRun
from dit.config.distillation import ConsistencyConfig
from dit.config.objective import Guidance
from dit.diffusion import RECTIFIED_FLOW
from dit.diffusion.ground_truth import pack_of_points
from dit.distill import check_critic, check_teacher, with_fixed_teacher
from dit.distillation import build_distillation, build_student_sampling
from dit.drawing import guide
from dit.engine import durable
from dit.runs import Encoders, TrainedRun


def request(folder: Path, step: int | None) -> DistillRun:
    return DistillRun.model_validate(
        {
            "out": str(folder / "student"),
            "teacher": {"run": str(folder / "teacher"), "step": step},
            "method": {"name": "consistency", "guidance": {"s": 2}},
            "optimizer": {"lr": 1e-3},
            "train": {"samples": 8},
        }
    )


def checkpoint(root: Path, step: int) -> None:
    """An empty one that is valid."""
    durable.publish(durable.stage(root, step), root, step, [])


def test_a_student_keeps_the_teacher_that_it_began_with(tmp_path: Path) -> None:
    teacher, student = (tmp_path / name / "checkpoints" for name in ("teacher", "student"))
    checkpoint(teacher, 5)
    run = with_fixed_teacher(request(tmp_path, None))
    assert run.teacher.step == 5
    checkpoint(student, 1)
    save_resolved(run, tmp_path / "student" / "config.resolved.yaml")
    checkpoint(teacher, 10)
    assert with_fixed_teacher(request(tmp_path, None)).teacher.step == 5
    assert with_fixed_teacher(request(tmp_path, 10)).teacher.step == 10


def test_a_damaged_checkpoint_of_the_teacher_is_passed_over(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher" / "checkpoints"
    for step in (5, 10):
        checkpoint(teacher, step)
    (teacher / "step-00000010" / "manifest.json").write_text("{}")
    assert with_fixed_teacher(request(tmp_path, None)).teacher.step == 5
    (teacher / "step-00000005" / "manifest.json").unlink()
    with pytest.raises(NoValidCheckpoint, match="step-00000005"):
        with_fixed_teacher(request(tmp_path, None))


def test_a_checkpoint_may_stand_for_its_run() -> None:
    values = request(Path("runs"), None).model_dump()
    found = DistillRun.model_validate(values | {"teacher": {"run": "runs/teacher/checkpoints/step-00000500"}}).teacher
    assert (found.run, found.step) == ("runs/teacher", 500)
    with pytest.raises(ValueError, match="step 500, and step is 400"):
        DistillRun.model_validate(values | {"teacher": {"run": "runs/teacher/checkpoints/step-00000500/", "step": 400}})


def test_a_teacher_that_cannot_be_guided_is_refused() -> None:
    run, base = request(Path("runs"), None), BASE
    check_teacher(run, TrainedRun(Path("runs/teacher"), base, base))
    undropped = base.model_copy(update={"objective": base.objective.model_copy(update={"condition_dropout": 0.0})})
    for trained, said in ((undropped, "condition_dropout=0"), (run, "baked in")):
        with pytest.raises(UserError, match=said):
            check_teacher(run, TrainedRun(Path("runs/teacher"), trained, undropped))
        plain = run.model_copy(update={"method": run.method.model_copy(update={"guidance": Guidance(s=1.0)})})
        check_teacher(plain, TrainedRun(Path("runs/teacher"), trained, undropped))


def test_a_difference_of_bf16_answers_is_refused() -> None:
    values = request(Path("runs"), None).model_dump() | {"engine": {"precision": "bf16"}}
    for derivative, fits in (("forward", True), ("difference", False)):
        values["method"] = {"name": "mean_flow", "guidance": {"s": 2}, "derivative": derivative}
        with nullcontext() if fits else pytest.raises(ValueError, match=r"method\.derivative: forward"):
            DistillRun.model_validate(values)


BASE = TrainRun.model_validate(
    {
        "out": "runs/teacher",
        "data": {"sources": [{"path": "shards"}], "sizes": [[1, 8, 8]], "token_budget": 64, "packs_per_step": 1},
        "backbone": {"hidden_size": 24, "depth": 1, "num_heads": 2, "ffn_size": 24},
        "optimizer": {"lr": 1e-3},
        "train": {"samples": 8},
    }
)


def text_teacher(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """A constant velocity: the mean of the text."""
    text = torch.stack([part.mean() for part in cond.text.split(cond.text_lengths)])
    return cond.per_token(text)[:, None].expand_as(x_t)


def test_guidance_is_baked_in_and_captions_are_never_dropped() -> None:
    guidance = {"w": 2.0, "interval": [0.0, 0.5]}
    config = ConsistencyConfig.model_validate({"name": "consistency", "guidance": guidance, "stages": 1, "solver": "euler"})
    encoders = Encoders(None, None, torch.full((1, 4), 0.5))  # type: ignore[arg-type]
    guided = guide(text_teacher, encoders, BASE, config.guidance, RECTIFIED_FLOW)
    objective = build_distillation(config, guided, None)
    batch = pack_of_points(torch.zeros(300, 2), 0)  # their text is zero: guided velocity 0.5 + 3 (0 - 0.5) = -1 up to t = 0.5, 0 above

    losses = objective(lambda x_t, t, cond: torch.full_like(x_t, -1.0), batch, 0.0)
    inside = losses.t <= 0.5
    assert 100 < int(inside.sum()) < 200
    assert float(losses.per_sample[inside].abs().max()) < 1e-10
    torch.testing.assert_close(losses.per_sample[~inside], torch.full((int((~inside).sum()),), 0.25))  # half of the gap of 1, squared
    assert build_student_sampling(config).guidance.scale == 1.0


@pytest.mark.parametrize(
    ("method", "objective", "said"),
    [
        ({"name": "distribution_matching", "critic": {}}, {"name": "variational"}, "schedule that runs/teacher has learned"),
        ({"name": "adversarial", "critic": {"blocks": [0]}}, {"name": "ddpm"}, "rectified flow, and runs/teacher is on vp"),
        ({"name": "adversarial", "critic": {"blocks": [0, 1]}}, {}, "heads on block 1, but the teacher's blocks are 0 to 0"),
        ({"name": "adversarial", "critic": {"blocks": [0]}}, {}, None),
        ({"name": "distribution_matching", "critic": {}}, {"name": "ddpm"}, None),
        ({"name": "consistency"}, {"name": "variational"}, None),
    ],
)
def test_a_critic_that_cannot_be_made_of_the_teacher_is_refused(
    method: dict[str, object], objective: dict[str, object], said: str | None
) -> None:
    critic = method.get("critic")
    method = method | {"guidance": {"s": 2.0}} | ({"critic": {"optimizer": {"lr": 1.0}, **critic}} if isinstance(critic, dict) else {})
    values = {"out": "runs/student", "teacher": {"run": "runs/teacher"}, "optimizer": {"lr": 1e-3}, "train": {"samples": 8}}
    run = DistillRun.model_validate({**values, "method": method})
    base = TrainRun.model_validate(BASE.model_dump() | {"objective": objective})
    with nullcontext() if said is None else pytest.raises(UserError, match=said):
        check_critic(run, base)
