"""`dit sample`: prompts to images or videos, with the weights and the sampler of one or more runs."""

import json
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from data_pipelines.packed import check_patch
from data_pipelines.progress import track
from data_pipelines.video import write_mp4
from dit.config import SampleRun
from dit.config.editing import Extend
from dit.drawing import Opened, check_request, draw, sample_keys, told_apart, visited
from dit.editing import Edit, check_edit, extend, read_edit
from dit.evaluation.pictures import contact_sheet, write_video_grid
from dit.runs import make_folder
from dit.runtime import distributed

FPS = 8.0


def main(run: SampleRun) -> int:
    """Draw every prompt with every contestant; write one file each, a contact sheet and (for videos) a grid that plays.

    Processes share the batches, and the first one writes.
    """
    distributed.init_if_launched()
    contestants = [Opened.of(contestant, f"contestants.{index}.") for index, contestant in enumerate(run.contestants)]
    for index, opened in enumerate(contestants):
        if run.edit is not None:
            check_edit(run.edit, opened.trained, opened.sampling, f"contestants.{index}")
    folder = make_folder(run.out, "out")
    videos_of = [videos for opened in contestants if (videos := _draw(run, opened)) is not None]
    if distributed.rank() > 0:
        return 0
    drawn = list(zip(told_apart([_traits(opened) for opened in contestants]), videos_of, strict=True))
    for name, videos in drawn:
        _write_files(videos, folder / name.replace(" ", "_"), exact=run.edit is not None)
    names = [f"{name}: {prompt}" if len(drawn) > 1 else prompt for prompt in run.prompts for name, _ in drawn]
    beside = torch.stack([videos for _, videos in drawn], dim=1).flatten(0, 1)  # (prompts * contestants, T, H, W, 3)
    contact_sheet(beside, names, folder / "contact_sheet.png", frames=6 if len(drawn) > 1 else 5)
    if run.size[0] > 1:
        rows = torch.cat([videos for _, videos in drawn])  # a row of the grid for each contestant
        columns = len(run.prompts) if len(drawn) > 1 else None
        write_video_grid(rows, folder / "grid.gif", fps=FPS, columns=columns)
        write_video_grid(rows, folder / "grid.mp4", fps=FPS, columns=columns)
    (folder / "prompts.json").write_text(json.dumps(run.prompts, indent=1) + "\n")
    print(f"wrote {len(beside)} {'videos' if run.size[0] > 1 else 'images'} and contact_sheet.png to {folder}")
    return 0


def _traits(opened: Opened) -> list[str]:
    sampling, path = opened.sampling, opened.trained.path
    guidance = f"s={sampling.guidance.scale:g}"
    return [f"{path.name} {sampling.steps} steps", sampling.sampler, guidance, f"step {opened.step}", f"of {path.absolute().parent.name}"]


def _draw(run: SampleRun, opened: Opened) -> Tensor | None:
    """Its videos (B, T, H, W, 3) uint8 on the first process, None on others."""
    trained, sampling = opened.trained, opened.sampling
    encoders = trained.encoders()
    check_request(encoders, trained.base, run.prompts, run.labels, run.size, "")
    edit = None if run.edit is None else read_edit(run.edit, run.size, encoders)
    if edit is not None and not isinstance(run.edit, Extend):
        edit.tokens(encoders, trained.base.backbone.patch_size, 1)  # says what does not fit before the network is there
    backbone = opened.network(encoders, run.weights)
    grid = check_patch(encoders.latent_size(run.size, "size"), trained.base.backbone.patch_size)
    times = visited(trained.base, backbone, sampling, grid, trained.flow)[:-1].tolist()
    at = ", ".join(f"{t:.3g}" for t in (times if len(times) <= 8 else (*times[:3], *times[-3:])))
    if distributed.rank() == 0:
        print(f"{trained.path}: {sampling.sampler} sampler, {sampling.steps} steps, guidance {sampling.guidance}, from t = {at}")
    keys = sample_keys(run.seed, len(run.prompts))
    parts = [slice(first, first + run.batch_size) for first in range(0, len(run.prompts), run.batch_size)]
    own = [parts[number] for number in distributed.share(len(parts))]

    def window(part: slice, edit: Edit | None, keys: list[int]) -> Tensor:
        labels = run.labels and run.labels[part]
        return draw(backbone, encoders, trained.base, run.prompts[part], labels, run.size, sampling, keys, trained.flow, edit)

    videos = [
        extend(partial(window, p), edit, keys[p]) if edit and isinstance(run.edit, Extend) else window(p, edit, keys[p])
        for p in track(own, f"sampling {trained.path.name}", silent=distributed.rank() > 0)
    ]
    return distributed.gather_rows(torch.cat(videos) if videos else None)


def _write_files(videos: Tensor, folder: Path, exact: bool) -> None:
    """exact: also as videos that keep every bit, as edits promise for what was given."""
    folder.mkdir(parents=True, exist_ok=True)
    enlarge = max(1, 256 // videos.shape[3])  # small clips are enlarged: chroma subsampling would blur them
    for index, video in enumerate(videos):
        if len(video) > 1:
            large = video.numpy().repeat(enlarge, axis=1).repeat(enlarge, axis=2)
            write_mp4(folder / f"{index:04d}.mp4", large, FPS, lossless=False)
            if exact:
                write_mp4(folder / f"{index:04d}.lossless.mp4", video.numpy(), FPS, lossless=True)
        else:
            Image.fromarray(video[0].numpy()).save(folder / f"{index:04d}.png")
