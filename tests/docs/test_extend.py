"""The pages of docs/extend are applied to a copy of the source and run, so that they stay true."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def apply(tmp_path):
    """Copy `data_pipelines` and make the changes of a page: its files are written, its diffs are applied."""

    def apply(page):
        shutil.copytree(ROOT / "data_pipelines", tmp_path / "data_pipelines", ignore=shutil.ignore_patterns("__pycache__"))
        text = (ROOT / "docs" / "extend" / page).read_text()
        blocks = re.findall(r"```(python|diff)(?: (\S+))?\n(.*?\n)```", text, re.DOTALL)
        assert {kind for kind, _, _ in blocks} == {"python", "diff"}
        for kind, name, body in blocks:
            if kind == "python":
                (tmp_path / name).write_text(body)
            else:
                subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=body, text=True, check=True)
        return tmp_path

    return apply


def ingest(root, *arguments):
    command = [sys.executable, "-m", "data_pipelines", "ingest", *map(str, arguments)]
    done = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads((root / "out" / "ingest.json").read_text())


def test_the_filter_of_the_page_works(apply):
    root = apply("filter.md")
    (root / "src").mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    picture.save(root / "src" / "sharp.png")
    picture.filter(ImageFilter.GaussianBlur(3)).save(root / "src" / "blurred.png")
    record = ingest(root, "src", "out", "stages=[{name: sharpness, min: 0.001}]")
    assert record["skipped"] == [["blurred.png", "sharpness below 0.001"]]
    index = json.loads((root / "out" / "shard-000000.tar.index.json").read_text())
    grey = np.asarray(picture, np.float64) @ [0.299, 0.587, 0.114] / 255
    laplacian = np.roll(grey, 1, 0) + np.roll(grey, -1, 0) + np.roll(grey, 1, 1) + np.roll(grey, -1, 1) - 4 * grey
    assert index["samples"][0]["meta"]["sharpness"] == pytest.approx((laplacian[1:-1, 1:-1] ** 2).mean(), rel=1e-3)


def test_the_source_of_the_page_works(apply):
    root = apply("source.md")
    Image.new("RGB", (8, 8)).save(root / "a.png")
    (root / "files.lst").write_text("a.png\ngone.png\n")
    record = ingest(root, "files.lst", "out")
    assert (record["samples"], record["skipped"]) == (1, [["gone.png", "no such image or video"]])
