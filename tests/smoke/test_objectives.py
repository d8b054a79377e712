"""Other paths and objectives than the default by the commands that a user types: train, distil, sample."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dit.engine.checkpoint import load_weights
from tests.processes import Forks, distill_config, metrics, train_config

PROMPT = "a large red disc moving right quickly near the top"
SIZE = [9, 32, 32]


def draw(forks: Forks, folder: Path, *contestants: dict[str, Any]) -> None:
    values = {"contestants": list(contestants), "prompts": [PROMPT], "size": SIZE, "out": str(folder / "drawn")}
    (folder / "sample.yaml").write_text(json.dumps(values))
    forks.run("sample", str(folder / "sample.yaml")).ok()
    assert np.asarray(Image.open(folder / "drawn" / "contact_sheet.png").convert("RGB")).std() > 2


def test_a_chain_with_learned_variance(forks: Forks, latents: Path, tmp_path: Path) -> None:
    objective = {"name": "ddpm", "variance": "learned", "path": {"name": "vp", "schedule": "cosine", "steps": 50}, "times": "importance"}
    config = train_config(tmp_path / "run.yaml", latents, objective=objective, backbone__learned_variance=True)
    forks.run("train", str(config)).ok()
    assert np.isfinite([line["loss"] for line in metrics(tmp_path / "run")]).all()
    guidance = {"s": 2.0, "interval": [0.2, 0.9], "rescale": 0.5, "zero_star": True, "negative_prompt": "a small blue square"}
    sampling = {"sampler": "ancestral", "variance": "learned", "steps": 4, "schedule": {"name": "whole"}, "guidance": guidance}
    draw(forks, tmp_path, {"run": str(tmp_path / "run"), "sampling": sampling})


def test_a_preconditioned_network_its_student_and_a_weak_model(forks: Forks, latents: Path, tmp_path: Path) -> None:
    objective = {
        "name": "diffusion",
        "path": {"name": "edm"},
        "prediction": "edm",
        "weighting": {"name": "edm"},
        "times": {"name": "log_normal"},
        "stratified": True,
    }
    validation = {"source": str(latents), "samples": 4, "times": [0.1], "every_steps": 3}
    config = train_config(tmp_path / "teacher.yaml", latents, objective=objective, validation=validation)
    forks.run("train", str(config)).ok()
    teacher = tmp_path / "teacher"
    forks.run("distill", str(distill_config(tmp_path / "student.yaml", teacher))).ok()
    assert np.isfinite([line["loss"] for run in ("teacher", "student") for line in metrics(tmp_path / run)]).all()
    weak = {"s": 1.5, "weak": {"run": str(teacher), "step": 4}}
    sampling = {"sampler": "unipc", "steps": 4, "schedule": {"name": "karras"}, "guidance": weak}
    draw(forks, tmp_path, {"run": str(teacher), "sampling": sampling}, {"run": str(tmp_path / "student")})


def test_a_learned_schedule_is_trained_saved_and_sampled(forks: Forks, latents: Path, tmp_path: Path) -> None:
    objective = {"name": "variational", "path": {"name": "learned", "pieces": 4}}
    forks.run("train", str(train_config(tmp_path / "run.yaml", latents, objective=objective))).ok()
    weights = load_weights(tmp_path / "run", None, "model")
    assert weights["schedule.logits"].unique().numel() > 1
    assert weights["schedule.ends"].tolist() != [-13.3, 5.0]
    draw(forks, tmp_path, {"run": str(tmp_path / "run"), "sampling": {"sampler": "dpmpp_2m", "steps": 4}})
