"""The shipped runs on real input, shortened: the held-out loss falls below a stated number and pictures are drawn. Minutes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit.diffusion import held_out_loss as held_out_losses
from dit.runs import Encoders, TrainedRun
from dit.stream import Stream
from tests.processes import ENVIRONMENT, REPOSITORY
from tests.real.conftest import ARCHIVE, DATA, VIDEO_CAPTIONS, ingest

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
PATIENCE_SECONDS = 1500


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 20,000 images in `shards`, but for a shard in `held_out`."""
    if not ARCHIVE.is_file():
        pytest.skip(f"CIFAR-10 is not at {ARCHIVE}")
    folder = tmp_path_factory.mktemp("cifar10")
    ingest(ARCHIVE, folder / "shards", "--captions", "a photo of a {class}")
    hold_out(folder, "shard-000019.tar")
    return folder


def hold_out(folder: Path, shard: str) -> None:
    (folder / "held_out").mkdir()
    for name in (shard, f"{shard}.index.json"):
        (folder / "shards" / name).rename(folder / "held_out" / name)


def dit(*arguments: str) -> None:
    """`python -m dit ARGUMENTS`, from the repository's root, to its end."""
    subprocess.run([sys.executable, "-m", "dit", *arguments], env=ENVIRONMENT, cwd=REPOSITORY, timeout=PATIENCE_SECONDS, check=True)


def cached(config: str, shards: Path, out: Path) -> Path:
    """Encode `shards` as a shipped config does."""
    dit("encode", f"configs/encode/{config}", f"sources=[{{path: {shards}}}]", f"out={out}")
    return out


def held_out_loss(out: Path) -> float:
    """Loss of the averaged weights of the newest checkpoint on the run's validation source."""
    trained = TrainedRun.open(str(out), "run")
    run = trained.base
    assert run.validation
    encoders = Encoders.load(run.encoders, torch.device("cpu"))
    stream = Stream(run.data, encoders, run.backbone, run.train.seed)
    measure = stream.held_out(run.validation.model_copy(update={"times": TIMES}), held_out_losses)
    return float(measure(trained.backbone(encoders, None, "ema", torch.device("cpu"))).losses.mean())


def train(config: str, out: Path, samples: int, *overrides: str) -> float:
    """Train a shipped config for `samples`; returns the held-out loss of what it saved."""
    shorter = (f"train.samples={samples}", "preview.every_steps=100")
    dit("train", f"configs/train/{config}", f"out={out}", *shorter, *overrides)
    sheets = [np.asarray(Image.open(path)) for path in sorted((out / "samples").glob("step-*.png"))]
    assert len(sheets) >= 2
    assert sheets[0].shape == sheets[-1].shape
    assert np.abs(sheets[0].astype(float) - sheets[-1]).mean() > 1  # what was noise has become something else
    return held_out_loss(out)


@pytest.mark.slow
def test_cifar10_in_pixels_learns(cifar10: Path, tmp_path: Path) -> None:
    sources = (f"data.sources=[{{path: {cifar10 / 'shards'}}}]", f"validation.source={cifar10 / 'held_out'}")
    assert train("cifar10_pixels.yaml", tmp_path / "run", 3200, *sources) < 0.36  # zero velocity has 1.25, a full run 0.20


@pytest.mark.slow
def test_cifar10_in_latents_learns(cifar10: Path, tmp_path: Path) -> None:
    latents = [cached("cifar10.yaml", cifar10 / part, tmp_path / part) for part in ("shards", "held_out")]
    sources = (f"data.sources=[{{path: {latents[0]}}}]", f"validation.source={latents[1]}")
    assert train("cifar10_latents.yaml", tmp_path / "run", 4800, *sources) < 3.0  # zero velocity has 6.3, a full run 1.7


@pytest.mark.slow
def test_videos_and_images_in_one_run_learn(cifar10: Path, tmp_path: Path) -> None:
    if not (DATA / "videos").is_dir():
        pytest.skip(f"the videos are not at {DATA / 'videos'}")
    files = tmp_path / "files"
    files.mkdir()
    for file in (DATA / "videos").iterdir():
        (files / file.name).write_bytes(file.read_bytes())
        (files / file.name).with_suffix(".txt").write_text(VIDEO_CAPTIONS.get(file.name, "a test pattern"))
    ingest(files, tmp_path / "shards", "--shard-samples", 10)
    hold_out(tmp_path, "shard-000003.tar")
    clips = [cached("videos.yaml", tmp_path / part, tmp_path / "latents" / part) for part in ("shards", "held_out")]
    images = cached("cifar10.yaml", cifar10 / "held_out", tmp_path / "latents" / "images")
    sources = f"data.sources=[{{path: {clips[0]}, weight: 100}}, {{path: {images}, weight: 2}}]"
    loss = train("videos.yaml", tmp_path / "run", 1600, sources, f"validation.source={clips[1]}")
    assert loss < 3.4
    assert (tmp_path / "run" / "samples" / "step-00000000.gif").is_file()
