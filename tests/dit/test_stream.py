"""Caches of latents as training sees them: those that this run would not have made are refused, by the field that differs."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from data_pipelines.config import DataConfig, Source
from data_pipelines.errors import UserError
from data_pipelines.packed import PackedLatents
from dit.config.backbone import SpatioTemporalDiTConfig
from dit.config.encoders import EncodersConfig
from dit.config.engine import ValidationConfig
from dit.runs import Encoders, make_folder
from dit.stream import Stream, check_cache


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


@pytest.mark.parametrize(("asked", "measured", "says"), [(20, 20, False), (48, 48, False), (60, 48, True)])
def test_a_held_out_sample_counts_once(
    asked: int, measured: int, says: bool, latents: Path, encoders: Encoders, caplog: pytest.LogCaptureFixture
) -> None:
    data = DataConfig(sources=[Source(path=str(latents))], token_budget=192, packs_per_step=1, num_workers=0)
    backbone = SpatioTemporalDiTConfig(hidden_size=48, depth=2, num_heads=4, ffn_size=96, patch_size=(1, 2, 2))
    shown: list[str] = []

    def losses_of(network: nn.Module, packs: Sequence[PackedLatents], levels: Sequence[float]) -> Tensor:
        shown.extend(id for pack in packs for id in pack.ids)
        return torch.ones(len(levels), len(shown))

    config = ValidationConfig(source=str(latents), samples=asked, every_steps=1)
    with caplog.at_level("WARNING", "dit"):
        Stream(data, encoders, backbone, 0).held_out(config, losses_of)(nn.Identity())
    assert len(set(shown)) == len(shown) == measured
    assert (f"has 48 samples, validation.samples asks for {asked}" in caplog.text) == says


@pytest.mark.parametrize("is_seen", [True, False])
def test_validation_on_what_is_trained_on_is_warned_of(
    is_seen: bool, latents: Path, tmp_path: Path, encoders: Encoders, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "other"
    shutil.copytree(latents, other)
    data = DataConfig(sources=[Source(path=str(latents))], token_budget=192, packs_per_step=1, num_workers=0)
    backbone = SpatioTemporalDiTConfig(hidden_size=48, depth=2, num_heads=4, ffn_size=96, patch_size=(1, 2, 2))
    config = ValidationConfig(source=f"{latents if is_seen else other}/", samples=4)
    with caplog.at_level("WARNING", "dit"):
        Stream(data, encoders, backbone, 0).held_out(config, lambda *_: torch.zeros(0))
    assert ("is a source of training too" in caplog.text) == is_seen


def test_what_is_written_is_written_to_a_local_folder() -> None:
    with pytest.raises(UserError, match=r"out=s3://bucket/latents: expected a local folder"):
        make_folder("s3://bucket/latents", "out")
