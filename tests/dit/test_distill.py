"""What `dit distill` decides before it runs."""

from pathlib import Path

from dit.config import DistillRun
from dit.config.load import save_resolved
from dit.distill import with_fixed_teacher


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


def test_a_student_keeps_the_teacher_that_it_began_with(tmp_path: Path) -> None:
    teacher, student = (tmp_path / name / "checkpoints" for name in ("teacher", "student"))
    (teacher / "step-00000005").mkdir(parents=True)
    run = with_fixed_teacher(request(tmp_path, None))
    assert run.teacher.step == 5
    (student / "step-00000001").mkdir(parents=True)
    save_resolved(run, tmp_path / "student" / "config.resolved.yaml")
    (teacher / "step-00000010").mkdir()
    assert with_fixed_teacher(request(tmp_path, None)).teacher.step == 5
    assert with_fixed_teacher(request(tmp_path, 10)).teacher.step == 10
