"""`dit distill`: as `dit train`, with an objective that has a teacher and a student that starts as the teacher."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from data_pipelines.config_file import load_run
from data_pipelines.packed import PackedLatents
from dit.config import DistillRun
from dit.diffusion import RECTIFIED_FLOW, Denoiser, build_denoiser, equip
from dit.distillation import build_distillation, build_student_sampling, student_backbone, teacher_gap
from dit.drawing import Preview, guide
from dit.engine import durable
from dit.engine.checkpoint import resume
from dit.engine.engine import Engine
from dit.engine.loop import LossesOf, fit
from dit.models import build_backbone
from dit.runs import Encoders, TrainedRun, open_for_writing
from dit.runtime import distributed
from dit.stream import Stream, left_out

Gap = Callable[[nn.Module, Sequence[PackedLatents], Sequence[float]], Tensor]
"""Squared distance of each sample to the teacher: network, packs, levels -> (levels, n)."""


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
    engine, losses_of, gap = compose(run, trained, encoders, stream)
    own = base.model_copy(update={"backbone": student_backbone(run.method, base.backbone)})
    sampling = build_student_sampling(run.method)
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
        validate=stream.held_out(run.validation, gap) if run.validation else None,
        preview=Preview(run.preview, sampling, encoders, own, folder, RECTIFIED_FLOW) if run.preview else None,
    )
    return 0


def compose(run: DistillRun, trained: TrainedRun, encoders: Encoders, stream: Stream) -> tuple[Engine, LossesOf, Gap]:
    """The engine with the teacher's weights, what it is trained on, and how far it is from its teacher. trained: the teacher's run."""
    base = trained.base
    teacher = trained.backbone(encoders, run.teacher.step, run.teacher.weights, distributed.device())

    def flow_of(network: nn.Module) -> Denoiser:
        return build_denoiser(base.objective, network, RECTIFIED_FLOW)  # students live there, whatever their teacher's path

    def gap(network: nn.Module, packs: Sequence[PackedLatents], levels: Sequence[float]) -> Tensor:
        return teacher_gap(objective, flow_of(network), packs, levels)

    guided = guide(flow_of(teacher), encoders, base, run.method.guidance, RECTIFIED_FLOW)
    objective = build_distillation(run.method, guided, base.objective.shift)
    config = student_backbone(run.method, base.backbone)
    with distributed.seeded(run.train.seed):
        network = build_backbone(config, channels=encoders.latents.channels, text_width=encoders.text.width)
    student = equip(network, base.objective)
    student.load_state_dict({**student.state_dict(), **teacher.state_dict()})  # inputs that the teacher lacks start without effect
    engine = Engine(student.to(distributed.device()), run, stream.packs_per_rank)
    return engine, lambda pack, progress: objective(flow_of(engine.module), stream.encode(pack), progress), gap


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
