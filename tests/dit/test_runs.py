"""What a run directory needs of the machine, and says where that is lacking."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data_pipelines.config_file import load_run, save_resolved
from data_pipelines.errors import UserError
from dit.config import TrainRun
from dit.runs import Encoders, TrainedRun, make_folder, open_for_writing
from tests.processes import Forks, metrics, train_config

NOBODY = 65534


@pytest.fixture
def weak(tmp_path: Path) -> Iterator[None]:  # which pytest must have made before
    """Without the rights of root, where the tests run as root: permissions are judged for the real user."""
    if os.getuid() != 0:
        yield
        return
    os.setresuid(NOBODY, 0, 0)
    yield
    os.setresuid(0, 0, 0)


def test_a_folder_without_permission_is_refused(weak: None, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir(mode=0o500)
    with pytest.raises(UserError, match=rf"out={tmp_path}/own: no permission to write there; give another `out`"):
        make_folder(str(tmp_path / "own"), "out")


def test_where_there_is_no_git_a_run_says_nothing_of_a_commit(latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run(TrainRun, str(train_config(tmp_path / "run.yaml", latents)))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    folder = open_for_writing(run, run, "48 clips", Encoders.load(run.encoders, torch.device("cpu")))
    assert json.loads((folder / "env.json").read_text())["commit"] is None


def test_a_run_that_was_ended_behind_its_last_save_is_done(forks: Forks, latents: Path, tmp_path: Path) -> None:
    config, status = train_config(tmp_path / "run.yaml", latents), tmp_path / "run" / "status.json"
    forks.run("train", str(config)).ok()
    done, lines = json.loads(status.read_text()), metrics(tmp_path / "run")
    assert (done["state"], done["step"], done["samples_seen"]) == ("done", 6, 96)
    status.write_text('{"state": "running", "step": 6}')
    assert "is finished: 96 of 96 samples" in forks.run("train", str(config), ranks=2).ok().err
    assert json.loads(status.read_text()) == {"state": "done", "step": 6, "samples_seen": 96}
    assert metrics(tmp_path / "run") == lines
    said = status.read_bytes()
    forks.run("train", str(config)).ok()
    assert status.read_bytes() == said


def test_other_encoders_than_those_of_the_training_are_refused(teacher: Path, forks: Forks, latents: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(teacher, run)
    record = json.loads((run / "encoders.json").read_text())
    assert record == TrainedRun.open(str(run), "run").encoders().fingerprints()
    record["text"]["weights"] = "of another day"
    (run / "encoders.json").write_text(json.dumps(record))
    said = f"{run} was trained with another encoder: text.weights was of another day and is "
    with pytest.raises(UserError, match=re.escape(said)):
        TrainedRun.open(str(run), "run").encoders()
    resumed = forks.run("train", str(train_config(tmp_path / "more.yaml", latents, out=str(run))), "train.samples=128")
    assert (resumed.code, said in resumed.err, "Traceback" in resumed.err) == (2, True, False)
    (run / "encoders.json").unlink()  # as an earlier release left it
    forks.run("train", str(train_config(tmp_path / "more.yaml", latents, out=str(run))), "train.samples=128").ok()
    assert (run / "encoders.json").read_bytes() == (teacher / "encoders.json").read_bytes()


def test_a_config_that_could_not_be_written_is_what_it_was(tmp_path: Path, latents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run(TrainRun, str(train_config(tmp_path / "run.yaml", latents)))
    save_resolved(run, tmp_path / "resolved.yaml")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_resolved(run.model_copy(update={"out": "elsewhere"}), tmp_path / "resolved.yaml")
    assert load_run(TrainRun, str(tmp_path / "resolved.yaml")) == run
