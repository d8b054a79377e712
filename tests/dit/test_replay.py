"""`dit replay`: the same samples, losses and gradient again, in one process, of a run of two."""

import json
import shutil
from pathlib import Path

import pytest

from tests.processes import Forks, metrics, train_config


def test_a_step_that_was_taken(forks: Forks, tmp_path: Path, latents: Path) -> None:
    config = train_config(tmp_path / "run.yaml", latents, engine={"zero_stage": 3, "whole_below": 100})
    forks.run("train", str(config), ranks=2).ok()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    said = forks.run("replay", str(tmp_path / "run"), "4").ok().out  # from the checkpoint of step 2, by way of step 3
    losses = [float(line.split("  loss ")[1]) for line in said.splitlines() if "  loss " in line]
    line = metrics(tmp_path / "run")[3]
    assert len(losses) == 16
    assert sum(losses) / 16 == pytest.approx(line["loss"], rel=1e-5)
    assert float(said.split("gradient norm ")[1].split(",")[0]) == pytest.approx(line["grad_norm"], rel=1e-5)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_step_that_stopped_the_run(forks: Forks, tmp_path: Path, latents: Path) -> None:
    """A learning rate that no weight survives: the next loss is no number, and what was written down comes out again."""
    optimizer = {"lr": 1e25, "warmup_samples": 0}
    config = train_config(tmp_path / "run.yaml", latents, optimizer=optimizer, guard={"on_nonfinite": "stop"}, train__save_every_steps=1)
    done = forks.run("train", str(config), ranks=2)
    assert done.code == 93
    assert "Traceback" not in done.err
    step = len(metrics(tmp_path / "run"))
    assert f"dit replay {tmp_path}/run {step}" in done.err
    record = json.loads((tmp_path / "run" / "bad_steps" / f"step-{step:08d}.json").read_text())
    assert "is not finite" in record["reason"] or "are not finite" in record["reason"]
    said = forks.run("replay", str(tmp_path / "run"), str(step)).ok().out
    for rank in record["ranks"]:
        for sample in rank["samples"]:
            line = next(line for line in said.splitlines() if line.startswith(f"{sample['id']}  "))
            assert f"t {sample['t']:.6f}" in line
            assert line.endswith(f"recorded {sample['loss']}")
    assert record["reason"] in said


def test_a_step_that_was_undone_is_replayed_with_its_own_data(forks: Forks, tmp_path: Path, latents: Path) -> None:
    """Every gradient a little above the median is a spike, so the run returns, goes on with other data, and saves the same step again."""
    guard = {"on_spike": "rollback", "spike_deviations": 0.1, "window": 8, "max_bad_steps": 100}
    config = train_config(
        tmp_path / "run.yaml", latents, guard=guard, train__save_every_steps=1, train__keep_checkpoints=20, train__samples=144
    )
    forks.run("train", str(config), ranks=2).ok()
    undone = [json.loads(path.read_text()) for path in (tmp_path / "run" / "bad_steps").iterdir()]
    assert len(undone) > 1
    for record in undone:
        said = forks.run("replay", str(tmp_path / "run"), str(record["step"])).ok().out
        recorded = {sample["id"]: sample["loss"] for rank in record["ranks"] for sample in rank["samples"]}
        again = {line.split()[0]: float(line.split("loss ")[1].split()[0]) for line in said.splitlines() if "  recorded " in line}
        assert again == pytest.approx(recorded, rel=1e-4)
        assert float(said.split("gradient norm ")[1].split(",")[0]) == pytest.approx(record["grad_norm"], rel=1e-4)
    for folder in (tmp_path / "run" / "checkpoints").glob("step-*"):
        shutil.rmtree(folder)
    done = forks.run("replay", str(tmp_path / "run"), str(max(record["step"] for record in undone)))
    assert (done.code, "Traceback" in done.err) == (2, False)
    assert "its samples are not those that were written down" in done.err
    assert "the run returned to a checkpoint that is gone" in done.err
    taken = max(set(range(1, 10)) - {record["step"] for record in undone})
    assert f"these may not be the samples of step {taken}" in forks.run("replay", str(tmp_path / "run"), str(taken)).ok().err


def test_no_such_step(forks: Forks, teacher: Path) -> None:
    done = forks.run("replay", str(teacher), "0")
    assert (done.code, "Traceback" in done.err) == (2, False)
    assert "STEP=0" in done.err
