"""`dit distill`: as `dit train`, with an objective that has a teacher and a student that starts as the teacher."""

from pathlib import Path

from dit.config import DistillRun
from dit.config.load import load_run
from dit.diffusion import RECTIFIED_FLOW, build_denoiser, equip
from dit.distillation import build_distillation, build_student_sampling
from dit.drawing import Preview
from dit.engine import durable
from dit.engine.checkpoint import resume
from dit.engine.engine import Engine
from dit.engine.loop import LossesOf, fit
from dit.models import build_backbone
from dit.runs import Encoders, TrainedRun, null_label, open_for_writing
from dit.runtime import distributed
from dit.stream import Stream, left_out


def main(run: DistillRun) -> int:
    """Distil until `train.samples`, from the newest valid checkpoint of `out` if there is one, else from the teacher's weights."""
    distributed.init()
    trained = TrainedRun.open(run.teacher.run, "teacher.run")
    run = with_fixed_teacher(run)
    base = trained.base
    data = run.data or base.data
    encoders = Encoders.load(base.encoders, distributed.device())
    stream = Stream(data, encoders, base.backbone, run.train.seed)
    folder = open_for_writing(run, base, stream.describe(run.train.samples))
    engine, losses_of = compose(run, trained, encoders, stream)
    start = resume(engine, folder)
    steps = stream.steps(start)
    fit(
        run,
        engine,
        steps,
        losses_of,
        max_bad_fraction=data.max_bad_fraction,
        left_out=left_out(start),
        leave_out=steps.leave_out,
        validate=None,
        preview=Preview(run.preview, build_student_sampling(run.method), encoders, base, folder) if run.preview else None,
    )
    return 0


def compose(run: DistillRun, trained: TrainedRun, encoders: Encoders, stream: Stream) -> tuple[Engine, LossesOf]:
    """The engine with the teacher's weights, and what it is trained on. trained: the teacher's run."""
    base = trained.base
    teacher = trained.backbone(encoders, run.teacher.step, run.teacher.weights, distributed.device())
    guide = build_denoiser(base.objective, teacher, RECTIFIED_FLOW)  # students live on rectified flow, whatever their teacher's path
    objective = build_distillation(run.method, guide, encoders.null_text, null_label(base), base.objective.shift)
    network = build_backbone(base.backbone, channels=encoders.latents.channels, text_width=encoders.text.width)
    student = equip(network, base.objective)
    student.load_state_dict(teacher.state_dict())
    engine = Engine(student.to(distributed.device()), run, stream.packs_per_rank)
    denoiser = build_denoiser(base.objective, engine.module, RECTIFIED_FLOW)
    return engine, lambda pack, progress: objective(denoiser, stream.encode(pack), progress)


def with_fixed_teacher(run: DistillRun) -> DistillRun:
    """Name the teacher's checkpoint: the one that this run began with, else the newest.

    A teacher that trains on between a kill and the resume must not change what its student learns.
    """
    if run.teacher.step is not None:
        return run
    begun = Path(run.out) / "config.resolved.yaml"
    if begun.is_file() and durable.published(Path(run.out) / "checkpoints"):
        step = load_run(DistillRun, str(begun)).teacher.step
    else:
        step = next(iter(durable.published(Path(run.teacher.run) / "checkpoints")), None)
    return run.model_copy(update={"teacher": run.teacher.model_copy(update={"step": step})})
