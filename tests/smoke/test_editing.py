"""Edits as `dit sample` makes them, from files to files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from data_pipelines.video import examine, frames_at, write_mp4
from tests.processes import Done, Forks, train_config

PROMPTS = ["a large red disc moving right quickly near the top", "a small blue square moving down slowly near the left"]


def sample(forks: Forks, folder: Path, run: Path, edit: dict[str, Any], **changes: Any) -> Done:
    sampling = {"sampler": "heun", "steps": 2, "guidance": {"s": 2.0}} | changes
    values = {"contestants": [{"run": str(run), "sampling": sampling}], "prompts": PROMPTS, "size": [9, 32, 32], "edit": edit}
    (folder / "sample.yaml").write_text(yaml.safe_dump(values | {"out": str(folder / "out"), "batch_size": 1}))
    return forks.run("sample", str(folder / "sample.yaml"))


def written(folder: Path) -> list[np.ndarray]:
    """The lossless videos of a `sample`."""
    videos = []
    for path in sorted((folder / "out").glob("*/*.lossless.mp4")):
        videos.append(np.stack(list(frames_at(path, "mp4", range(len(examine(path, "mp4").times))))))
    return videos


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)


@pytest.fixture
def given(tmp_path: Path, pixels: np.ndarray) -> str:
    write_mp4(tmp_path / "given.mp4", pixels, 8, lossless=True)
    return str(tmp_path / "given.mp4")


@pytest.fixture(scope="module")
def masked_teacher(forks: Forks, tmp_path_factory: pytest.TempPathFactory, latents: Path) -> Path:
    """A run directory of one step with clean tokens."""
    config = train_config(
        tmp_path_factory.mktemp("masked") / "run.yaml", latents, train__samples=16, objective__clean_tokens={"fraction": 0.9}
    )
    forks.run("train", str(config)).ok()
    return config.with_suffix("")


@pytest.mark.parametrize("known_by", [{"name": "replacement", "repeats": 2, "jump": 1}, {"name": "trained_masks"}])
def test_known_pixels_are_written_bit_for_bit(
    forks: Forks, tmp_path: Path, masked_teacher: Path, given: str, pixels: np.ndarray, known_by: dict[str, Any]
) -> None:
    sample(forks, tmp_path, masked_teacher, {"name": "inpaint", "input": given, "region": "right", "known_by": known_by}).ok()
    one, two = written(tmp_path)
    for video in (one, two):
        assert np.array_equal(video[:, :, :16], pixels[:, :, :16])
        assert (video[:, :, 16:] != pixels[:, :, 16:]).mean() > 0.9
    assert (one[:, :, 16:] != two[:, :, 16:]).any()
    assert (tmp_path / "out" / "contact_sheet.png").is_file()


def test_a_video_is_extended(forks: Forks, tmp_path: Path, masked_teacher: Path, given: str, pixels: np.ndarray) -> None:
    edit = {"name": "extend", "input": given, "keep": 5, "windows": 2, "known_by": {"name": "trained_masks"}}
    sample(forks, tmp_path, masked_teacher, edit).ok()
    for video in written(tmp_path):
        assert len(video) == 9 + 2 * 4
        assert np.array_equal(video[:9], pixels)


def test_a_weak_sdedit_and_an_inversion_lead_back(forks: Forks, tmp_path: Path, teacher: Path, given: str) -> None:
    """The teacher of a few steps hardly moves anything, so both are near what the codec makes of the input."""
    found = []
    for edit in ({"name": "sdedit", "input": given, "strength": 0.001}, {"name": "invert", "input": given, "solver": "rk4"}):
        sample(forks, tmp_path, teacher, edit, steps=12, guidance={"s": 1.0}).ok()
        found.append(written(tmp_path)[0].astype(float))
    assert np.abs(found[0] - found[1]).mean() < 8


def test_what_a_run_cannot_do_is_said_before_any_work(forks: Forks, tmp_path: Path, teacher: Path, given: str) -> None:
    def refused(done: Done, *parts: str) -> None:
        assert done.code == 2
        assert "Traceback" not in done.err
        assert [part for part in parts if part not in done.err] == []
        assert not (tmp_path / "out").exists()

    told = {"name": "inpaint", "input": given, "region": "left", "known_by": {"name": "trained_masks"}}
    refused(sample(forks, tmp_path, teacher, told), "edit.known_by=trained_masks", str(teacher), "objective.clean_tokens", "replacement")
    refused(sample(forks, tmp_path, teacher, {"name": "invert", "input": given}, sampler="ancestral"), "edit.name=invert", "ancestral")
    refused(sample(forks, tmp_path, teacher, {"name": "inpaint", "input": given}), "exactly one of mask and region")
    refused(sample(forks, tmp_path, teacher, {"name": "frames"}), "give first, last, or both")
