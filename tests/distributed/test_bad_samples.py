"""Samples that fail: the run with them is the same run in any number of processes and through a kill, and remembers them."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from data_pipelines.index import index_path, read_index
from tests.processes import Forks, metrics, train_config, wait_for

STEPS = 8


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, latents: Path) -> Path:
    """A copy of the latents with three damaged samples."""
    folder = tmp_path_factory.mktemp("damaged") / "latents"
    shutil.copytree(latents, folder)
    path = sorted(folder.glob("*.tar"))[0]
    data = bytearray(path.read_bytes())
    for entry in read_index(index_path(str(path))).entries[:3]:
        data[entry.members["latents.npy"].offset + 200] ^= 16
    path.write_bytes(data)
    return folder


def left_out(run: Path) -> list[str]:
    states = sorted((run / "checkpoints").glob("step-*/state.json"))
    return json.loads(states[-1].read_text())["position"]["left_out"]


def test_holes_are_the_same_in_any_shape_and_through_a_kill(forks: Forks, tmp_path: Path, damaged: Path) -> None:
    changes = {"train__samples": 16 * STEPS, "train__save_every_steps": 2, "data__max_bad_fraction": 0.5}
    whole, cut = (train_config(tmp_path / f"{name}.yaml", damaged, **changes) for name in ("whole", "cut"))
    shared = train_config(tmp_path / "shared.yaml", damaged, **changes, engine={"sequence_parallel": 2})
    forks.run("train", str(whole)).ok()
    process = forks.start("train", str(cut), ranks=2)
    wait_for(lambda: any((tmp_path / "cut" / "checkpoints").glob("step-*")) and len(metrics(tmp_path / "cut")) >= 3)
    process.send(signal.SIGKILL)
    wait_for(lambda: process.poll() == -signal.SIGKILL)
    forks.run("train", str(cut), ranks=2).ok()

    forks.run("train", str(shared), ranks=2).ok()

    expected = metrics(tmp_path / "whole")
    assert len(expected) == STEPS
    assert sum(line["bad"] for line in expected) >= 6  # 128 samples are 2.7 epochs of 48
    for name in ("cut", "shared"):
        found = metrics(tmp_path / name)
        for key in ("ids_hash", "bad"):
            assert [line[key] for line in found] == [line[key] for line in expected]
        assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
    names, *others = (
        [json.loads(line) for line in (tmp_path / name / "bad_samples.jsonl").read_text().splitlines()]
        for name in ("whole", "cut", "shared")
    )
    assert others == [names, names]
    first = {line["id"]: line["reason"] for line in reversed(names)}
    assert len(first) == 3
    assert all(reason.startswith("checksum mismatch") for reason in first.values())
    assert {line["reason"] for line in names[3:]} == {"on the skip list"}
    assert sorted(left_out(tmp_path / "cut")) == sorted(left_out(tmp_path / "whole")) == sorted(first)

    clean = train_config(tmp_path / "clean.yaml", damaged, data__skip_list=str(tmp_path / "whole" / "bad_samples.jsonl"))
    report = forks.run("plan", str(clean)).ok().out
    assert "45 samples an epoch" in report
    assert "left out: 3 x on the skip list" in report
    assert "the run is" in report
    forks.run("train", str(clean)).ok()
    assert sum(line["bad"] for line in metrics(tmp_path / "clean")) == 0


def test_what_one_rank_cannot_read_is_a_hole_for_all_of_its_pack(forks: Forks, tmp_path: Path, latents: Path, damaged: Path) -> None:
    for rank, folder in enumerate((latents, damaged)):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "latents").symlink_to(folder)
    forks.run("tests/dit/models/sequence_worker.py", str(tmp_path), "holes", ranks=2).ok()
