"""`dit plan`: what a training or a distillation would cost and do with its data, without running it, its data or its weights."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from data_pipelines.config import DataConfig, Size
from data_pipelines.config_file import load_run
from data_pipelines.errors import UserError
from data_pipelines.packed import Grid, check_patch
from dit.config import DistillRun, TrainRun
from dit.config.backbone import SpatioTemporalDiTConfig
from dit.config.encoders import DiffusersVAEConfig, EncodersConfig, HFTextConfig
from dit.diffusion import equip
from dit.distillation import critic_backbone, critic_of, has_second_network, step_calls, student_backbone, teacher_engine
from dit.encoders import build_latent_codec, build_text_encoder
from dit.encoders.base import causal_latent_size
from dit.engine.frozen import frozen_bytes
from dit.engine.memory import state_bytes
from dit.engine.progress import PEAK_BF16_FLOPS, time_left
from dit.models import build_backbone
from dit.models.flops import activation_bytes, forward_flops, parameters
from dit.runs import Encoders, TrainedRun
from dit.runtime import distributed
from dit.stream import Stream, allowed_sizes

GIB, MIB = 2**30, 2**20
SMALL_CAPTION = 16
"""Tokens of a caption where only the captions would tell."""
DEVICE, UTILISATION = "H100", 0.4
"""By which seconds are guessed."""


@dataclass(frozen=True)
class Sizes:
    """What the encoders are, as declared in the config or read from them. size: the largest clip of a pack, grid: its tokens."""

    channels: int
    text_width: int
    caption: int
    size: Size | None
    grid: Grid


def main(run: TrainRun | DistillRun) -> int:
    """Print the dry run, then the report that a run prints before its first step, if its data are there.

    A distillation whose teacher is not trained yet is planned with `teacher.run=` the YAML file of its training.
    """
    base = run if isinstance(run, TrainRun) else _base_of(run)
    data = base.data if isinstance(run, TrainRun) else run.data or base.data
    print(dry_run(run, base, data))
    missing = [source.path for source in data.sources if "://" not in source.path and not Path(source.path).is_dir()]
    if missing:
        print(f"data            {', '.join(missing)}: not there, so what is in a step is not planned")
        return 0
    try:
        encoders = Encoders.load(base.encoders, distributed.device())
    except UserError as error:
        print(f"encoders        not there, so what is in a step is not planned: {error}")
        return 0
    print(Stream(data, encoders, base.backbone, run.train.seed).describe(run.train.samples))
    return 0


def dry_run(run: TrainRun | DistillRun, base: TrainRun, data: DataConfig) -> str:
    """Parameters, operations of a step, and memory of a rank, with their equations. base: the training run that has the backbone."""
    sizes = _sizes(base, data)
    student = base.backbone if isinstance(run, TrainRun) else student_backbone(run.method, base.backbone)
    known = {"channels": sizes.channels, "text_width": sizes.text_width}
    with torch.device("meta"):
        network = equip(build_backbone(student, **known), base.objective)
    count = sum(p.numel() for p in network.parameters())
    assert count >= parameters(student, **known), "the closed form and the network disagree"
    clip = prod(sizes.grid)
    clips = max(1, data.token_budget // clip)
    forward = forward_flops(student, [sizes.grid] * clips, [sizes.caption] * clips, **known)
    again = 1 if student.activation_checkpointing == "full" else 0
    if isinstance(run, TrainRun):
        calls, said = 3.0 + again, f"forward 1, backward 2, recomputed {again}"
    else:
        cost = step_calls(run.method)
        calls = cost.forward_passes + cost.trained * again
        said = f"student {cost.trained:.3g} x {3 + again} with gradient + {cost.plain:.3g} without, teacher {cost.teacher:.3g}"
    flops, steps = data.packs_per_step * forward * calls, -(-run.train.samples // (data.packs_per_step * clips))
    packs, tokens = data.packs_per_step, clips * clip
    teacher = critic = None
    if isinstance(run, DistillRun):
        teacher = parameters(base.backbone, **known)
        if critic_of(run.method):  # heads are small
            critic = parameters(critic_backbone(run.method, base.backbone), **known) if has_second_network(run.method) else 0
    shape = f"{student.depth} blocks, width {student.hidden_size}, {student.num_heads} heads, ffn {student.ffn_size}"
    lines = [
        f"backbone        {count:,} parameters: {shape}",
        f"clip            {_size_in_words(sizes)} = {clip:,} tokens, {sizes.caption} of text",
        f"pack            {clips} x {clip:,} = {tokens:,} of {data.token_budget:,} tokens (data.token_budget)",
        f"step            {packs} packs x {clips} = {packs * clips} clips, {packs * tokens:,} tokens",
        f"run             {run.train.samples:,} clips / {packs * clips} = {steps:,} steps",
        f"FLOPs a step    {packs} packs x {forward:.3g} x {calls:.3g} ({said}) = {flops:.3g}",
        "",
        *_memory_table(run, student, teacher, critic, tokens, packs, count, flops, steps),
    ]
    return "\n".join(lines) + "\n"


def _memory_table(
    run: TrainRun | DistillRun,
    backbone: SpatioTemporalDiTConfig,
    teacher: int | None,
    critic: int | None,
    tokens: int,
    packs: int,
    count: int,
    flops: float,
    steps: int,
) -> list[str]:
    """count, teacher, critic: parameters. flops: of a step."""
    engine, mode = run.engine, backbone.activation_checkpointing
    other = "full" if mode == "none" else "none"
    kept, swapped = (
        activation_bytes(backbone.model_copy(update={"activation_checkpointing": way}), tokens, engine.precision)
        // engine.sequence_parallel
        for way in (mode, other)
    )
    unit, name = (GIB, "GiB") if 16 * count > GIB else (MIB, "MiB")
    lines = [
        f"{name} a rank, by ranks: ZeRO stage {engine.zero_stage}, {engine.precision}, offload {engine.offload}, "
        f"{1 + len(run.ema.sigma_rel)} averages; {engine.sequence_parallel} to a pack; activation checkpointing {mode} "
        f"({other}: {swapped / unit:.1f}); time at {UTILISATION:.0%} of the bf16 peak of an {DEVICE}",
        "",
        "| ranks | weights | gradients | optimizer | averages | teacher | activations | buffers | device | host | a step | the run |",
        "|" + "---|" * 12,
    ]
    shares = {2**i for i in range(12) if packs % 2**i == 0} | {packs}  # divide the packs of a step
    for ranks in sorted(engine.sequence_parallel * share for share in shares):
        state = state_bytes(engine, run.ema, count, ranks, critic=critic)
        frozen = frozen_bytes(teacher_engine(run.method, engine), teacher, ranks) if teacher and isinstance(run, DistillRun) else 0
        cells = [*state[:4], frozen, kept, state.buffers, state.device + frozen + kept, state.host]
        seconds = flops / ranks / PEAK_BF16_FLOPS[DEVICE] / UTILISATION
        times = f"{seconds:.3g} s | {time_left(seconds * steps)}"
        lines.append(f"| {ranks} | " + " | ".join(f"{cell / unit:.2f}" for cell in cells) + f" | {times} |")
    return lines


def _base_of(run: DistillRun) -> TrainRun:
    if run.teacher.run.endswith((".yaml", ".yml")):
        return load_run(TrainRun, run.teacher.run)
    return TrainedRun.open(run.teacher.run, "teacher.run").base


def _sizes(base: TrainRun, data: DataConfig) -> Sizes:
    channels, stride = _latents(base.encoders)
    width, caption = _text(base.encoders)
    patch = base.backbone.patch_size

    def tokens(size: Size) -> Grid:
        return check_patch(causal_latent_size(size, stride), patch)

    wanted = [*allowed_sizes(data, stride, patch, tokens), *([base.preview.size] if base.preview else [])]
    grids = {size: tokens(size) for size in wanted}
    fitting = {size: grid for size, grid in grids.items() if prod(grid) <= data.token_budget}
    if not fitting:
        return Sizes(channels, width, caption, None, (1, 1, data.token_budget))
    size = max(fitting, key=lambda size: prod(fitting[size]))
    return Sizes(channels, width, caption, size, fitting[size])


def _size_in_words(sizes: Sizes) -> str:
    t, h, w = sizes.grid
    return f"{list(sizes.size)} (frames, height, width) -> {t} x {h} x {w}" if sizes.size else "of no known size, taken as long as a pack"


def _latents(config: EncodersConfig) -> tuple[int, Size]:
    latents = config.latents
    if isinstance(latents, DiffusersVAEConfig) and latents.channels and latents.stride:
        return latents.channels, latents.stride
    codec = build_latent_codec(latents)
    return codec.channels, codec.stride


def _text(config: EncodersConfig) -> tuple[int, int]:
    """Width of a text token, and tokens of a caption at most."""
    text = config.text
    if isinstance(text, HFTextConfig):
        return text.width or build_text_encoder(text).width, text.max_tokens
    return build_text_encoder(text).width, SMALL_CAPTION
