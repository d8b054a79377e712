"""Photographs in class folders and a folder of videos, as users have them: through every command, with labels and captions."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data_pipelines.config_file import load_run
from data_pipelines.loader import StepPacks
from dit.config import TrainRun
from dit.models import build_backbone
from dit.runs import Encoders, TrainedRun
from dit.runtime import distributed
from dit.stream import Stream
from tests.processes import Forks, metrics, write_config
from tests.real.conftest import CLASSES, VIDEO_CAPTIONS

BACKBONE: dict[str, Any] = {"hidden_size": 48, "depth": 2, "num_heads": 4, "ffn_size": 96}
UNUSED_CLASSES = 2


def config(path: Path, **sections: Any) -> Path:
    """Write a training run of a small backbone, with `out` beside it."""
    values: dict[str, Any] = {
        "out": str(path.with_suffix("")),
        "backbone": BACKBONE,
        "objective": {"condition_dropout": 0.2},
        "optimizer": {"lr": 2e-3},
        "ema": {"decay": 0.9},
    }
    return write_config(path, values | sections, {})


def photo_run(path: Path, shards: Path) -> Path:
    """60 samples, each image once, in pixel space, with labels and captions."""
    return config(
        path,
        data={"sources": [{"path": str(shards)}], "sizes": [[1, 32, 32]], "token_budget": 640, "packs_per_step": 1, "num_workers": 0},
        encoders={"latents": {"name": "pixels"}},
        backbone=BACKBONE | {"patch_size": [1, 4, 4], "num_classes": len(CLASSES) + UNUSED_CLASSES},
        train={"samples": 60, "seed": 1},
        validation={"source": str(shards), "samples": 20, "every_steps": 3},
        preview={
            "prompts": [f"a photo of a {name}" for name in CLASSES],
            "labels": list(range(10)),
            "size": [1, 32, 32],
            "every_steps": 6,
            "sampling": {"steps": 2, "guidance": {"s": 2.0}},
        },
    )


def opened(path: Path) -> tuple[Stream, Iterator[StepPacks]]:
    """The data of a run as training reads it."""
    run = load_run(TrainRun, str(path))
    stream = Stream(run.data, Encoders.load(run.encoders, torch.device("cpu")), run.backbone, run.train.seed)
    return stream, stream.steps(None)


def test_labels_and_captions_of_class_folders_reach_the_objective(photos: Path, tmp_path: Path) -> None:
    stream, steps = opened(photo_run(tmp_path / "photos.yaml", photos))
    seen: list[str] = []
    while len(seen) < 60:
        pack = stream.encode(next(steps).packs[0])
        assert pack.tokens.shape == (10 * 64, 48)
        assert pack.cond.labels is not None
        names = [id.split("/")[2] for id in pack.ids]  # the key begins with the class folder
        assert [CLASSES[label] for label in pack.cond.labels.tolist()] == names
        texts = stream.encoders.text.encode([f"a photo of a {name}" for name in names])
        torch.testing.assert_close(pack.cond.text, torch.cat(texts))
        seen += pack.ids
    assert len(set(seen)) == 60


def test_a_class_and_text_conditional_run_on_photos(forks: Forks, photos: Path, tmp_path: Path) -> None:
    path = photo_run(tmp_path / "photos.yaml", photos)
    out = path.with_suffix("")
    forks.run("train", str(path)).ok()
    assert json.loads((out / "status.json").read_text())["state"] == "done"
    assert "60 x image [1, 32, 32]" in (out / "data.txt").read_text()
    assert [line["samples_seen"] for line in metrics(out)] == [10, 20, 30, 40, 50, 60]
    for step in (0, 6):
        with Image.open(out / "samples" / f"step-{step:08d}.png") as sheet:
            assert sheet.width >= 10 * 96

    trained = TrainedRun.open(str(out), "run")
    encoders = Encoders.load(trained.base.encoders, torch.device("cpu"))
    after = trained.backbone(encoders, None, "model", torch.device("cpu")).state_dict()
    with distributed.seeded(trained.base.train.seed):
        before = build_backbone(trained.base.backbone, channels=3, text_width=encoders.text.width).state_dict()
    moved = (after["label_embedder.table.weight"] - before["label_embedder.table.weight"]).abs().amax(dim=1) > 0  # (classes + 1,)
    assert moved.tolist() == [True] * 10 + [False] * UNUSED_CLASSES + [True]  # the last row is "no class", which dropout trains
    assert not torch.equal(after["text_embedder.0.weight"], before["text_embedder.0.weight"])


def test_a_folder_of_videos_and_photos_are_cached_and_mixed_in_one_run(forks: Forks, photos: Path, videos: Path, tmp_path: Path) -> None:
    for name, shards, size in (("photos", photos, [1, 32, 32]), ("videos", videos, [9, 36, 64])):
        values = {"sources": [{"path": str(shards)}], "sizes": [size], "out": str(tmp_path / "latents" / name), "num_workers": 0}
        forks.run("encode", str(write_config(tmp_path / f"encode_{name}.yaml", values, {}))).ok()
    caches = [{"path": str(tmp_path / "latents" / "photos"), "weight": 0.5}, {"path": str(tmp_path / "latents" / "videos"), "weight": 2.0}]
    path = config(
        tmp_path / "mixed.yaml",
        data={"sources": caches, "token_budget": 512, "packs_per_step": 1, "num_workers": 0},
        backbone=BACKBONE | {"patch_size": [1, 1, 4]},
        train={"samples": 24, "seed": 2},
        preview={"prompts": list(VIDEO_CAPTIONS.values()), "size": [9, 36, 64], "every_steps": 100, "sampling": {"steps": 1}},
    )
    stream, steps = opened(path)
    check_mixture(stream, steps)
    forks.run("train", str(path)).ok()
    out = path.with_suffix("")
    assert json.loads((out / "status.json").read_text())["state"] == "done"
    assert (out / "samples" / "step-00000000.gif").is_file()

    drawn = tmp_path / "drawn"
    request = {"contestants": [{"run": str(out)}], "prompts": ["a frame counter on blue"], "size": [9, 36, 64], "out": str(drawn)}
    forks.run("sample", str(write_config(tmp_path / "sample.yaml", request, {}))).ok()
    assert (drawn / "grid.gif").is_file()


def check_mixture(stream: Stream, steps: Iterator[StepPacks]) -> None:
    """In an epoch: images and clips in the same packs, each with its grid and its caption, as often as the weights say."""
    captions: dict[str, set[str]] = {"photos": set(), "videos": set()}
    counts = {"photos": 0, "videos": 0}
    mixed = 0
    for _ in range(24):
        raw = next(steps).packs[0]
        packed = stream.encode(raw)
        assert packed.cond.labels is None  # the photos have labels, this backbone has no classes
        for sample, grid in zip(raw.samples, packed.cond.grids, strict=True):
            source = sample.id.split("/")[0]
            assert grid == {"photos": (1, 8, 2), "videos": (3, 9, 4)}[source]
            captions[source].add(sample.caption)
            counts[source] += 1
        mixed += len(set(packed.cond.grids)) == 2
    assert captions["videos"] == set(VIDEO_CAPTIONS.values())
    assert captions["photos"] <= {f"a photo of a {name}" for name in CLASSES}
    assert mixed >= 12
    assert counts["videos"] > counts["photos"] > 10
