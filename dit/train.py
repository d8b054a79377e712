"""`dit train`: shards -> frozen encoders -> objective -> denoiser -> engine -> fit."""

from collections.abc import Sequence

from torch import Tensor, nn

from data_pipelines.packed import PackedLatents
from data_pipelines.plan import START
from dit.config import TrainRun
from dit.diffusion import RECTIFIED_FLOW, build_denoiser, build_objective, equip, held_out_loss
from dit.drawing import Preview
from dit.engine.checkpoint import resume
from dit.engine.engine import Engine
from dit.engine.loop import LossesOf, fit
from dit.engine.saver import Saver
from dit.initial import has_begun, load_initial, with_fixed_init
from dit.models import build_backbone, compile_blocks
from dit.runs import Encoders, null_label, open_for_writing
from dit.runtime import distributed
from dit.stream import Stream, left_out


def main(run: TrainRun) -> int:
    """Train until `train.samples`, from the newest valid checkpoint of `out` if there is one."""
    distributed.init(run.engine.sequence_parallel)
    run = with_fixed_init(run)
    encoders = Encoders.load(run.encoders, distributed.device())
    stream = Stream(run.data, encoders, run.backbone, run.train.seed)
    folder = open_for_writing(run, run, stream.describe(run.train.samples), encoders)
    engine, losses_of = compose(run, encoders, stream, is_new=not distributed.on_first(lambda: has_begun(folder)))

    def held_out(network: nn.Module, packs: Sequence[PackedLatents], levels: Sequence[float]) -> Tensor:
        return held_out_loss(build_denoiser(run.objective, network, RECTIFIED_FLOW), packs, levels)  # comparable over paths

    start = resume(engine, folder)
    if start is None and run.init is not None:  # from here on the run needs nothing but itself
        with Saver(run) as saver:
            engine.compare_copies()
            saver.save(engine, {**START._asdict(), "left_out": []})
            saver.finish()
            saver.settle()  # one upload at a time
    steps = stream.steps(start)
    fit(
        run,
        engine,
        steps,
        losses_of,
        max_bad_fraction=run.data.max_bad_fraction,
        left_out=left_out(start),
        leave_out=steps.leave_out,
        validate=stream.held_out(run.validation, held_out) if run.validation else None,
        preview=Preview(run.preview, run.preview.sampling, encoders, run, folder) if run.preview else None,
        flops_of=stream.training_flops,
    )
    return 0


def compose(run: TrainRun, encoders: Encoders, stream: Stream, is_new: bool) -> tuple[Engine, LossesOf]:
    """The engine with the initial weights, and what it is trained on. is_new: there is no checkpoint that will replace them."""
    objective = build_objective(run.objective, encoders.null_text, null_label(run))
    with distributed.seeded(run.train.seed):
        network = build_backbone(run.backbone, channels=encoders.latents.channels, text_width=encoders.text.width)
        backbone = equip(network, run.objective)
    if is_new:
        load_initial(backbone, run, encoders)
    if run.engine.compile:
        compile_blocks(network)
    engine = Engine(backbone, run, stream.packs_per_rank)
    return engine, lambda pack, progress: objective(engine.module, stream.encode(pack), progress)
