"""`dit ckpt`: what it lists, finds, deletes and writes for others."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dit.config import SampleRun
from dit.engine import durable
from dit.engine.checkpoint import load_weights
from tests.processes import Forks, train_config


@pytest.fixture(scope="module")
def trained(forks: Forks, tmp_path_factory: pytest.TempPathFactory, latents: Path) -> Path:
    """Six steps by two ranks, three checkpoints, two widths of averages."""
    config = train_config(
        tmp_path_factory.mktemp("ckpt") / "run.yaml", latents, train__keep_checkpoints=3, ema={"decay": 0.9, "sigma_rel": [0.1, 0.2]}
    )
    forks.run("train", str(config), ranks=2).ok()
    return config.with_suffix("")


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def test_list_and_verify(forks: Forks, run: Path) -> None:
    listed = forks.run("ckpt", "ls", str(run)).ok().out.splitlines()
    assert [line.split("  ")[0] for line in listed] == ["step 6", "step 4", "step 2"]
    assert listed[0].endswith("96 samples, 2 ranks, ZeRO stage 1")
    os.truncate(durable.step_folder(run / "checkpoints", 4) / "rank-00001-of-00002.safetensors", 100)
    said = forks.run("ckpt", "verify", str(run)).ok().out
    assert "step 6: valid\nstep 4: DAMAGED\n" in said
    assert "rank-00001-of-00002.safetensors: 100 bytes, its manifest says" in said
    for step in (2, 6):
        (durable.step_folder(run / "checkpoints", step) / "state.json").unlink()
    assert forks.run("ckpt", "verify", str(run)).code == 4
    assert forks.run("ckpt", "prune", str(run), "--keep", "1").code == 4
    assert durable.published(run / "checkpoints") == [6, 4, 2]


def test_prune_keeps_the_newest_valid(forks: Forks, run: Path) -> None:
    for step in (4, 6):
        (durable.step_folder(run / "checkpoints", step) / "state.json").unlink()
    forks.run("ckpt", "prune", str(run), "--keep", "1").ok()
    assert durable.published(run / "checkpoints") == [6, 2]
    refused = forks.run("ckpt", "prune", str(run), "--keep", "0")
    assert (refused.code, "expected at least 1" in refused.err) == (2, True)


def test_prune_leaves_a_run_alone_that_is_being_written(forks: Forks, run: Path) -> None:
    (run / ".lock").write_text("a test")
    with (run / ".lock").open() as lock:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = forks.run("ckpt", "prune", str(run), "--keep", "1")
    assert (refused.code, "is being written by a test" in refused.err) == (2, True)
    assert durable.published(run / "checkpoints") == [6, 4, 2]


def test_export(forks: Forks, run: Path, tmp_path: Path) -> None:
    forks.run("ckpt", "export", str(run), "--out", str(tmp_path / "plain"), "--step", "4", "--weights", "model").ok()
    ours, plain = load_weights(run, 4, "model"), load_file(tmp_path / "plain/model.safetensors")
    assert plain.keys() == ours.keys()
    assert all(torch.equal(plain[name], ours[name]) for name in ours)
    forks.run("ckpt", "export", str(run), "--out", str(tmp_path / "wan"), "--format", "diffusers").ok()
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.WanTransformer3DModel.from_config(diffusers.WanTransformer3DModel.load_config(str(tmp_path / "wan")))
    model.load_state_dict(load_file(tmp_path / "wan/diffusion_pytorch_model.safetensors"))
    averages = load_weights(run, None, "ema")
    assert torch.equal(model.blocks[1].ffn.net[2].weight, averages["blocks.1.mlp.2.weight"])
    wan = ("ckpt", "export", str(run), "--out", str(tmp_path / "original"), "--format", "wan", "--dtype", "bfloat16")
    said = forks.run(*wan).ok().out
    assert "note: Wan's pipelines pad captions with zeros" in said
    assert "note: ComfyUI takes other sizes for granted and will not load it: head size 12, not 128" in said
    half = load_file(tmp_path / "original/diffusion_pytorch_model.safetensors")["blocks.1.ffn.2.weight"]
    assert torch.equal(half, averages["blocks.1.mlp.2.weight"].bfloat16())


@pytest.mark.parametrize("objective", [{"name": "ddpm"}, {"path": {"name": "edm"}, "prediction": "edm"}, {"prediction": "latents"}])
def test_what_answers_with_no_velocity_is_no_wan_transformer(
    forks: Forks, latents: Path, tmp_path: Path, objective: dict[str, object]
) -> None:
    config = train_config(tmp_path / "run.yaml", latents, objective=objective)
    forks.run("train", str(config), "train.samples=16").ok()
    for layout in ("diffusers", "wan"):
        done = forks.run("ckpt", "export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--format", layout)
        assert (done.code, "Traceback" in done.err) == (2, False)
        assert "Wan's transformers and pipelines know the velocity of rectified flow alone" in done.err
    assert not (tmp_path / "out").exists()
    forks.run("ckpt", "export", str(tmp_path / "run"), "--out", str(tmp_path / "out")).ok()


def test_only_weights_that_there_can_be_are_asked_for() -> None:
    values = {"contestants": [{"run": "x"}], "prompts": ["a"], "size": [1, 8, 8], "out": "y"}
    for weights in ("ema", "model", "sigma_rel=0.15"):
        assert SampleRun.model_validate(values | {"weights": weights}).weights == weights
    for weights in ("emma", "sigma_rel=15", "exp_avg", "sigma_rel=0.0", "sigma_rel=0.5"):
        with pytest.raises(ValueError, match="weights"):
            SampleRun.model_validate(values | {"weights": weights})


def test_a_width_that_no_profile_has_is_not_exported(forks: Forks, run: Path, tmp_path: Path) -> None:
    for weights in ("sigma_rel=abc", "sigma_rel=0.5"):
        done = forks.run("ckpt", "export", str(run), "--out", str(tmp_path), "--weights", weights)
        assert done.code == 2
        assert f"got {weights}, expected ema, model, or sigma_rel=S with 0 < S < 0.28" in done.err


def test_averages_of_any_width(run: Path) -> None:
    kept, built = load_weights(run, None, "sigma_rel=0.2"), load_weights(run, None, "sigma_rel=0.15")
    with pytest.raises(ValueError, match=r"has no weights of kind 'ema_0.3'; it has model, ema, ema_0.1, ema_0.2, exp_avg"):
        load_weights(run, None, "ema_0.3")
    other = load_weights(run, None, "sigma_rel=0.1")
    name = "patch_embedder.weight"
    assert torch.equal(kept[name], load_weights(run, None, "ema_0.2")[name])
    ends = float((kept[name] - other[name]).norm())
    assert 0 < float((built[name] - kept[name]).norm()) < ends  # between the two it is made of
    assert 0 < float((built[name] - other[name]).norm()) < ends
