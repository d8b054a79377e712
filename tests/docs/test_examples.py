"""The worked examples of docs/examples: each trains for two steps on a small cache, is drawn, and its loss curve is a picture."""

import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.decode import encode_png
from data_pipelines.samples import Facts
from data_pipelines.shards import ShardWriter, shard_name
from tests.processes import ENVIRONMENT, REPOSITORY, Forks, metrics

CONFIGS = REPOSITORY / "configs" / "examples"
DRAWN_BY = {"rectified_flow": "unconditional", "ddpm": "unconditional", "class_conditional": "guidance", "logit_normal": "guidance"}
SMALL = ("data.token_budget=64", "train.samples=5", "train.save_every_steps=1", "validation.samples=2", "validation.every_steps=1")


@pytest.fixture(scope="module")
def images(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of ten coloured pictures of the size of CIFAR-10, one of each class."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "shards").mkdir()
    with ShardWriter(folder / "shards" / shard_name(0)) as shard:
        for label in range(10):
            picture = np.full((32, 32, 3), (25 * label, 120, 200), np.uint8)
            members = {"png": encode_png(picture), "txt": b"a photo", "cls": str(label).encode()}
            shard.add(f"{label:03d}", members, Facts("image", 1, 32, 32, None), {"label": label})
    encode = str(REPOSITORY / "configs" / "encode" / "cifar10.yaml")
    forks.run("encode", encode, f"sources=[{{path: {folder}/shards}}]", f"out={folder}/latents").ok()
    return folder / "latents"


def test_every_example_is_tried() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*DRAWN_BY, *DRAWN_BY.values()}


@pytest.mark.parametrize("name", DRAWN_BY)
def test_an_example_takes_two_steps_and_is_drawn(name: str, forks: Forks, images: Path, tmp_path: Path) -> None:
    run, sheet = tmp_path / "run", tmp_path / "drawn" / "contact_sheet.png"
    here = (f"out={run}", f"data.sources=[{{path: {images}}}]", f"validation.source={images}", "preview.sampling.steps=2")
    forks.run("train", str(CONFIGS / f"{name}.yaml"), *here, *SMALL).ok()
    lines = metrics(run)
    assert len(lines) == 2
    assert np.isfinite([line["loss"] for line in lines]).all()
    few = ("contestants.0.steps=2", f"contestants.0.run={run}", f"out={sheet.parent}")
    forks.run("sample", str(CONFIGS / f"{DRAWN_BY[name]}.yaml"), *few).ok()
    assert np.asarray(Image.open(sheet).convert("RGB")).std() > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpm", "rectified_flow"])
def test_an_example_learns_pictures_in_class_folders(name: str, forks: Forks, tmp_path: Path) -> None:
    """500 steps on procedural pictures laid out as CIFAR-10 is: a sky above a ground, each class its colours."""
    for label, number in product(range(10), range(40)):
        (tmp_path / f"raw/class{label}").mkdir(parents=True, exist_ok=True)
        picture = np.full((32, 32, 3), (25 * label, 120, 200), np.uint8)
        picture[8 + number % 16 :] = (200, 250 - 25 * label, 40)
        Image.fromarray(picture).save(tmp_path / f"raw/class{label}/{number:04d}.png")
    forks.run("data", "ingest", str(tmp_path / "raw"), str(tmp_path / "shards"), "--captions", "a photo").ok()
    cache = str(tmp_path / "latents")
    encode = str(REPOSITORY / "configs" / "encode" / "cifar10.yaml")
    forks.run("encode", encode, f"sources=[{{path: {tmp_path}/shards}}]", f"out={cache}").ok()
    losses = []
    for samples, every in ((16, 1), (8000, 500)):
        here = (f"out={tmp_path}/{samples}", f"data.sources=[{{path: {cache}}}]", f"validation.source={cache}", "preview=null")
        budget = ("data.token_budget=256", f"train.samples={samples}", f"validation.every_steps={every}", "train.save_every_steps=500")
        forks.run("train", str(CONFIGS / f"{name}.yaml"), *here, *budget).ok()
        losses.append(metrics(tmp_path / str(samples))[-1]["held_out"]["cells"]["all"]["loss"])
    assert losses[1] < 0.15 * losses[0]


def curves(folder: Path, *losses: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The picture of runs with these losses of the step."""
    for number, loss in enumerate(losses):
        (folder / f"run{number}").mkdir()
        values = loss(np.arange(1, 101))
        lines = [f'{{"samples_seen": {32 * i}, "loss": {value}}}' for i, value in enumerate(values, start=1)]
        lines[-1] = f'{lines[-1][:-1]}, "held_out": {{"cells": {{"all": {{"loss": {values[-1]}}}}}}}}}'
        (folder / f"run{number}" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    runs = [str(folder / f"run{number}") for number in range(len(losses))]
    command = [sys.executable, str(REPOSITORY / "docs" / "examples" / "curves.py"), *runs, str(folder / "curves.png")]
    subprocess.run(command, env=ENVIRONMENT, check=True)
    return np.asarray(Image.open(folder / "curves.png").convert("RGB")).astype(int)


def heights(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Mean row of the pixels of `colour` at the left and at the right of the picture; rows count downwards."""
    rows, columns = np.nonzero((picture == colour).all(-1) & (np.arange(len(picture)) > 60)[:, None])  # below the names
    left, right = columns < np.quantile(columns, 0.2), columns > np.quantile(columns, 0.8)
    return np.array([rows[left].mean(), rows[right].mean()])


def test_a_falling_loss_falls_in_the_picture(tmp_path: Path) -> None:
    picture = curves(tmp_path, lambda step: 3 / step, lambda step: 0.02 * step**0.3)
    falling, rising = heights(picture, (70, 130, 180)), heights(picture, (205, 92, 92))
    assert falling[1] > falling[0] + 30
    assert rising[1] < rising[0] - 5
