"""`dit evaluate` on stored clips with networks by path, and what it refuses before anything is drawn."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from data_pipelines.config_file import ConfigError, load_run
from data_pipelines.errors import UserError
from data_pipelines.rendered import ShapesSet, render
from dit.config import EvaluateRun
from dit.config.evaluation import FrechetConfig, KernelConfig, NetworkFeatures, PrecisionRecallConfig, RandomConvFeatures
from dit.evaluate import main
from dit.evaluation.metrics import Batch, build_metrics
from dit.evaluation.results import compare, read
from tests.dit.encoders.test_text import save_tokenizer
from tests.dit.evaluation.test_features import SMALL, dinov2, save
from tests.processes import Forks

CONV = {"name": "random_conv"}


def write(path: Path, teacher: Path, **values: Any) -> Path:
    path.write_text(json.dumps({"contestants": [{"run": str(teacher), "steps": 2}], "out": str(path.with_suffix("")), **values}))
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 clips: twice 40."""
    folder = tmp_path_factory.mktemp("judged") / "clips"
    render(folder, ShapesSet(80, 5, "train", 40))
    return folder


def clip(folder: Path) -> Path:
    torch.manual_seed(4)
    text = {**SMALL, "vocab_size": 16, "max_position_embeddings": 20, "eos_token_id": 1}
    save(folder, CLIPModel(CLIPConfig(text_config=text, vision_config={**SMALL, "image_size": 32, "patch_size": 8}, projection_dim=24)))
    save_tokenizer(folder)
    return folder


def test_networks_and_stored_clips(forks: Forks, teacher: Path, shards: Path, tmp_path: Path) -> None:
    network = {"name": "network", "path": str(dinov2(tmp_path / "dino"))}
    metrics = [
        {"name": "frechet", "features": network},
        {"name": "kernel", "features": CONV},
        {"name": "precision_recall", "features": network},
        {"name": "temporal", "features": CONV, "radius": 1},
        {"name": "clip_score", "path": str(clip(tmp_path / "clip"))},
    ]
    clips = {"name": "shards", "path": str(shards), "size": [9, 32, 32]}
    config = write(tmp_path / "run.yaml", teacher, samples=40, clips=clips, metrics=metrics)
    forks.run("evaluate", str(config)).ok()
    results = read(str(tmp_path / "run" / "results.json"))
    judged, floor = (row["figures"]["all"] for row in results["rows"])
    assert judged.keys() == floor.keys()
    for name in ("frechet/dino", "kernel/random_conv", "clip_score", "temporal/random_conv/warping_error"):
        assert judged[name]["low"] < judged[name]["value"] < judged[name]["high"]
        assert judged[name]["count"] == 40
    assert judged["frechet/dino"]["low"] > floor["frechet/dino"]["high"]  # six steps of training
    assert floor["frechet/dino"]["low"] < 0 < floor["frechet/dino"]["high"]
    assert judged["kernel/random_conv"]["value"] > floor["kernel/random_conv"]["high"]
    assert floor["precision_recall/dino/precision"]["value"] > judged["precision_recall/dino/recall"]["value"]
    facts = results["protocol"]["metrics"]
    assert facts["frechet/dino"]["features"]["resize"] == "whole frame to 32 x 32, antialiased bicubic"
    assert len(facts["frechet/dino"]["features"]["weights"]) == len(facts["clip_score"]["weights"]) == 32
    assert (facts["kernel/random_conv"]["subset"], results["protocol"]["clips"]["frames"][:11]) == (1000, "consecutive")
    sheet = np.asarray(Image.open(next((tmp_path / "run").glob("*.png"))))
    assert sheet.std() > 2

    forks.run("evaluate", str(config), f"out={tmp_path / 'again'}").ok()
    again = read(str(tmp_path / "again" / "results.json"))
    for row in (*results["rows"], *again["rows"]):
        row["seconds_per_clip"] = None
    assert again == results
    assert re.search(r"frechet/dino .* \| \+0 \[.*no evidence", compare(results, again))
    forks.run(
        "evaluate", str(config), f"out={tmp_path / 'other'}", "samples=20", "metrics=[{name: temporal, features: {name: random_conv}}]"
    ).ok()
    with pytest.raises(UserError, match="samples: 40 and 20"):
        compare(results, read(str(tmp_path / "other" / "results.json")))


def test_too_few_clips_are_refused(forks: Forks, teacher: Path, shards: Path, tmp_path: Path) -> None:
    clips = {"name": "shards", "path": str(shards), "size": [9, 32, 32]}
    wanted = [{"name": "temporal", "features": CONV}]
    done = forks.run("evaluate", str(write(tmp_path / "run.yaml", teacher, samples=41, clips=clips, metrics=wanted)))
    assert done.code == 2
    assert "fewer usable clips than 2 x samples = 82" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("size", "metric", "words"),
    [
        ([1, 32, 32], {"name": "temporal", "features": CONV}, "sides of 8 pixels or more and 2 frames, got clips of [1, 32, 32]"),
        ([9, 8, 32], {"name": "temporal", "features": CONV, "block": 16}, "sides of 16 pixels"),
        ([9, 8, 32], {"name": "fidelity", "features": CONV}, "metrics.0: fidelity needs sides of 11 pixels or more, got"),
    ],
)
def test_clips_too_small_for_a_metric_are_refused(size: list[int], metric: dict[str, Any], words: str, tmp_path: Path) -> None:
    clips = {"name": "folder", "path": "x", "size": size}
    contestants = [{"run": str(tmp_path)}] * 2
    with pytest.raises(UserError) as error:
        main(load_run(EvaluateRun, str(write(tmp_path / "run.yaml", tmp_path, clips=clips, metrics=[metric], contestants=contestants))))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metrics": [{"name": "diversity", "features": CONV}]}, "set per_caption to 2 or more"),
        ({"samples": 9, "per_caption": 2}, "samples=9 is no multiple of per_caption=2"),
        ({"samples": 39, "metrics": [{"name": "kernel", "features": CONV}]}, "kernel needs at least 40 samples, got samples=39"),
        ({"samples": 40, "metrics": [{"name": "precision_recall", "features": CONV, "k": 40}]}, "metrics.0.k=40: a clip has 39 neighbours"),
        ({"metrics": [{"name": "fréchet"}]}, "Allowed: adherence"),
        ({"clips": {"name": "folder", "path": "x", "size": [1, 8, 8]}}, "adherence judges moving shapes alone"),
        (
            {
                "clips": {"name": "folder", "path": "x", "size": [1, 8, 8]},
                "metrics": [{"name": "frechet", "features": {"name": "attributes"}}],
            },
            "attributes judges moving shapes alone",
        ),
        ({"metrics": [{"name": "temporal", "features": {"name": "attributes"}}]}, "Allowed: random_conv, network"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_key(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_run(EvaluateRun, str(write(tmp_path / "run.yaml", tmp_path, **changes)))
    assert words in str(error.value)


def test_metrics_with_the_same_network_share_its_rows(tmp_path: Path) -> None:
    network = NetworkFeatures(name="network", path=str(dinov2(tmp_path / "dino")))
    conv = RandomConvFeatures(name="random_conv")
    wanted = [
        FrechetConfig(name="frechet", features=network),
        KernelConfig(name="kernel", features=network),
        PrecisionRecallConfig(name="precision_recall", features=conv),
    ]
    metrics = build_metrics(wanted, torch.device("cpu"))
    assert [metric.name for metric in metrics] == ["frechet/dino", "kernel/dino", "precision_recall/random_conv"]
    assert metrics[0].rows is metrics[1].rows is not metrics[2].rows
    rows = metrics[0].rows(Batch(torch.zeros(2, 3, 32, 32, 3, dtype=torch.uint8), ["", ""], None))
    assert rows is not None
    assert rows.shape == (2, 32)
    again = dinov2(tmp_path / "another" / "dino", seed=1)
    with pytest.raises(UserError, match="frechet/dino is asked for twice"):
        build_metrics(
            [*wanted, FrechetConfig(name="frechet", features=NetworkFeatures(name="network", path=str(again)))], torch.device("cpu")
        )
