"""`dit distill`: as `dit train`, with an objective that has a teacher and a student that starts as the teacher."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from data_pipelines.config_file import load_run
from data_pipelines.errors import UserError
from data_pipelines.loader import RawPack
from data_pipelines.packed import Grid, PackedLatents, unpatchify
from data_pipelines.randomness import uniform
from dit.config import DistillRun, TrainRun
from dit.config.distillation import (
    AdversarialConfig,
    ConsistencyConfig,
    MeanFlowConfig,
    Method,
    MomentMatchingConfig,
    ProgressiveConfig,
    TeacherFeatures,
)
from dit.diagnosis import Diagnosis
from dit.diffusion import RECTIFIED_FLOW, AtScale, Denoiser, build_denoiser, equip
from dit.distillation import (
    Alternating,
    Distillation,
    Looks,
    Weight,
    build_distillation,
    build_student_sampling,
    critic_backbone,
    critic_of,
    discriminator_of,
    heads_of,
    objective_at,
    student_backbone,
    student_of,
    takes_guidance,
    teacher_engine,
    teacher_gap,
    turn_of,
    with_critic,
)
from dit.drawing import Preview, guide, pinned
from dit.engine import durable
from dit.engine.checkpoint import load_weights, newest_valid, resume
from dit.engine.engine import Engine
from dit.engine.frozen import place_frozen
from dit.engine.loop import LossesOf, fit
from dit.engine.turns import Turns
from dit.evaluation.features import build_layers
from dit.models import build_backbone, compile_blocks
from dit.runs import Encoders, TrainedRun, open_for_writing
from dit.runtime import distributed
from dit.runtime.losses import Losses
from dit.stream import Stream, left_out

EPSILON = 1e-8
"""Of Adam, where its moments are a metric."""


def main(run: DistillRun) -> int:
    """Distil until `train.samples`, from the newest valid checkpoint of `out` if there is one, else from the teacher's weights."""
    distributed.init(run.engine.sequence_parallel)
    trained = TrainedRun.open(run.teacher.run, "teacher.run")
    run = with_fixed_networks(run)
    base = trained.base
    check_teacher(run, trained)
    check_critic(run, base)
    data = run.data or base.data
    encoders = trained.encoders()
    stream = Stream(data, encoders, base.backbone, run.train.seed)
    folder = open_for_writing(run, base, stream.describe(run.train.samples), encoders)
    engine, losses_of, objective = compose(run, trained, encoders, stream)

    def flow_of(network: nn.Module) -> Denoiser:
        flow = as_flow(base, network)
        return AtScale(flow, run.method.guidance.scale) if takes_guidance(run.method) else flow

    def gap(network: nn.Module, packs: Sequence[PackedLatents], levels: Sequence[float]) -> Tensor:
        return teacher_gap(objective, flow_of(network), packs, levels)

    own = base.model_copy(update={"backbone": student_backbone(run.method, base.backbone)})
    preview = Preview(run.preview, build_student_sampling(run.method), encoders, own, folder, RECTIFIED_FLOW) if run.preview else None
    sizes = (data.token_budget, data.token_budget * data.packs_per_step)
    is_judged = run.preview and run.diagnosis
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
        preview=(lambda module, step: preview(student_of(module), step)) if preview else None,
        judge=Diagnosis(run, own, encoders, folder, objective, flow_of, *sizes) if is_judged else None,
    )
    return 0


def compose(
    run: DistillRun, trained: TrainedRun, encoders: Encoders, stream: Stream
) -> tuple[Engine, LossesOf, Distillation | Alternating]:
    """The engine with the teacher's weights, what it is trained on, and the method with its teacher. trained: the teacher's run."""
    base = trained.base
    teacher = trained.backbone(encoders, run.teacher.step, run.teacher.weights, torch.device("cpu"))
    config, looks = student_backbone(run.method, base.backbone), looks_of(run, base, encoders)
    with distributed.seeded(run.train.seed):
        network = build_backbone(config, channels=encoders.latents.channels, text_width=encoders.text.width)
        student = equip(network, base.objective)
        student.load_state_dict({**student.state_dict(), **teacher.state_dict()})  # inputs that the teacher lacks start without effect
        module = with_critic(run.method, student, start_of_critic(run, base, encoders, teacher), config.hidden_size, looks)
    if run.engine.compile:
        compile_blocks(network)  # a critic is not compiled
    place = teacher_engine(run.method, run.engine)
    teacher = place_frozen(teacher, place)
    is_shared = place.zero_stage == 3  # by ranks whose packs have other t
    guided = guide(as_flow(base, teacher), encoders, base, run.method.guidance, RECTIFIED_FLOW, is_called_together=is_shared)
    turns, discriminator = turns_of(run), discriminator_of(run.method, module, teacher, looks)
    critic = as_flow(base, partial(module, "critic")) if turns else None
    weights = weights_of(run, trained, teacher)
    method = build_distillation(run.method, guided, base.objective.shift, critic, discriminator, weights)
    engine = Engine(module, run, stream.packs_per_rank, turns)

    def losses_of(pack: RawPack, progress: float) -> Losses:
        return objective_at(method, engine.step)(as_flow(base, module), stream.encode(pack), progress)

    return engine, losses_of, method


def start_of_critic(run: DistillRun, base: TrainRun, encoders: Encoders, teacher: nn.Module) -> nn.Module:
    """The teacher, with the input that its copy as a critic needs, which starts without effect."""
    config = critic_backbone(run.method, base.backbone)
    if not config.jumps:
        return teacher
    start = equip(build_backbone(config, channels=encoders.latents.channels, text_width=encoders.text.width), base.objective)
    start.load_state_dict({**start.state_dict(), **teacher.state_dict()})
    if base.backbone.jumps:  # a student of jumps as teacher: what it says of the velocity, whatever jump it is told
        embedder = next(part for name, part in start.named_modules() if name.split(".")[-1] == "jump_embedder")
        with torch.no_grad():
            velocity = embedder(torch.zeros(1))[0]
            embedder.mlp[2].weight.zero_()
            embedder.mlp[2].bias.copy_(velocity)
    return start


def weights_of(run: DistillRun, trained: TrainedRun, teacher: nn.Module) -> list[Weight]:
    """Those of the teacher, with the second moments that Adam had of their gradients; none for methods that do not ask."""
    if not isinstance(run.method, MomentMatchingConfig) or run.method.critic:
        return []
    moments = load_weights(trained.path, run.teacher.step, "exp_avg_sq")
    if not any(bool(moment.any()) for moment in moments.values()):
        raise UserError(
            f"teacher.run={run.teacher.run} has taken no step, so Adam has no second moments there to measure gradients by: train a critic "
            "(method.critic)"
        )
    return [Weight(value, 1 / (moments[name].to(value).sqrt() + EPSILON)) for name, value in teacher.named_parameters()]


def as_flow(base: TrainRun, network: Denoiser) -> Denoiser:
    """A network trained by the objective of `base`, on rectified flow: students live there, whatever their teacher's path."""
    return build_denoiser(base.objective, student_of(network), RECTIFIED_FLOW)


def turns_of(run: DistillRun) -> Turns | None:
    """Whose turn each step is, if the method trains a critic beside the student."""
    critic = critic_of(run.method)
    if critic is None:
        return None
    return Turns({"student": run.optimizer, "critic": critic.optimizer}, lambda step: turn_of(step, critic.steps).network)


def looks_of(run: DistillRun, base: TrainRun, encoders: Encoders) -> Looks | None:
    """What heads look at where they judge pixels. Raises UserError for a network that cannot be read or has no such layers."""
    if not isinstance(run.method, AdversarialConfig) or isinstance(run.method.critic.features, TeacherFeatures):
        return None
    critic, features = run.method.critic, run.method.critic.features
    network = build_layers(features, distributed.device(), "method.critic.features")
    with torch.no_grad():
        widths = [layer.shape[-1] for layer in network.layers(torch.zeros(1, 1, 3, 32, 32, device=distributed.device()))]
    if max(critic.blocks) >= len(widths):
        raise UserError(f"method.critic.blocks: got {max(critic.blocks)}, but the layers of {features.name} are 0 to {len(widths) - 1}")

    def layers(tokens: Tensor, grid: Grid, key: int) -> list[Tensor]:
        video = encoders.latents.decode(unpatchify(tokens, grid, base.backbone.patch_size)[None])  # (1, 3, T, H, W)
        pixels = (video.transpose(1, 2)[:, frames_of(video.shape[2], critic.frames, key)] + 1) / 2
        found = network.layers(pixels)
        return [found[block][0] for block in critic.blocks]

    return Looks(layers, [widths[block] for block in critic.blocks], encoders.text.width, base.backbone.num_classes)


def frames_of(count: int, wanted: int | None, key: int) -> list[int]:
    """`wanted` of `count` frames, evenly spaced, from one that the key draws; all where there are no more."""
    if wanted is None or wanted >= count:
        return list(range(count))
    stride = count // wanted
    first = int(uniform(key, "judged frame") * (count - (wanted - 1) * stride))
    return list(range(first, first + wanted * stride, stride))


def check_critic(run: DistillRun, base: TrainRun) -> None:
    """Raise UserError unless the critic of `run`, if it has any, can be made of its teacher, and heads can see its tokens."""
    heads, path = heads_of(run.method), base.objective.path.name
    if turns_of(run) and path == "learned":
        raise UserError(
            f"method.name={run.method.name}: a critic cannot share the schedule that {run.teacher.run} has learned; use consistency"
        )
    if heads and max(heads.blocks) >= base.backbone.depth:
        raise UserError(f"method.critic: heads on block {max(heads.blocks)}, but the teacher's blocks are 0 to {base.backbone.depth - 1}")
    if heads and path != "rectified_flow":
        raise UserError(f"method.critic: heads need a teacher on rectified flow, and {run.teacher.run} is on {path}")


def check_teacher(run: DistillRun, trained: TrainedRun) -> None:
    """Raise UserError if this teacher cannot be distilled so."""
    base, guidance = trained.base, run.method.guidance
    if isinstance(trained.run, DistillRun):
        method = trained.run.method
        check_student_as_teacher(run, method)
        if isinstance(method, ConsistencyConfig) and (between := method.guidance_range):
            if not between[0] <= guidance.scale <= between[1]:
                raise UserError(
                    f"method.guidance: got s={guidance.scale:g}, and {run.teacher.run} is a student that takes it as an input, "
                    f"from s={between[0]:g} to {between[1]:g}"
                )
            return
    if guidance.scale == 1 or guidance.weak is not None:
        return
    if isinstance(trained.run, DistillRun):
        raise UserError(
            f"method.guidance: got {guidance}, and {run.teacher.run} is a student with guidance {trained.run.method.guidance} baked in: "
            "set method.guidance: {s: 1}"
        )
    if base.objective.condition_dropout == 0:
        raise UserError(
            f"method.guidance: got {guidance}, and {run.teacher.run} was trained with objective.condition_dropout=0, "
            "so it knows nothing to guide away from: set method.guidance: {s: 1}, or give a weaker model (method.guidance.weak)"
        )


def check_student_as_teacher(run: DistillRun, method: Method) -> None:
    """Raise UserError unless students of `method` know what their own student is to learn: a velocity, or its very steps."""
    if isinstance(method, MeanFlowConfig):
        return
    steps_down = isinstance(method, ProgressiveConfig) or (isinstance(method, ConsistencyConfig) and method.phases > 1)
    if not steps_down:
        raise UserError(
            f"teacher.run={run.teacher.run} is a student of {method.name}: it knows jumps to the data and no flow; distil its own teacher"
        )
    own = run.method
    walked = own.student_steps * own.teacher_steps if isinstance(own, ProgressiveConfig) else None
    if walked != method.student_steps:
        asked = f"method.name={own.name}" if walked is None else f"method.student_steps x method.teacher_steps = {walked}"
        raise UserError(
            f"teacher.run={run.teacher.run} is a student that knows its {method.student_steps} steps alone, got {asked}: "
            f"expected name: progressive, of {method.student_steps} = student_steps x teacher_steps"
        )


def with_fixed_networks(run: DistillRun) -> DistillRun:
    """Name the checkpoints of the teacher and of the weaker model that guides it: those that this run began with, else the newest valid
    ones. Called by all ranks.

    What trains on between a kill and the resume must not change what the student learns.
    """
    resolved, teacher, guidance = Path(run.out) / "config.resolved.yaml", run.teacher, run.method.guidance
    has_begun = resolved.is_file() and durable.published(Path(run.out) / "checkpoints")
    begun = load_run(DistillRun, str(resolved)) if has_begun else None
    if teacher.step is None:
        step = newest_valid(Path(teacher.run) / "checkpoints", distributed.rank(), distributed.world_size())
        teacher = teacher.model_copy(update={"step": begun.teacher.step if begun else step})
    if guidance.weak and guidance.weak.step is None and begun and (weak := begun.method.guidance.weak):
        guidance = guidance.model_copy(update={"weak": guidance.weak.model_copy(update={"step": weak.step})})
    method = run.method.model_copy(update={"guidance": pinned(guidance)})
    return run.model_copy(update={"teacher": teacher, "method": method})
