"""Runs that begin with weights that there are: of another run, of a Wan transformer of diffusers."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipelines.config_file import load_run
from dit.config import InitConfig, TrainRun
from dit.engine import durable
from dit.engine.checkpoint import load_weights
from tests.processes import Forks, distill_config, metrics, train_config


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_begins_with_the_averages_of_another_and_needs_it_no_more(forks: Forks, teacher: Path, latents: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(teacher, source)
    ema = {"decay": 0.9, "sigma_rel": [0.05, 0.1]}
    config = train_config(tmp_path / "run.yaml", latents, init={"run": str(source)}, ema=ema, train__keep_every_steps=6)
    run = tmp_path / "run"
    forks.run("train", str(config), "train.samples=0", "data.token_budget=384", ranks=2).ok()
    assert durable.published(run / "checkpoints") == [0]
    assert load_run(TrainRun, str(run / "config.resolved.yaml")).init == InitConfig(run=str(source), step=6)
    averages = load_weights(teacher, None, "ema")
    assert same(load_weights(run, 0, "model"), averages)
    assert same(load_weights(run, 0, "ema"), averages)
    assert same(load_weights(run, 0, "sigma_rel=0.07"), averages)
    done = forks.run("replay", str(run), "1")
    assert (done.code, "Traceback" in done.err) == (2, False)
    assert not any(float(moment.abs().max()) for moment in load_weights(run, 0, "exp_avg").values())
    shutil.rmtree(source)
    forks.run("train", str(config), ranks=2).ok()  # goes on from step 0; with other packs, for it has seen none
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert metrics(run)[0]["loss"] < metrics(teacher)[0]["loss"], "the same samples, noise and levels"
    assert durable.published(run / "checkpoints") == [6, 4, 0]
    assert load_weights(run, 6, "sigma_rel=0.07").keys() == averages.keys()


def test_a_public_transformer_becomes_a_run_a_teacher_and_the_same_file_again(
    forks: Forks, teacher: Path, latents: Path, tmp_path: Path
) -> None:
    public = tmp_path / "public"
    forks.run("ckpt", "export", str(teacher), "--out", str(public), "--format", "diffusers").ok()
    tensors = load_file(public / "diffusion_pytorch_model.safetensors")
    names = sorted(tensors)  # in two files and an index, as large ones are
    (public / "diffusion_pytorch_model.safetensors").unlink()
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, public / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (public / "diffusion_pytorch_model.safetensors.index.json").write_text(str(index).replace("'", '"'))

    zero3 = {"zero_stage": 3, "whole_below": 100}
    config = train_config(tmp_path / "run.yaml", latents, init={"diffusers": str(public)}, engine=zero3, train__samples=0)
    forks.run("train", str(config), ranks=2).ok()
    assert same(load_weights(tmp_path / "run", None, "ema"), load_weights(teacher, None, "ema"))
    forks.run("ckpt", "export", str(tmp_path / "run"), "--out", str(tmp_path / "again"), "--format", "diffusers").ok()
    assert same(load_file(tmp_path / "again" / "diffusion_pytorch_model.safetensors"), tensors)
    distil = ("distill", str(distill_config(tmp_path / "student.yaml", tmp_path / "run")))
    forks.run(*distil, "train.samples=16").ok()
    forks.run(*distil, "train.samples=32").ok()
    moments = {"name": "moment_matching", "guidance": {"s": 1.0}, "student_steps": 2}
    done = forks.run("distill", str(distill_config(tmp_path / "moments.yaml", tmp_path / "run", method=moments)))
    assert (done.code, "Traceback" in done.err) == (2, False)
    assert "has taken no step" in done.err

    done = forks.run("train", str(config), f"out={tmp_path}/vp", "objective={path: {name: vp}, prediction: v}")
    assert (done.code, "Traceback" in done.err) == (2, False)
    assert "know the velocity of rectified flow alone" in done.err
    done = forks.run("train", str(config), f"out={tmp_path}/deep", "backbone.depth=3")
    assert (done.code, "Traceback" in done.err) == (2, False)
    assert f"init.diffusers={public} does not fit this run's backbone:\n  depth: 2 there, 3 here" in done.err
    (public / "b.safetensors").write_bytes(b"torn")
    done = forks.run("train", str(config), f"out={tmp_path}/torn")
    assert (done.code, "Traceback" in done.err) == (2, False)
    assert f"init.diffusers={public}: expected the folder of a WanTransformer3DModel" in done.err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backbone__hidden_size": 64}, "blocks.0.cross_attention.k.bias: (48,) there, (64,) here\n"),
        ({"backbone__num_classes": 10}, "label_embedder"),
        ({"init": {"run": "/no/such/run"}}, "init.run=/no/such/run is not a run directory"),
    ],
)
def test_weights_of_another_network_are_refused(
    forks: Forks, teacher: Path, latents: Path, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    done = forks.run("train", str(train_config(tmp_path / "run.yaml", latents, **{"init": {"run": str(teacher)}, **changes})))
    assert (done.code, "Traceback" in done.err) == (2, False)
    assert words in done.err


def test_a_step_is_replayed_from_the_weights_of_the_beginning(forks: Forks, teacher: Path, latents: Path, tmp_path: Path) -> None:
    config, run = train_config(tmp_path / "run.yaml", latents, init={"run": str(teacher)}), tmp_path / "run"
    forks.run("train", str(config)).ok()
    assert 0 not in durable.published(run / "checkpoints"), "it was not among the newest two"
    said = forks.run("replay", str(run), "2").ok().out
    assert float(said.split("gradient norm ")[1].split(",")[0]) == pytest.approx(metrics(run)[1]["grad_norm"], rel=1e-4)
