"""Reference clips: a fixed order, nothing lost silently, shapes as lawful as the renderer's."""

import logging
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines import moving_shapes as ms
from data_pipelines.errors import UserError
from dit.config.evaluation import ShapesClips, StoredClips
from dit.evaluation.clips import Clip, clips_of, shape_captions, splits_of
from dit.evaluation.moving_shapes import check_batch, relative_starts


def videos_of(clips: list[Clip]) -> np.ndarray:
    return torch.stack([clip.video for clip in clips]).numpy()


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_shapes_obey_their_captions_and_start_anew_each_time(split: ms.Split) -> None:
    clips = list(islice(clips_of(ShapesClips(), split, 4, 3, 7), 24))
    assert splits_of(ShapesClips()) == ("train", "held_out")
    captions = [clip.caption for clip in clips]
    assert captions[:12] == captions[12:] == [caption for caption in shape_captions(split, 4, 7) for _ in range(3)]
    attributes = [ms.parse(caption) for caption in captions]
    assert all(verdict.all for verdict in check_batch(videos_of(clips), attributes))
    starts = relative_starts(videos_of(clips), attributes)
    assert len({tuple(start) for start in starts.round(3)}) == 24
    assert starts.min() > -0.05
    assert starts.max() < 1.05
    assert {ms.split_of(a) for a in attributes} == {split}


def test_shards_come_in_one_order_whole(clips: Path) -> None:
    config = StoredClips(name="shards", path=str(clips), size=(9, 32, 32))
    first, again, other = (list(clips_of(config, "all", 0, 1, seed)) for seed in (1, 1, 2))
    assert splits_of(config) == ("all",)
    assert len(first) == 48
    assert [clip.caption for clip in first] == [clip.caption for clip in again] != [clip.caption for clip in other]
    assert sorted(clip.caption for clip in first) == sorted(clip.caption for clip in other)
    np.testing.assert_array_equal(videos_of(first), videos_of(again))
    assert np.mean([v.all for v in check_batch(videos_of(first), [ms.parse(clip.caption) for clip in first])]) > 0.9  # as MP4 stored them


def test_a_folder_gives_captions_labels_and_reports_what_it_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB", (20 + number, 16), (100 * label, 50 * number, 7)).save(tmp_path / name / f"{number}.png")
    (tmp_path / "dog" / "1.txt").write_text("a dog\n")
    (tmp_path / "cat" / "broken.png").write_bytes(b"no picture")
    with caplog.at_level(logging.WARNING):
        clips = list(clips_of(StoredClips(name="folder", path=str(tmp_path), size=(1, 8, 8)), "all", 0, 1, 1))
    assert sorted((clip.caption, clip.label) for clip in clips) == [("a dog", 1), *[("cat", 0)] * 3, ("dog", 1), ("dog", 1)]
    assert {tuple(clip.video.shape) for clip in clips} == {(1, 8, 8, 3)}
    assert {clip.video[0, 0, 0, 0].item() for clip in clips if clip.label} == {100}
    assert "left out cat/broken.png (not a JPEG, PNG, WEBP image), 1 so far" in caplog.text


def test_sources_that_cannot_serve_are_refused(tmp_path: Path, latents: Path) -> None:
    for name, path, words in (
        ("folder", tmp_path / "none", "no such folder"),
        ("shards", tmp_path / "none", "no such folder"),
        ("shards", latents, "cached latents"),
    ):
        with pytest.raises(UserError, match=words):
            next(clips_of(StoredClips(name=name, path=str(path), size=(9, 32, 32)), "all", 0, 1, 1))
