"""Published folders: every damage is found, and retention never deletes the newest that is valid."""

import os
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.errors import UserError
from dit.engine import durable
from dit.engine.checkpoint import newest_valid
from dit.engine.engine import Fragment
from dit.engine.saver import Saver

sys.path.insert(0, str(Path(__file__).parent))
from toy_regression import run_config


def write(root: Path, step: int) -> Path:
    staged = durable.stage(root, step)
    for name, size in (("rank-00000-of-00001.safetensors", 3000), ("state.json", 100)):
        (staged / name).write_bytes(random.Random(step).randbytes(size))
    return durable.publish(staged, root, step, [durable.seal(path) for path in sorted(staged.iterdir())])


def flip(path: Path, generator: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    path.write_bytes(data)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    folder, generator = write(tmp_path, 5), random.Random(0)
    assert durable.problems(folder) == []
    for path in sorted(folder.iterdir()):
        intact = path.read_bytes()
        for _ in range(50):
            flip(path, generator)
            assert len(durable.problems(folder)) >= 1
            path.write_bytes(intact)
    assert durable.problems(folder) == []


@pytest.mark.parametrize("name", ["rank-00000-of-00001.safetensors", "state.json", "manifest.json"])
def test_truncation_and_deletion_are_found_and_named(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, 5)
    size = (folder / name).stat().st_size
    for length in (0, 1, size // 2, size - 1):
        os.truncate(folder / name, length)
        assert name in durable.problems(folder)[0]
        shutil.rmtree(folder)
        write(tmp_path, 5)
    (folder / name).unlink()
    assert durable.problems(folder) == [f"{folder / name}: No such file or directory"]


def test_a_folder_under_another_name_is_not_valid(tmp_path: Path) -> None:
    assert "written for step 5" in durable.problems(write(tmp_path, 5).rename(tmp_path / "step-00000006"))[0]


def test_shares_together_find_what_one_reader_finds(tmp_path: Path) -> None:
    folder = write(tmp_path, 5)
    os.truncate(folder / "state.json", 3)
    found = [durable.problems(folder, share, 3) for share in range(3)]
    assert sorted(line for lines in found for line in lines) == durable.problems(folder)


def test_a_save_that_was_killed_is_not_there_and_is_swept(tmp_path: Path) -> None:
    write(tmp_path, 5)
    (durable.stage(tmp_path, 6) / "state.json").write_text("{")
    assert durable.published(tmp_path) == [5]
    write(tmp_path, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000005", "step-00000007"]


def test_a_folder_that_was_being_replaced_comes_back(tmp_path: Path) -> None:
    """Killed between the two renames: the old one is there, under another name."""
    write(tmp_path, 5).rename(tmp_path / ".replaced-step-00000005")
    durable.recover(tmp_path)
    assert durable.published(tmp_path) == [5]
    assert durable.problems(durable.step_folder(tmp_path, 5)) == []
    shutil.copytree(durable.step_folder(tmp_path, 5), tmp_path / ".replaced-step-00000005")  # killed behind them
    (durable.step_folder(tmp_path, 5) / "new").touch()
    durable.recover(tmp_path)
    assert (durable.step_folder(tmp_path, 5) / "new").exists()


def test_a_damaged_folder_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    os.truncate(write(tmp_path, 5) / "state.json", 3)
    assert durable.problems(write(tmp_path, 5)) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000005"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["save", "save", "damage", "delete"]), st.integers(0, 9)), max_size=12), st.integers(1, 3))
def test_retention_never_deletes_the_newest_valid(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[str, int]], keep: int
) -> None:
    root = tmp_path_factory.mktemp("retention")
    for event, number in events:
        there = durable.published(root)
        valid = [step for step in there if not durable.problems(durable.step_folder(root, step))]
        if event == "save":  # a run goes on from its newest valid checkpoint, so damaged ones may be ahead of it
            step = max(valid, default=0) + 1 + number % 3
            write(root, step)
            deleted = durable.retain(root, keep, newest_valid=step)
            assert durable.problems(durable.step_folder(root, step)) == []
            assert sorted({*there, step} - set(deleted), reverse=True) == durable.published(root)
            assert len(durable.published(root)) <= keep + 1
        elif there and event == "damage":
            os.truncate(durable.step_folder(root, there[number % len(there)]) / "state.json", 1)
        elif there:
            shutil.rmtree(durable.step_folder(root, there[number % len(there)]))


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    assert durable.retain(tmp_path, 2, newest_valid=4) == [2, 1]
    assert durable.published(tmp_path) == [4, 3]
    assert durable.retain(tmp_path, 1, newest_valid=3) == []


def test_multiples_are_kept(tmp_path: Path) -> None:
    for step in (2, 3, 4, 5, 6):
        write(tmp_path, step)
    assert durable.retain(tmp_path, 1, newest_valid=6, every=2) == [5, 3]
    assert durable.published(tmp_path) == [6, 4, 2]


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a checkpoint needs 931322574\.62 GiB, the disk has"):
        Saver(run_config(str(tmp_path)))._check_space(10**18, 1, UserError)


def test_room_for_all_checkpoints_that_will_be_kept_is_asked_for_at_the_start(tmp_path: Path) -> None:
    views = {"model": torch.zeros(1).expand(10**15)}
    engine: Any = SimpleNamespace(owned=lambda: iter([Fragment("weight", 0, 10**15, views)]))
    with pytest.raises(UserError, match=r"3 checkpoints need 11175870\.90 GiB, the disk has .* lower train\.keep_checkpoints"):
        Saver(run_config(str(tmp_path))).check_space(engine)
    for step in (1, 2, 3, 4):
        write(tmp_path / "checkpoints", step)
    with pytest.raises(UserError, match=r"a checkpoint needs 3725290\.30 GiB"):
        Saver(run_config(str(tmp_path))).check_space(engine)
    with pytest.raises(UserError, match=r"3 checkpoints need"):  # retention will delete none of the four
        Saver(run_config(str(tmp_path), train={"keep_every_steps": 1})).check_space(engine)


def test_another_format_is_refused_and_no_older_checkpoint_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an older release sees the folder of a newer one: it is intact, and what came after it must not be trained again."""
    write(tmp_path, 5)
    monkeypatch.setattr(durable, "FORMAT", durable.FORMAT + 1)
    newer = write(tmp_path, 6)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"step-00000006/manifest.json: a checkpoint of format 2, expected format 1.* another `out`"):
        newest_valid(tmp_path, 0, 1)
    (newer / "manifest.json").write_text((newer / "manifest.json").read_text().replace('"format": 2', '"format": 3'))
    assert newest_valid(tmp_path, 0, 1) == 5, "a damaged number is damage"


@pytest.mark.parametrize("name", ["../step-00000004/state.json", "/etc/passwd"])
def test_a_manifest_that_names_files_elsewhere_is_not_followed(tmp_path: Path, name: str) -> None:
    staged = durable.stage(tmp_path, 5)
    folder = durable.publish(staged, tmp_path, 5, [{"name": name, "length": 1, "xxh3_64": "0"}])
    assert durable.problems(folder) == [f"{folder / 'manifest.json'}: names files of other folders: {[name]}"]
