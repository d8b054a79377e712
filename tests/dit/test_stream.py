"""Caches of latents as training sees them: those that this run would not have made are refused, by the field that differs."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from data_pipelines.config import Source
from data_pipelines.errors import UserError
from dit.config.encoders import EncodersConfig
from dit.runs import Encoders, make_folder
from dit.stream import check_cache


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return Encoders.load(EncodersConfig(), torch.device("cpu"))


@pytest.mark.parametrize("field", ["latents.weights", "latents.class", "text.weights", "text.version", "preprocessing.version"])
def test_a_cache_that_was_made_otherwise_is_refused_by_field(latents: Path, tmp_path: Path, encoders: Encoders, field: str) -> None:
    folder = shutil.copytree(latents, tmp_path / "cache")
    check_cache(Source(path=f"{folder}/"), encoders, "data.sources.0.path")
    made = json.loads((folder / "cache.json").read_text())
    part, name = field.split(".")
    made[part][name] = "other"
    (folder / "cache.json").write_text(json.dumps(made))
    with pytest.raises(UserError, match=rf"data\.sources\.0\.path=.*: {field} is other there"):
        check_cache(Source(path=str(folder)), encoders, "data.sources.0.path")
    del made[part]
    (folder / "cache.json").write_text(json.dumps(made))
    with pytest.raises(UserError, match=rf"{part}\.\w+ is None there"):
        check_cache(Source(path=str(folder)), encoders, "data.sources.0.path")


def test_an_unfinished_or_damaged_cache_is_refused(latents: Path, tmp_path: Path, encoders: Encoders) -> None:
    folder = shutil.copytree(latents, tmp_path / "cache")
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"validation\.source=.* unfinished cache .*`dit encode`"):
        check_cache(Source(path=str(folder)), encoders, "validation.source")
    (folder / "cache.json").write_text("{")
    with pytest.raises(UserError, match=r"cache\.json is damaged"):
        check_cache(Source(path=str(folder)), encoders, "validation.source")


def test_shards_of_pixels_are_no_cache(clips: Path, encoders: Encoders) -> None:
    check_cache(Source(path=str(clips)), encoders, "data.sources.0.path")


def test_what_is_written_is_written_to_a_local_folder() -> None:
    with pytest.raises(UserError, match=r"out=s3://bucket/latents: expected a local folder"):
        make_folder("s3://bucket/latents", "out")
