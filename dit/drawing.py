"""From prompts to videos: what previews, `dit sample` and `dit evaluate` share."""

import json
import logging
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import assert_never

import torch
from torch import Tensor, nn

from data_pipelines.errors import UserError
from data_pipelines.packed import Conditioning, Grid, check_patch, pack_conditioning, unpack
from data_pipelines.randomness import key
from dit.config import Contestant, TrainRun
from dit.config.editing import Extend, Frames, Inpaint, Invert, Outpaint, SDEdit
from dit.config.encoders import EncodersConfig
from dit.config.engine import PreviewConfig
from dit.config.objective import DDPMConfig, Guidance, SamplingConfig, VariationalConfig, WeakModel
from dit.diffusion import (
    AtScale,
    AutoGuidance,
    ClassifierFreeGuidance,
    Denoiser,
    Extrapolation,
    Path,
    Told,
    Within,
    build_denoiser,
    complete,
    follow,
    invert,
    levels,
    path_of,
    sample,
    shift_of,
    vary,
)
from dit.editing import Edit
from dit.engine.checkpoint import newest_valid
from dit.evaluation.pictures import contact_sheet, write_video_grid
from dit.runs import ENCODERS_FILE, Encoders, TrainedRun, null_label
from dit.runtime import distributed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A contestant as it will be drawn, on every rank alike. step: its checkpoint, None if there is none."""

    trained: TrainedRun
    step: int | None
    sampling: SamplingConfig

    @classmethod
    def of(cls, contestant: Contestant, section: str) -> "Opened":
        """Read its run, and fix which checkpoint is the newest valid one now. Called by all ranks. section: where its keys stand."""
        trained = TrainedRun.open(contestant.run, f"{section}run")
        step = contestant.step
        if step is None:
            step = newest_valid(trained.path / "checkpoints", distributed.rank(), distributed.world_size())
        sampling = trained.sampling_for(contestant, section)
        return cls(trained, step, sampling.model_copy(update={"guidance": pinned(sampling.guidance)}))

    def network(self, encoders: Encoders, weights: str) -> nn.Module:
        """Its backbone, frozen."""
        return self.trained.backbone(encoders, self.step, weights, distributed.device())


def told_apart(traits: Sequence[Sequence[str]]) -> list[str]:
    """A name for each contestant: its first trait, and where those are not enough, of the others those in which contestants differ."""
    differ = [j for j in range(1, len(traits[0])) if len({each[j] for each in traits}) > 1]
    firsts = [each[0] for each in traits]
    names = firsts if len({*firsts}) == len(firsts) else [" ".join([each[0], *(each[j] for j in differ)]) for each in traits]
    return [name if names.count(name) == 1 else f"{name} no. {number}" for number, name in enumerate(names, 1)]


@torch.no_grad()
def draw(
    denoiser: Denoiser,
    encoders: Encoders,
    base: TrainRun,
    prompts: Sequence[str],
    labels: Sequence[int] | None,
    size: tuple[int, int, int],
    sampling: SamplingConfig,
    keys: Sequence[int],
    path: Path | None = None,
    edit: Edit | None = None,
) -> Tensor:
    """One video for each prompt: (B, T, H, W, 3) uint8, of `size` (T, H, W). keys: the random key of each.

    path: what to sample on, None for the path of the objective. edit: what to start from. Raises NotFinite.
    """
    patch = base.backbone.patch_size
    grid = check_patch(encoders.latent_size(size, "size"), patch)
    classes = None if labels is None else torch.tensor(labels, device=encoders.null_text.device)
    cond = pack_conditioning([grid] * len(prompts), encoders.text.encode(list(prompts)), classes)
    if edit is None:
        return to_videos(draw_tokens(denoiser, encoders, base, cond, sampling, keys, path), cond, encoders, patch)
    return edit.paste(to_videos(_edited(denoiser, encoders, base, cond, sampling, keys, path, edit), cond, encoders, patch))


@torch.no_grad()
def draw_tokens(
    denoiser: Denoiser,
    encoders: Encoders,
    base: TrainRun,
    cond: Conditioning,
    sampling: SamplingConfig,
    keys: Sequence[int],
    path: Path | None = None,
) -> Tensor:
    """Latents from noise, as tokens (L, P). cond: of samples of one grid. keys, path: as for `draw`. Raises NotFinite."""
    on = path or path_of(base.objective, denoiser)
    guided = guide(build_denoiser(base.objective, denoiser, path), encoders, base, sampling.guidance, on)
    channels = encoders.latents.channels * prod(base.backbone.patch_size)
    trained = None if isinstance(base.objective, DDPMConfig | VariationalConfig) else base.objective.times
    shift = shift_of(prod(cond.grids[0]), base.objective.shift)
    return finite(sample(guided, cond, tuple(keys), channels, sampling, shift, on, trained), sampling)


def _edited(
    denoiser: Denoiser,
    encoders: Encoders,
    base: TrainRun,
    cond: Conditioning,
    sampling: SamplingConfig,
    keys: Sequence[int],
    path: Path | None,
    edit: Edit,
) -> Tensor:
    """Latents that start from what `edit` gives, as tokens (L, P). Raises NotFinite."""
    on = path or path_of(base.objective, denoiser)
    given = edit.tokens(encoders, base.backbone.patch_size, len(keys))
    network = Told(denoiser, path_of(base.objective, denoiser), given.latents, given.mask) if edit.is_told else denoiser
    plain = build_denoiser(base.objective, network, path)
    guided = guide(plain, encoders, base, sampling.guidance, on)
    times = visited(base, denoiser, sampling, cond.grids[0], path).to(cond.text.device)
    match edit.config:
        case SDEdit(strength=strength):
            tokens = vary(guided, given.latents, cond, keys, times, sampling, on, strength)
        case Invert(caption=caption, solver=solver):
            shown = cond.with_text(encoders.text.encode([caption] * len(keys)), cond.labels)
            start = invert(plain, given.latents, shown, times, solver, on)
            tokens = follow(guided, start, times, cond, keys, sampling, on)
        case Inpaint() | Outpaint() | Frames() | Extend():
            repeats, jump = edit.resampling
            tokens = complete(guided, given, cond, keys, times, sampling, on, repeats, jump)
        case _:
            assert_never(edit.config)
    return finite(tokens, sampling)


class NotFinite(UserError):
    """Samples are infinite or no numbers."""


def finite(tokens: Tensor, sampling: SamplingConfig) -> Tensor:
    """`tokens`. Raises NotFinite, that says how they were drawn, unless all are finite: decoded, they would be grey or black."""
    if not bool(tokens.isfinite().all()):
        guidance, rescale = sampling.guidance, f", rescale={sampling.guidance.rescale:g}" if sampling.guidance.rescale else ""
        raise NotFinite(
            f"sampling: got samples that are not finite from sampler={sampling.sampler}, steps={sampling.steps}, "
            f"schedule={sampling.schedule.name}, guidance {guidance}{rescale}: try sampler heun, schedule shifted or a lower scale; if "
            "those fail too, the weights are damaged or their training diverged"
        )
    return tokens


def visited(base: TrainRun, network: Denoiser, sampling: SamplingConfig, grid: Grid, path: Path | None) -> Tensor:
    """The levels (steps + 1,) that the sampler visits for samples of `grid` tokens. path: as for `draw`."""
    k = shift_of(prod(grid), base.objective.shift)
    trained = None if isinstance(base.objective, DDPMConfig | VariationalConfig) else base.objective.times
    return levels(sampling, k, path or path_of(base.objective, network), trained)


@torch.no_grad()
def to_videos(tokens: Tensor, cond: Conditioning, encoders: Encoders, patch: Grid) -> Tensor:
    """Decode latents of one size, as tokens (L, P): (B, T, H, W, 3) uint8 on the CPU."""
    videos = encoders.latents.decode(torch.stack(unpack(tokens, cond, patch)))  # (B, 3, T, H, W)
    return ((videos + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).cpu()


def guide(
    denoiser: Denoiser, encoders: Encoders, base: TrainRun, guidance: Guidance, path: Path, *, is_called_together: bool = False
) -> Denoiser:
    """`denoiser` of `path` under the guidance of a config: away from the empty caption, a negative prompt, or a weaker
    model; or as an input, if the model takes it.

    is_called_together: ask the network alike at every t, for ranks that hold parts of it wait for each other inside. Else it is asked
    only once outside the interval of the guidance.
    """
    if base.backbone.guided:
        return AtScale(denoiser, guidance.scale)
    if guidance.scale == 1:
        return denoiser
    guided: Denoiser
    options = (guidance.zero_star, guidance.rescale, guidance.interval)
    if guidance.weak is None:
        away = encoders.text.encode([guidance.negative_prompt])[0] if guidance.negative_prompt else encoders.null_text
        guided = ClassifierFreeGuidance(denoiser, away, guidance.scale, null_label(base), *options)
    else:
        check_weak(guidance.weak, encoders, base)
        weak = _weak_model(guidance.weak, encoders, path)
        guided = AutoGuidance(denoiser, weak, Extrapolation(guidance.scale, *options))
    return guided if is_called_together or guidance.interval == (0, 1) else Within(denoiser, guided, *guidance.interval)


def pinned(guidance: Guidance) -> Guidance:
    """`guidance`, and if by a weaker model, by the checkpoint that is its newest valid one now. Called by all ranks."""
    weak = guidance.weak
    if weak is None or weak.step is not None:
        return guidance
    step = newest_valid(pathlib.Path(weak.run) / "checkpoints", distributed.rank(), distributed.world_size())
    return guidance.model_copy(update={"weak": weak.model_copy(update={"step": step})})


@lru_cache(maxsize=1)  # a batch after another asks for it
def weak_network(config: WeakModel, encoders: Encoders) -> tuple[nn.Module, TrainRun]:
    """The weaker model of a guidance, and the run that trained it."""
    trained = TrainedRun.open(config.run, "guidance.weak.run")
    return trained.backbone(encoders, config.step, "ema", encoders.null_text.device), trained.base


def check_weak(config: WeakModel, encoders: Encoders, base: TrainRun) -> None:
    """Raise UserError unless the weaker model can guide the one of `base`: of the same tokens, texts and classes."""
    weak = TrainedRun.open(config.run, "guidance.weak.run").base
    ours: dict[str, object] = {"patch_size": base.backbone.patch_size, "num_classes": base.backbone.num_classes}
    theirs: dict[str, object] = {"patch_size": weak.backbone.patch_size, "num_classes": weak.backbone.num_classes}
    if weak.encoders != base.encoders:  # other files may hold the same weights
        ours, theirs = ours | _encoding(encoders.fingerprints()), theirs | _encoding(_fingerprints(config, weak.encoders))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"guidance.weak.run={config.run}: its {name} is {theirs.get(name)}, expected {ours.get(name)} as of the model that it "
                "guides: give a weaker model of the same encoders, patches and classes"
            )


@lru_cache(maxsize=1)  # a batch after another asks for it
def _fingerprints(config: WeakModel, encoders: EncodersConfig) -> Mapping[str, Mapping[str, object]]:
    """Those of the weaker model's encoders, as its run says, or, of an earlier release, as they are."""
    file = pathlib.Path(config.run) / ENCODERS_FILE
    if file.is_file():
        return dict(json.loads(file.read_text()))
    return Encoders.load(encoders, torch.device("cpu")).fingerprints()


def _encoding(parts: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """What latents and texts mean: the fingerprints, without what rounds them and whether a posterior is drawn from."""
    return {f"{part} encoder's {name}": facts[name] for part, facts in parts.items() for name in facts.keys() - {"dtype", "posterior"}}


def _weak_model(config: WeakModel, encoders: Encoders, path: Path) -> Denoiser:
    network, base = weak_network(config, encoders)
    return build_denoiser(base.objective, network, path)


def check_request(
    encoders: Encoders, base: TrainRun, prompts: Sequence[str], labels: Sequence[int] | None, size: tuple[int, int, int], section: str
) -> None:
    """Raise UserError unless the model of `base` can draw this. section: where the keys stand in the config, such as "preview."."""
    check_patch(encoders.latent_size(size, f"{section}size"), base.backbone.patch_size)
    classes = base.backbone.num_classes
    if labels is None and classes is not None:
        raise UserError(f"the model is class-conditional (backbone.num_classes={classes}): give {section}labels, one for each prompt")
    if labels is None:
        return
    if len(labels) != len(prompts):
        raise UserError(
            f"{section}labels has {len(labels)} entries and {section}prompts has {len(prompts)}: give one label for each prompt"
        )
    if classes is None:
        raise UserError(f"{section}labels was given, and the model has no classes (backbone.num_classes): remove it")
    if max(labels) >= classes:
        raise UserError(f"{section}labels has {max(labels)}, expected 0 to {classes - 1} (backbone.num_classes={classes})")


def sample_keys(seed: int, count: int) -> list[int]:
    """Random keys of the samples number 0 .. count-1 of `seed`; equal keys give equal noise for every model."""
    return [key("drawing", seed, index) for index in range(count)]


class Preview:
    """Draws the fixed prompts of a run at fixed noise into its `samples/` folder."""

    def __init__(
        self,
        config: PreviewConfig,
        sampling: SamplingConfig,
        encoders: Encoders,
        base: TrainRun,
        folder: pathlib.Path,
        path: Path | None = None,
    ) -> None:
        check_request(encoders, base, config.prompts, config.labels, config.size, "preview.")
        self.config, self.sampling, self.encoders, self.base, self.folder, self.path = config, sampling, encoders, base, folder, path

    def __call__(self, denoiser: Denoiser, step: int) -> Tensor | None:
        """Draw, write `samples/step-N.png` (and `.gif` for videos), and return the videos (B, T, H, W, 3) uint8.

        None, with a warning, where they are not finite: training may go on without a picture.
        """
        config = self.config
        keys = sample_keys(self.base.train.seed, len(config.prompts))
        try:
            videos = draw(denoiser, self.encoders, self.base, config.prompts, config.labels, config.size, self.sampling, keys, self.path)
        except NotFinite as error:  # alike on all ranks that draw
            log.warning("preview of step %d: %s", step, error)
            return None
        if distributed.rank() > 0:  # it draws because every rank holds a part of the weights
            return videos
        name = self.folder / "samples" / f"step-{step:08d}"
        contact_sheet(videos, config.prompts, name.with_suffix(".png"))
        if config.size[0] > 1:
            write_video_grid(videos, name.with_suffix(".gif"))
        return videos
