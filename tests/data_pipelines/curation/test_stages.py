"""Stages against pictures whose scores are known, and the whole of curation on a video with cuts, stills, black and repeats."""

import json

import av
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.__main__ import main
from data_pipelines.curation import pictures
from data_pipelines.curation.candidates import Candidate, Look, _clips, _ticks, cut, looked_at, scored
from data_pipelines.curation.config import Bounds, IngestConfig, Scenes
from data_pipelines.curation.motion import motion
from data_pipelines.curation.scenes import find_scenes
from data_pipelines.raw_files import Place, RawFile
from data_pipelines.samples import BadSample
from data_pipelines.sources import read_source
from data_pipelines.video import VideoFacts, encode_mp4, examine, frames_at, write_mp4

RANDOM = np.random.default_rng(0)
CLIP = Candidate("a", RawFile("a.mp4", Place("a.mp4")), tuple(range(9)), fps=10.0)


def look(*frames):
    return Look(tuple(np.asarray(frame, np.uint8) for frame in frames), tuple(range(len(frames))))


def texture(height, width, scale=8):
    """Smooth random colours: what optical flow can follow."""
    small = RANDOM.integers(0, 256, (height // scale, width // scale, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def scene(frames, height=64, width=96, step=0):
    """A textured picture that moves `step` pixels a frame to the left."""
    wide = texture(height, width + frames * step + 8)
    return np.stack([wide[:, i * step : i * step + width] for i in range(frames)])


def flat(value, frames=1, height=64, width=96):
    return np.full((frames, height, width, 3), value, np.uint8)


def test_brightness_and_contrast_are_those_of_the_worst_frame():
    grey, half = flat(128)[0], flat(0)[0].copy()
    half[:, :48] = 255
    assert pictures.brightness(CLIP, look(grey, half, flat(51)[0])) == pytest.approx(0.2)
    assert pictures.contrast(CLIP, look(half)) == pytest.approx(0.5)
    assert pictures.contrast(CLIP, look(half, grey)) == pytest.approx(0, abs=1e-6)
    red, green, blue = (np.eye(3, dtype=np.uint8)[i] * 255 * np.ones((8, 8, 1), np.uint8) for i in range(3))
    assert [pictures.brightness(CLIP, look(c)) for c in (red, green, blue)] == pytest.approx([0.299, 0.587, 0.114], abs=1e-4)


def test_change_and_repeats_look_at_neighbours_only():
    a, b = flat(0)[0], flat(51)[0]
    assert pictures.change(CLIP, look(a, b, b)) == pytest.approx(0.1)
    assert pictures.repeats(CLIP, look(a, b, b)) == pytest.approx(0.5)
    apart = Look((a, b, b, a), (0, 1, 7, 8))  # between the second and the third there is a gap
    assert pictures.change(CLIP, apart) == pytest.approx(0.2)
    assert pictures.change(CLIP, look(a)) is None
    assert pictures.repeats(CLIP, look(a)) is None
    dot = a.copy()
    dot[30:36, 30:36] = 40  # moves alone in a still picture: the mean hardly changes, yet this is no repeat
    assert pictures.repeats(CLIP, look(a, dot)) == 0


@pytest.mark.parametrize(("height", "width"), [(128, 192), (256, 192)])
@pytest.mark.parametrize("step", [1, 4])
def test_motion_is_the_known_shift_in_shorter_sides_a_second(height, width, step):
    pytest.importorskip("cv2", exc_type=ImportError)
    frames = scene(3, height, width, step)
    expected = step / min(height, width) * 10.0
    # The edge that comes in is not followed; and flow is no better than a fifth of a pixel of the picture that it is computed on.
    assert motion(CLIP, look(*frames)) == pytest.approx(expected, rel=0.15, abs=0.2 / 128 * 10)
    assert motion(CLIP, look(frames[0], frames[0])) == pytest.approx(0, abs=1e-3)
    assert motion(CLIP, look(frames[0])) is None


def test_text_area_finds_the_text_and_only_it():
    pytest.importorskip("rapidocr", exc_type=ImportError)
    from data_pipelines.curation.text_area import TextArea

    page = Image.new("RGB", (320, 180), "navy")
    ImageDraw.Draw(page).text((20, 70), "BREAKING NEWS", fill="white", font=ImageFont.load_default(36))
    box = ImageDraw.Draw(page).textbbox((20, 70), "BREAKING NEWS", font=ImageFont.load_default(36))
    true = (box[2] - box[0]) * (box[3] - box[1]) / (320 * 180)
    area = TextArea()
    assert true < area(CLIP, look(page)) < 2.5 * true  # the detector draws boxes with a margin
    assert area(CLIP, look(flat(90, 1, 180, 320)[0])) == 0


@pytest.mark.parametrize("detector", ["content", "adaptive"])
def test_scenes_begin_where_the_picture_changes(detector):
    pytest.importorskip("scenedetect", exc_type=ImportError)
    video = np.concatenate([scene(20, step=1), 255 - scene(15, step=1) // 2, scene(25, step=1) // 3])
    data = encode_mp4(video, 10.0, "archive")
    facts = examine(data, "mp4")
    assert find_scenes(data, "mp4", facts, Scenes(detector=detector)) == ([(0, 20), (20, 35), (35, 60)], None)
    with_margin, _ = find_scenes(data, "mp4", facts, Scenes(detector=detector, margin_frames=2))
    assert with_margin == [(0, 18), (22, 33), (37, 60)]
    joined, _ = find_scenes(data, "mp4", facts, Scenes(detector=detector, min_seconds=1.8))
    assert (20, 35) not in joined
    assert find_scenes(data, "mp4", facts, Scenes(detector=detector, threshold=200))[0] == [(0, 60)]


def test_the_cuts_of_a_real_video_are_where_the_eye_sees_them(shared_data):
    """A cross-fade that begins at frame 127 and a hard cut between 201 and 202."""
    pytest.importorskip("scenedetect", exc_type=ImportError)
    path = shared_data / "videos" / "nasa_13013.mp4"
    (_, fade), (_, cut), (_, end) = find_scenes(path, "mp4", examine(path, "mp4"), Scenes())[0]
    assert 127 <= fade <= 132
    assert (cut, end) == (202, 325)


def clips_of(tmp_path, frames, **config):
    write_mp4(tmp_path / "a.mp4", scene(frames, step=1), 10, lossless=True)
    whole = Candidate("a", RawFile("a.mp4", Place(str(tmp_path / "a.mp4"))))
    return list(cut(whole, IngestConfig(**config)))


def test_a_scene_is_cut_into_the_longest_clips_first(tmp_path):
    clips = clips_of(tmp_path, 31, clip_frames=[5, 13])
    assert [len(clip.indices) for clip in clips] == [13, 13, 5]
    assert [i for clip in clips for i in clip.indices] == list(range(31))
    assert [clip.span for clip in clips] == [(0.0, 1.3), (1.3, 2.6), (2.6, 3.1)]
    spread = clips_of(tmp_path, 30, clip_frames=[5], clips_per_scene=2)
    assert [clip.indices[0] for clip in spread] == [5, 20]
    (short,) = clips_of(tmp_path, 4, clip_frames=[5])
    assert short.dropped == "video shorter than the 5 frames of a clip"


@pytest.mark.parametrize("clips", range(1, 13))
def test_the_clips_of_a_scene_are_different_and_evenly_spread(clips):
    for wanted in range(1, clips + 1):
        found = _clips(np.arange(clips), IngestConfig(clip_frames=(1,), clips_per_scene=wanted))
        firsts = [int(clip[0]) for clip in found]
        assert len(set(firsts)) == wanted
        assert firsts == sorted(firsts)
        gaps = np.diff([-1 - firsts[0], *firsts, 2 * clips - 1 - firsts[-1]])  # both ends mirrored
        assert gaps.max() - gaps.min() <= 2


def test_a_cut_nearer_to_the_end_than_its_margin_costs_only_that_scene(tmp_path):
    pytest.importorskip("scenedetect", exc_type=ImportError)
    video = np.concatenate([scene(20, step=1), 255 - scene(2, step=1) // 2])
    write_mp4(tmp_path / "a.mp4", video, 10, lossless=True)
    whole = Candidate("a", RawFile("a.mp4", Place(str(tmp_path / "a.mp4"))))
    first, last = cut(whole, IngestConfig(clip_frames=(9,), scenes=Scenes(min_seconds=0.1, margin_frames=5)))
    assert first.indices == tuple(range(9))
    assert (last.scene, last.dropped) == (1, "scene shorter than the 9 frames of a clip")


def test_a_wild_time_stamp_is_a_bad_sample():
    facts = VideoFacts(8, 8, 10.0, (0.0, 0.1, 1e8))
    with pytest.raises(BadSample, match="ends at 100000000 s"):
        _ticks(facts, 25.0)
    assert _ticks(facts, None).tolist() == [0, 1, 2]


def test_a_picture_that_a_stage_cannot_take_is_dropped_with_its_reason():
    def score(candidate, look):
        raise BadSample("too narrow")

    (found,) = scored([Candidate("a", RawFile("a.png", Place("a.png")), look=look(flat(1)[0]))], "x", Bounds(), score)
    assert found.dropped == "too narrow"


def test_every_clip_sees_its_own_frames(tmp_path):
    clips = list(looked_at(clips_of(tmp_path, 60, clip_frames=[30])))
    every = list(frames_at(tmp_path / "a.mp4", "mp4", range(60)))
    for clip in clips:
        assert len(clip.look.frames) == 16
        assert len(clip.look.pairs) == 8
        for number, frame in zip(clip.look.numbers, clip.look.frames):
            np.testing.assert_array_equal(frame, every[clip.indices[number]])


@pytest.fixture
def film(tmp_path):
    """12 frames each: moving, black, still, moving at half the rate, moving again."""
    pytest.importorskip("scenedetect", exc_type=ImportError)
    pytest.importorskip("cv2", exc_type=ImportError)
    halved = scene(6, step=2).repeat(2, axis=0)
    parts = [scene(12, step=2), flat(0, 12), scene(12), 255 - halved // 2, scene(12, step=2) // 2]
    (tmp_path / "src").mkdir()
    write_mp4(tmp_path / "src" / "film.mp4", np.concatenate(parts), 12, lossless=True)
    return tmp_path / "src"


CONFIG = """
clip_frames: [9]
scenes: {}
stages:
  - {name: brightness, min: 0.02}
  - {name: change, min: 0.002}
  - {name: repeats, max: 0.3}
  - {name: motion, min: 0.05}
"""


def test_a_film_keeps_its_moving_scenes_and_says_why_not_the_others(tmp_path, film, capsys):
    (tmp_path / "c.yaml").write_text(CONFIG)
    arguments = ["ingest", str(film), str(tmp_path / "out"), "--config", str(tmp_path / "c.yaml")]
    assert main(arguments) == 0
    source = read_source(str(tmp_path / "out"))
    entries = [entry for shard in source.shards for entry in source.index(shard).entries]
    assert [(e.meta["scene"], e.meta["start"], e.meta["end"]) for e in entries] == [(0, 0.0, 0.75), (4, 4.0, 4.75)]
    # two pixels of 64 a frame, 12 frames a second
    assert [e.meta["motion"] for e in entries] == pytest.approx([2 / 64 * 12] * 2, rel=0.2)
    record = json.loads((tmp_path / "out" / "ingest.json").read_text())
    assert record["reasons"] == {"brightness below 0.02": 1, "change below 0.002": 1, "repeats above 0.3": 1}
    assert "1 x brightness below 0.02: film.mp4 1.00-1.75 s" in capsys.readouterr().out
    assert main([*arguments, "stages=[]"]) == 2  # another config into the same folder
    assert "stages: there" in capsys.readouterr().err


@pytest.mark.parametrize("scenes", ["null", "{}"])
def test_a_film_that_breaks_off_gives_what_can_be_read(tmp_path, scenes):
    pytest.importorskip("scenedetect", exc_type=ImportError)
    with av.open(str(tmp_path / "whole.mkv"), "w") as file:
        stream = file.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for frame in scene(40, step=2):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        file.mux(stream.encode(None))
    data = bytearray((tmp_path / "whole.mkv").read_bytes())
    middle = len(data) * 6 // 10
    data[middle : middle + 4000] = RANDOM.integers(0, 256, 4000, np.uint8).tobytes()
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "broken.mkv").write_bytes(data)
    arguments = ["ingest", str(tmp_path / "src"), str(tmp_path / "out"), f"scenes={scenes}", "stages=[{name: change}]"]
    assert main(arguments) == 0
    record = json.loads((tmp_path / "out" / "ingest.json").read_text())
    assert record["samples"] == 2  # frames 0 to 17; the damage begins in frame 24
    assert record["skipped"]
    assert all(what.startswith("broken.mkv") for what, _ in record["skipped"])
    assert main(["check", str(tmp_path / "out")]) == 0


def test_lineage_is_in_the_shard_itself(tmp_path, film):
    import webdataset

    (tmp_path / "c.yaml").write_text(CONFIG)
    assert main(["ingest", str(film), str(tmp_path / "out"), "--config", str(tmp_path / "c.yaml")]) == 0
    first = next(iter(webdataset.WebDataset(str(tmp_path / "out" / "shard-000000.tar"), shardshuffle=False)))
    lineage = json.loads(first["json"])
    assert (lineage["file"], lineage["start"], lineage["end"], lineage["frames"]) == ("film.mp4", 0.0, 0.75, list(range(9)))
    assert set(lineage["scores"]) == {"brightness", "change", "repeats", "motion"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stages: [{name: brightnes}]", "did you mean brightness"),
        ("stages: [{name: brightness, minimum: 1}]", "stages.0.minimum"),
        ("stages: [{name: change}, {name: change}]", "each may be given once"),
        ("clip_frames: [0]", "clip_frames.0"),
        ("stages: [{name: clip_score, model: nowhere}]", "no config.json"),
    ],
)
def test_a_wrong_config_is_explained_before_anything_is_written(tmp_path, film, capsys, text, said):
    (tmp_path / "c.yaml").write_text(text)
    assert main(["ingest", str(film), str(tmp_path / "out"), "--config", str(tmp_path / "c.yaml")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
