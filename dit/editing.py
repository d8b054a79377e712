"""What an edit starts from: the pictures that are given, which of their pixels are known, and what is known of the latents.

Letters: B samples, T frames, H rows, W columns of pixels. Must not know samplers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

import numpy as np
import torch
from torch import Tensor

from data_pipelines.decode import decode_image, fit
from data_pipelines.errors import UserError
from data_pipelines.packed import Grid, patchify
from data_pipelines.randomness import key
from data_pipelines.samples import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, BadSample
from data_pipelines.video import Frames as Pixels
from data_pipelines.video import examine, frames_at
from dit.config.editing import EditConfig, Extend, Frames, Inpaint, Invert, Outpaint, Replacement, SDEdit, TrainedMasks
from dit.config.objective import SamplingConfig
from dit.diffusion.editing import Known
from dit.runs import Encoders, TrainedRun

MAX_BYTES = 1 << 32
"""Of the pixels of an input."""


@dataclass(frozen=True)
class Edit:
    """An edit and its input. videos: (1 or B, T, H, W, 3) uint8. known: (T, H, W) bool, True for pixels that the result has bit for bit."""

    config: EditConfig
    videos: Tensor
    known: Tensor

    def tokens(self, encoders: Encoders, patch: Grid, count: int) -> Known:
        """Latent tokens of the videos for a pack of `count` samples. A token is known if all pixels that it stands for are.

        Raises UserError where an edit that keeps what is known has no known token, or no other.
        """
        given = _filled(self.videos, self.known).permute(0, 4, 1, 2, 3).float() / 127.5 - 1  # (B, 3, T, H, W)
        mean = encoders.latents.encode(given)[:, : encoders.latents.channels]  # where it gives a posterior, the deviation is behind
        latents = mean.to(encoders.null_text.device)  # a codec without weights has no device
        mask = _tokens_known(self.known, encoders.latents.stride, patch).to(latents.device)
        keeps = not isinstance(self.config, SDEdit | Invert)
        if keeps and (not bool(mask.any()) or bool(mask.all())):
            frames, height, width = (a * b for a, b in zip(encoders.latents.stride, patch, strict=True))
            raise UserError(
                f"edit: {'every' if bool(mask.all()) else 'no'} token is known; one is if all its pixels are: {frames} frames of {height} "
                f"x {width} (the first frame stands alone). Change what is given, or the mask"
            )
        tokens = torch.cat([patchify(video, patch) for video in latents.expand(count, -1, -1, -1, -1)])  # (L, P)
        mask = mask.repeat(count)
        return Known(tokens * mask[:, None] if keeps else tokens, mask)

    @property
    def is_told(self) -> bool:
        """Whether the network is shown clean tokens."""
        return isinstance(self.config, Inpaint | Outpaint | Frames | Extend) and isinstance(self.config.known_by, TrainedMasks)

    @property
    def resampling(self) -> tuple[int, int]:
        """How often each stretch of steps is gone, and its steps."""
        known_by = getattr(self.config, "known_by", None)
        return (known_by.repeats, known_by.jump) if isinstance(known_by, Replacement) else (1, 1)

    def paste(self, videos: Tensor) -> Tensor:
        """`videos` (B, T, H, W, 3) uint8 with the known pixels in place."""
        return torch.where(self.known[..., None], self.videos, videos)


def read_edit(config: EditConfig, size: Grid, encoders: Encoders) -> Edit:
    """Read the inputs of an edit that draws videos of `size` (T, H, W). Raises UserError that names the key of what does not fit."""
    frames, height, width = size
    match config:
        case Inpaint():
            video = _read(config.input, "edit.input", frames)
            return Edit(config, _fitted(video, size), ~_mask(config, size, video.shape[1:3]))
        case Outpaint():
            return _on_canvas(config, size)
        case Frames():
            return _between(config, size, encoders)
        case Extend():
            encoders.latent_size((config.keep, height, width), "edit.keep")
            if config.keep >= frames:
                raise UserError(f"edit.keep={config.keep}, expected fewer than the {frames} frames of size: nothing would be added")
            video = _read(config.input, "edit.input", None)
            if len(video) < config.keep:
                raise UserError(f"edit.input={config.input} has {len(video)} frames, expected at least edit.keep={config.keep}")
            return Edit(config, _fitted(video, size), torch.zeros(size, dtype=torch.bool))
        case SDEdit() | Invert():
            return Edit(config, _fitted(_read(config.input, "edit.input", frames), size), torch.zeros(size, dtype=torch.bool))
        case _:
            assert_never(config)


def check_edit(config: EditConfig, trained: TrainedRun, sampling: SamplingConfig, place: str) -> None:
    """Raise UserError unless the run can do this edit. place: the config key of the run, such as "contestants.0"."""
    known_by = None if isinstance(config, SDEdit | Invert) else config.known_by
    objective = trained.run.objective if trained.run is trained.base else None
    if isinstance(known_by, TrainedMasks) and getattr(objective, "clean_tokens", None) is None:
        raise UserError(
            f"edit.known_by=trained_masks, but {place}.run={trained.path} was not trained with objective.clean_tokens: "
            "train with it, or use known_by: {name: replacement}"
        )
    noisy = ("ancestral", "dpmpp_2m_sde", "euler_maruyama", "consistency", *(("ddim",) if sampling.eta > 0 else ()))
    if isinstance(config, Invert) and sampling.sampler in noisy:
        raise UserError(f"edit.name=invert needs a sampler that adds no noise, got {sampling.sampler} at {place}: use heun or dpmpp_2m")
    if isinstance(config, Invert) and config.solver == "euler" and trained.base.backbone.jumps:
        raise UserError(
            f"edit.solver=euler asks for the mean velocity up to a higher t, and {place}.run={trained.path} has learned it down to lower "
            "ones: use edit.solver heun"
        )


def extend(draw_window: Callable[[Edit, list[int]], Tensor], edit: Edit, keys: Sequence[int]) -> Tensor:
    """The input and what follows it, (B, T, H, W, 3): windows drawn by `draw_window` from an edit and keys, one after another."""
    assert isinstance(edit.config, Extend)
    videos, keep = edit.videos.expand(len(keys), -1, -1, -1, -1), edit.config.keep
    known = torch.zeros_like(edit.known)
    known[:keep] = True
    for number in range(edit.config.windows):
        beginning = videos[:, -keep:]
        window = torch.cat([beginning, beginning[:, -1:].expand(-1, len(known) - keep, -1, -1, -1)], dim=1)
        drawn = draw_window(Edit(edit.config, window, known), [key("window", own, number) for own in keys])
        videos = torch.cat([videos, drawn[:, keep:]], dim=1)
    return videos


def _on_canvas(config: Outpaint, size: Grid) -> Edit:
    video = _read(config.input, "edit.input", size[0])
    spare = (size[1] - video.shape[1], size[2] - video.shape[2])
    top, left = config.place or (spare[0] // 2, spare[1] // 2)
    if min(spare) < 0 or top > spare[0] or left > spare[1]:
        at = f" at {list(config.place)}" if config.place else ""
        raise UserError(
            f"edit.input={config.input} is {video.shape[1]} x {video.shape[2]}{at}, expected to lie within size {list(size[1:])}"
        )
    canvas, known = torch.zeros(*size, 3, dtype=torch.uint8), torch.zeros(size, dtype=torch.bool)
    inside = (slice(None), slice(top, top + video.shape[1]), slice(left, left + video.shape[2]))
    canvas[inside], known[inside] = torch.from_numpy(video), True
    return Edit(config, canvas[None], known)


def _between(config: Frames, size: Grid, encoders: Encoders) -> Edit:
    canvas, known = torch.zeros(*size, 3, dtype=torch.uint8), torch.zeros(size, dtype=torch.bool)
    group = encoders.latents.stride[0]
    first, last = 0, size[0]
    if config.first is not None:
        video = _fitted(_read(config.first, "edit.first", None), size)[0]
        first = len(video)
        encoders.latent_size((first, *size[1:]), "edit.first")
        canvas[:first] = video[: size[0]]
    if config.last is not None:
        video = _fitted(_read(config.last, "edit.last", None), size)[0]
        video = torch.cat([video[:1].expand(-len(video) % group, -1, -1, -1), video])  # whole groups: the beginning is held
        last -= len(video)
        canvas[max(last, 0) :] = video[-size[0] :]
    if first >= last:
        raise UserError(f"edit: first has {first} frames and last {size[0] - last}, of size {size[0]}: nothing is left to make; raise size")
    known[:first], known[last:] = True, True
    return Edit(config, canvas[None], known)


def _mask(config: Inpaint, size: Grid, have: tuple[int, ...]) -> Tensor:
    """Where `config` wants pixels made anew: (T, H, W) bool. have: rows and columns of its input."""
    frames, height, width = size
    if config.mask is None:
        anew = torch.zeros(size, dtype=torch.bool)
        rows = {"centre": slice(height // 4, -(height // 4)), "top": slice(height // 2), "bottom": slice(height // 2, None)}
        columns = {"centre": slice(width // 4, -(width // 4)), "left": slice(width // 2), "right": slice(width // 2, None)}
        region = config.region or "centre"
        anew[:, rows.get(region, slice(None)), columns.get(region, slice(None))] = True
        return anew
    mask = _read(config.mask, "edit.mask", None)
    if mask.shape[1:3] != have or len(mask) not in (1, frames):
        got = " x ".join(map(str, mask.shape[:3]))
        raise UserError(f"edit.mask={config.mask} is {got}, expected 1 or {frames} frames of {have[0]} x {have[1]}, as edit.input is")
    return (_fitted(mask, size)[0].float().mean(-1) >= 128).expand(frames, -1, -1)


def _read(path: str, where: str, frames: int | None) -> Pixels:
    """The first `frames` of a video (None: all), (T, H, W, 3), or an image as one frame. Raises UserError that names the key `where`."""
    extension = Path(path).suffix[1:].lower()
    try:
        if extension in IMAGE_EXTENSIONS:
            pictures = [decode_image(Path(path).read_bytes())]
        elif extension in VIDEO_EXTENSIONS:
            facts = examine(Path(path), extension)
            count = min(len(facts.times), frames or len(facts.times))
            if count * facts.height * facts.width * 3 > MAX_BYTES:
                raise UserError(f"{where}={path}: {count} frames of {facts.height} x {facts.width} are more than {MAX_BYTES} bytes; cut it")
            pictures = list(frames_at(Path(path), extension, range(count)))
        else:
            known = ", ".join(sorted((*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS)))
            raise UserError(f"{where}={path}: expected a file ending in one of {known}")
    except OSError as error:
        raise UserError(f"{where}={path} cannot be read ({error.strerror})") from error
    except BadSample as error:
        raise UserError(f"{where}={path}: {error}") from error
    if frames is not None and len(pictures) < frames:
        raise UserError(f"{where}={path} has {len(pictures)} frames, expected at least {frames} (size)")
    return np.stack(pictures)


def _fitted(video: Pixels, size: Grid) -> Tensor:
    """(T, h, w, 3) -> (1, T, H, W, 3), untouched where it has these sides."""
    return torch.from_numpy(np.stack([fit(picture, *size[1:], None) for picture in video]))[None]


def _filled(videos: Tensor, known: Tensor) -> Tensor:
    """The videos without what is unknown, so that none of it gets into latents of its neighbours.

    Unknown pixels take the median colour of the known ones of their frame; frames that have none become the nearest that has some.
    """
    some = known.flatten(1).any(1).nonzero()[:, 0]
    if len(some) == 0:
        return videos
    videos = videos.clone()
    for frame in some.tolist():
        colours = videos[:, frame, known[frame]].median(dim=1).values  # (B, 3)
        videos[:, frame] = torch.where(known[frame, :, :, None], videos[:, frame], colours[:, None, None])
    nearest = (torch.arange(len(known))[:, None] - some).abs().argmin(dim=1)
    return videos[:, some[nearest]]


def _tokens_known(known: Tensor, stride: Grid, patch: Grid) -> Tensor:
    """(T, H, W) -> (l,): the tokens all of whose pixels are known."""
    (group, rows, columns), (_, height, width) = stride, known.shape
    whole = torch.cat([known[:1].expand(group - 1, -1, -1), known])  # the first frame is a latent of its own
    latents = whole.reshape(-1, group, height // rows, rows, width // columns, columns).all(5).all(3).all(1)
    return patchify(latents[None].float(), patch).all(dim=1)
