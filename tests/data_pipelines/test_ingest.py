"""The commands: what people have becomes shards; interrupted work goes on; every mistake is one clear line."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipelines import ingest as ingest_module
from data_pipelines import moving_shapes
from data_pipelines.__main__ import main
from data_pipelines.config import DataConfig
from data_pipelines.curation.candidates import Candidate
from data_pipelines.curation.config import IngestConfig
from data_pipelines.errors import UserError
from data_pipelines.histograms import _panel, histograms
from data_pipelines.index import index_path, read_index
from data_pipelines.loader import StepStream
from data_pipelines.plan import open_plan
from data_pipelines.raw_files import Place, RawFile
from data_pipelines.samples import Facts
from data_pipelines.shard_plan import ShardPlan, _write_file, write_shard
from data_pipelines.shards import ShardWriter, verify_shard
from data_pipelines.sources import read_source
from data_pipelines.video import frames_at, write_mp4
from data_pipelines.workers import WorkerLost


def run(*arguments):
    return main([str(argument) for argument in arguments])


def entries(folder):
    source = read_source(str(folder))
    return [entry for shard in source.shards for entry in source.index(shard).entries]


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.fixture
def photos(tmp_path):
    """Class folders: JPEG, PNG, a turned photograph, a WebP, a broken file, a name with dots, other files."""
    folder = tmp_path / "photos"
    picture = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    for name, count in {"tabby_cat": 4, "dog": 3}.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(picture).save(folder / name / f"{i}.jpg", quality=95)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(picture).save(folder / "dog" / "turned.jpg", exif=turned)
    Image.fromarray(picture).save(folder / "dog" / "a.b c.png")
    Image.fromarray(picture).save(folder / "dog" / "a_b c.webp")
    (folder / "dog" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (folder / "dog" / "notes.md").write_text("x")
    (folder / "dog" / ".DS_Store").write_text("x")
    return folder


def test_class_folders_become_labelled_captioned_shards(tmp_path, photos, capsys):
    out = tmp_path / "out"
    assert run("ingest", photos, out, "--shard-samples", 4) == 0
    found = {entry.key: entry for entry in entries(out)}
    assert len(found) == 10
    assert len(list(out.glob("*.tar"))) == 3
    assert {entry.meta["label"] for key, entry in found.items() if key.startswith("dog/")} == {0}
    assert {entry.meta["label"] for key, entry in found.items() if key.startswith("tabby_cat/")} == {1}
    assert {"dog/a_b_c", "dog/a_b_c--2"} < found.keys()
    assert "png" in found["dog/turned"].members
    assert found["dog/turned"].facts.height == 32
    samples = {s["__key__"]: s for path in out.glob("*.tar") for s in webdataset.WebDataset(str(path), shardshuffle=False)}
    assert samples["tabby_cat/0"]["jpg"] == (photos / "tabby_cat/0.jpg").read_bytes()  # stored as it was
    assert samples["tabby_cat/0"]["txt"] == b"a photo of a tabby cat"
    assert samples["tabby_cat/0"]["cls"] == b"1"
    record = json.loads((out / "ingest.json").read_text())
    assert record["samples"] == 10
    assert record["classes"] == ["dog", "tabby_cat"]
    assert record["ignored"] == {".md": 1, "hidden": 1}
    ((name, reason),) = record["skipped"]
    assert name == "dog/broken.jpg"
    assert record["reasons"] == {reason: 1}
    assert "10 samples in 3 shards" in capsys.readouterr().out
    assert all(verify_shard(path).intact for path in out.glob("*.tar"))


def test_ingest_resumes_and_ends_with_the_same_bytes(tmp_path, photos):
    assert run("ingest", photos, tmp_path / "a", "--shard-samples", 4) == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "shard-000001.tar.index.json").unlink()  # as if it had stopped between a tar and its index
    cut = tmp_path / "b" / "shard-000002.tar"
    cut.write_bytes(cut.read_bytes()[:1000])
    kept = (tmp_path / "b" / "shard-000000.tar").stat().st_mtime_ns
    assert run("ingest", photos, tmp_path / "b", "--shard-samples", 4) == 0
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    assert (tmp_path / "b" / "shard-000000.tar").stat().st_mtime_ns == kept
    assert run("ingest", photos, tmp_path / "b", "--shard-samples", 5) == 2  # other settings into the same folder


def test_examining_goes_on_where_it_was_cut_off(tmp_path, photos, monkeypatch):
    arguments = ("ingest", photos, tmp_path / "a", "--shard-samples", 4, "stages=[{name: contrast}]")
    assert run(*arguments) == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    later = [tmp_path / "b" / name for name in ("ingest.json", "plan/shards.json", "plan/samples.jsonl")]
    for path in (*(tmp_path / "b").glob("*.tar*"), *later):
        path.unlink()
    journal = tmp_path / "b" / "plan" / "examined.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 11
    journal.write_bytes(b"".join(lines[:4]) + lines[4][:50])  # killed while it wrote the fifth
    looked = []
    whole = ingest_module._whole
    monkeypatch.setattr(ingest_module, "_whole", lambda file, key: looked.append(file.name) or whole(file, key))
    assert run(*arguments[:2], tmp_path / "b", *arguments[3:]) == 0
    assert len(looked) == 7
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


class Interrupted(Exception):
    pass


def interrupted(monkeypatch, after, *arguments):
    """Run a command that ends while it examines the file after so many."""
    looked, whole = [], ingest_module._whole

    def look(file, key):
        if len(looked) == after:
            raise Interrupted
        looked.append(file.name)
        return whole(file, key)

    with monkeypatch.context() as patch:
        patch.setattr(ingest_module, "_whole", look)
        with pytest.raises(Interrupted):
            run(*arguments)


@pytest.mark.parametrize("changed", ["back", "gone"])
def test_files_that_came_or_went_between_two_starts_cost_no_other(tmp_path, photos, monkeypatch, changed):
    names = [f"dog/{number}.jpg" for number in range(3)] + [f"tabby_cat/{number}.jpg" for number in range(4)]
    (photos / "m.csv").write_text("path\n" + "\n".join(names))
    files = [RawFile(name, Place(str(photos / name))) for name in names]
    order = [file.name for file in sorted(files, key=lambda file: (ingest_module.randomness.key("ingest", file.name), file.name))]
    file, aside = photos / order[1], tmp_path / "aside.jpg"  # the second to be looked at
    if changed == "back":
        file.rename(aside)
    interrupted(monkeypatch, 4, "ingest", photos / "m.csv", tmp_path / "out")
    assert len((tmp_path / "out" / "plan" / "examined.jsonl").read_bytes().splitlines()) == 4
    aside.rename(file) if changed == "back" else file.rename(aside)
    assert run("ingest", photos / "m.csv", tmp_path / "out") == 0
    assert [entry.meta["file"] for entry in entries(tmp_path / "out")] == [name for name in order if changed == "back" or name != order[1]]
    assert run("ingest", photos / "m.csv", tmp_path / "fresh") == 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "fresh")


def test_a_sample_without_content_is_an_error_not_a_gap(tmp_path, photos):
    picture = Candidate("a", RawFile("dog/0.jpg", Place(str(photos / "dog" / "0.jpg"))))
    with pytest.raises(ValueError, match="shorter"), ShardWriter(tmp_path / "a.tar") as shard:
        _write_file(shard, [picture, picture], None)


def test_tars_of_others_are_the_same_source_once_they_are_indexed(tmp_path, photos, monkeypatch):
    (tmp_path / "src").mkdir()
    with webdataset.TarWriter(str(tmp_path / "src" / "a.tar")) as sink:
        for number in range(4):
            sink.write({"__key__": f"{number}", "jpg": (photos / "dog" / "0.jpg").read_bytes()})
    interrupted(monkeypatch, 2, "ingest", tmp_path / "src", tmp_path / "out")
    assert (tmp_path / "src" / "a.tar.index.json").is_file()
    assert run("ingest", tmp_path / "src", tmp_path / "out") == 0
    assert len(entries(tmp_path / "out")) == 4


def test_out_may_lie_in_src_but_not_be_it(tmp_path, photos, monkeypatch, capsys):
    out = photos / "made" / "out"
    interrupted(monkeypatch, 2, "ingest", photos, out)
    assert run("ingest", photos, out) == 0
    (out / "shard-000000.tar").unlink()
    assert run("ingest", photos, out) == 0
    assert run("ingest", photos, tmp_path / "elsewhere", "--captions", "x") == 0  # what lies in OUT of another is no media
    assert json.loads((out / "ingest.json").read_text())["ignored"] == {".md": 1, "hidden": 1}
    before = snapshot(photos)
    assert run("ingest", photos, photos / "." / "dog" / "..") == 2
    assert "is SRC itself" in capsys.readouterr().err
    assert snapshot(photos) == before


def test_examining_in_several_processes_gives_the_same_bytes(tmp_path, photos):
    for number in range(3):
        write_mp4(photos / "dog" / f"{number}.mp4", np.roll(moving_shapes.draw(0, 0).video, number, 2), 8, lossless=True)
    arguments = ("--shard-samples", 3, "--clip-frames", 4, "stages=[{name: change}]", "duplicates={name: perceptual_hash}")
    assert run("ingest", photos, tmp_path / "a", *arguments, "--processes", 1) == 0
    assert run("ingest", photos, tmp_path / "b", *arguments, "--processes", 3) == 0
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    assert len((tmp_path / "b" / "plan" / "examined.jsonl").read_bytes().splitlines()) == 14


def test_a_file_that_ends_two_processes_is_left_out_and_says_so():
    file, config = RawFile("a.png", Place("/nowhere/a.png")), IngestConfig()
    once = ingest_module._try_again(ingest_module._Task(file, "a"), WorkerLost(-11))
    (again,) = json.loads(ingest_module._examined(config, once))
    assert again["dropped"].startswith("file cannot be read")  # tried as if nothing had been
    (dropped,) = json.loads(ingest_module._examined(config, ingest_module._try_again(once, WorkerLost(-11))))
    assert dropped["dropped"] == "its process ended with SIGSEGV"


def test_any_process_may_write_any_shard(tmp_path, photos):
    clip = moving_shapes.draw(0, 0).video
    for number in range(3):
        write_mp4(photos / "dog" / f"{number}.mp4", np.roll(clip, number, 2), 8, lossless=True)
    arguments = ("--shard-samples", 3, "--clip-frames", 4, "stages=[{name: change}]")
    assert run("ingest", photos, tmp_path / "a", *arguments) == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=shutil.ignore_patterns("*.tar*"))
    shards = ShardPlan.read(tmp_path / "b").shards
    assert shards == 6
    for number in reversed(range(shards)):
        code = f"from pathlib import Path; from data_pipelines.shard_plan import write_shard; write_shard(Path('b'), {number})"
        if number == 5:  # one in a process of its own
            subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
        else:
            write_shard(tmp_path / "b", number)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_a_source_that_went_away_makes_no_empty_shards(tmp_path, photos, capsys):
    assert run("ingest", photos, tmp_path / "out", "--shard-samples", 4) == 0
    for path in (tmp_path / "out").glob("shard-000001*"):
        path.unlink()
    before = snapshot(tmp_path / "out")
    photos.rename(tmp_path / "away")
    with pytest.raises(UserError, match="is missing now"):
        write_shard(tmp_path / "out", 1)
    assert snapshot(tmp_path / "out") == before
    (tmp_path / "away").rename(photos)
    assert run("ingest", photos, tmp_path / "out", "--shard-samples", 4) == 0


def test_nothing_of_the_users_is_removed_where_nothing_is_usable(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.jpg").write_bytes(b"x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("x")
    assert run("ingest", tmp_path / "src", tmp_path / "out") == 2
    assert snapshot(tmp_path / "out") == {Path("precious.txt"): b"x"}


@pytest.mark.parametrize(("captions", "expected"), [("class-name", "a photo of a dog"), ("one {class}, seen", "one dog, seen"), ("x", "x")])
def test_captions_by_choice(tmp_path, photos, captions, expected):
    assert run("ingest", photos, tmp_path / "out", "--captions", captions) == 0
    (sample,) = [s for s in webdataset.WebDataset(str(tmp_path / "out/shard-000000.tar"), shardshuffle=False) if s["__key__"] == "dog/1"]
    assert sample["txt"].decode() == expected


def test_videos_are_cut_into_clips_at_the_rate_asked_for(tmp_path, shared_data):
    folder = tmp_path / "videos"
    shutil.copytree(shared_data / "videos", folder)
    (folder / "nasa_13013.txt").write_text("astronauts train\n")
    (folder / "h265_video.txt").write_bytes(b"\xff\xfe")
    out = tmp_path / "out"
    assert run("ingest", folder, out, "--clip-frames", 5, "--fps", 5, "--height", 32, "--width", 48) == 0
    found = entries(out)
    by_file = {name: [e for e in found if e.meta["file"] == name] for name in ("nasa_13013.mp4", "av1_video.mkv", "h265_video.mp4")}
    # 13 s and 5 s at 5 frames a second in clips of five: 65 // 5 and 25 // 5. The caption of the third is not UTF-8.
    assert [len(by_file[name]) for name in by_file] == [13, 5, 0]
    assert {(e.facts.frames, e.facts.height, e.facts.width, e.facts.fps) for e in found} == {(5, 32, 48, 5.0)}
    assert {e.caption_length for e in by_file["nasa_13013.mp4"]} == {16}
    assert {e.caption_length for e in by_file["av1_video.mkv"]} == {0}
    record = json.loads((out / "ingest.json").read_text())
    assert record["uncaptioned"] == 5
    assert record["reasons"] == {"caption is not UTF-8": 1}

    config = DataConfig(sources=[{"path": str(out)}], token_budget=12, packs_per_step=1, sizes=[(5, 32, 48)], num_workers=0)
    with StepStream(open_plan(config, lambda f: (2, 2, 3), 0), 0, 1) as stream:
        step = next(stream)
    assert step.bad == []
    assert step.packs[0].samples[0].pixels.shape == (5, 32, 48, 3)


@pytest.mark.parametrize(("fps", "expected"), [(4, [0, 2, 4, 6]), (16, [0, 0, 1, 1]), (8, [0, 1, 2, 3]), (5, [0, 1, 3, 4])])
def test_a_rate_takes_the_frame_that_is_shown_at_each_time(tmp_path, fps, expected):
    clip = moving_shapes.draw(0, 0).video  # 8 frames a second, 1.5 pixels a frame
    (tmp_path / "src").mkdir()
    write_mp4(tmp_path / "src" / "a.mp4", clip, 8, lossless=True)
    assert run("ingest", tmp_path / "src", tmp_path / "out", "--clip-frames", 4, "--fps", fps) == 0
    sample = next(iter(webdataset.WebDataset(str(tmp_path / "out" / "shard-000000.tar"), shardshuffle=False)))
    for frame, number in zip(frames_at(sample["mp4"], "mp4", range(4)), expected, strict=True):
        errors = [np.abs(frame.astype(int) - other).mean() for other in clip]
        assert errors[number] == min(errors)
        assert errors[number] < 1.5  # of 255: the clips are stored nearly, not quite, without loss


def test_an_archive_of_class_folders_is_read_in_place(tmp_path, shared_data):
    small = tmp_path / "cifar.tar.gz"
    with tarfile.open(shared_data / "cifar10_train_20k.tar.gz") as source, tarfile.open(small, "w:gz") as target:
        for number, member in enumerate(source):
            if number % 500 == 0 and member.isreg():
                target.addfile(member, source.extractfile(member))
        evil = tarfile.TarInfo("cifar10/../../escaped.jpg")
        target.addfile(evil)
    out = tmp_path / "deep" / "out"
    assert run("ingest", small, out) == 0
    found = entries(out)
    assert len(found) == 40
    assert len({e.meta["label"] for e in found}) == 10
    assert {(e.facts.height, e.facts.width) for e in found} == {(32, 32)}
    assert all(e.meta["file"].startswith(e.meta["class"] + "/") for e in found)
    assert not list(tmp_path.rglob("escaped*"))
    assert json.loads((out / "ingest.json").read_text())["skipped"] == [["cifar10/../../escaped.jpg", "unsafe name"]]
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"out"}  # no scratch is left


def test_archives_that_are_damaged_or_explode_are_refused(tmp_path, photos, capsys):
    whole = tmp_path / "a.tar.gz"
    with tarfile.open(whole, "w:gz") as tar:
        tar.add(photos, "photos")
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(whole.read_bytes()[:-500])
    assert run("ingest", cut, tmp_path / "o") == 2
    assert "truncated" in capsys.readouterr().err
    (tmp_path / "no.tar.gz").write_bytes(b"not gzip")
    assert run("ingest", tmp_path / "no.tar.gz", tmp_path / "o") == 2
    with tarfile.open(tmp_path / "empty.tar.gz", "w:gz"):
        pass
    assert run("ingest", tmp_path / "empty.tar.gz", tmp_path / "o") == 2
    assert not list(tmp_path.glob(".*"))  # no scratch is left


def test_shards_of_an_archive_are_made_again_from_the_archive(tmp_path, photos):
    whole = tmp_path / "a.tar.gz"
    with tarfile.open(whole, "w:gz") as tar:
        tar.add(photos, "photos")
    assert run("ingest", whole, tmp_path / "out", "--shard-samples", 4) == 0
    before = snapshot(tmp_path / "out")
    (tmp_path / "out" / "shard-000001.tar").unlink()
    assert run("ingest", whole, tmp_path / "out", "--shard-samples", 4) == 0
    assert snapshot(tmp_path / "out") == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("make", "arguments", "said"),
    [
        (lambda p: None, (), "no such file or folder"),
        (lambda p: p.mkdir(), (), "no image or video in it"),
        (lambda p: (p.mkdir(), (p / "a.jpg").write_bytes(b"x")), (), "none of its 1 images and videos is usable"),
        (lambda p: p.write_text("x"), (), "expected a folder, an archive"),
        (lambda p: (p.mkdir(), Image.new("RGB", (8, 8)).save(p / "a.png")), ("--captions", "class-name"), "no class folders"),
        (lambda p: p.mkdir(), ("--height", "8"), "--height and --width go together"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, capsys, make, arguments, said):
    make(tmp_path / "src")
    assert run("ingest", tmp_path / "src", tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_shards_is_not_touched(tmp_path, photos, write_shard):
    write_shard(tmp_path / "out")
    before = snapshot(tmp_path / "out")
    assert run("ingest", photos, tmp_path / "out") == 2
    assert run("shapes", tmp_path / "out", "--clips", 3) == 2
    assert snapshot(tmp_path / "out") == before


def test_shapes_are_deterministic_resumable_and_labelled_with_the_truth(tmp_path, shapes):
    out = tmp_path / "again"
    arguments = ("shapes", out, "--clips", 45, "--seed", 3, "--shard-samples", 10)
    assert run(*arguments) == 0
    assert snapshot(out) == snapshot(shapes)
    (out / "shard-000003.tar.index.json").unlink()
    (out / "manifest.json").unlink()
    assert run(*arguments) == 0
    assert snapshot(out) == snapshot(shapes)
    assert run("shapes", out, "--clips", 45, "--seed", 4, "--shard-samples", 10) == 2
    sample = next(iter(webdataset.WebDataset(str(out / "shard-000000.tar"), shardshuffle=False)))
    truth = json.loads(sample["json"])
    assert f"{truth['size']} {truth['colour']} {truth['shape']} moving {truth['direction']}" in sample["txt"].decode()


def test_check_finds_what_was_damaged(tmp_path, shapes, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(shapes, folder)
    assert run("check", folder) == 0
    assert "45 samples in 5 shards" in capsys.readouterr().out
    shard = folder / "shard-000002.tar"
    entry = read_index(index_path(str(shard))).entries[3]
    data = bytearray(shard.read_bytes())
    data[entry.members["mp4"].offset] ^= 1
    shard.write_bytes(data)
    assert run("check", folder) == 3
    printed = capsys.readouterr()
    assert f"shard-000002/{entry.key}: checksum mismatch" in printed.out
    assert "1 shards are damaged, 1 of 45 samples" in printed.err
    assert run("check", tmp_path / "gone") == 2


def test_show_draws_the_samples(tmp_path, shapes):
    assert run("show", shapes, tmp_path / "a.png", "--count", 7) == 0
    with Image.open(tmp_path / "a.png") as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape[1] > 6 * 192
    assert pixels.shape[0] > 2 * 192
    first, last = pixels[20:190, 20:190], pixels[20 + 258 : 190 + 258, 20:190]
    assert first.std() > 5
    assert last.std() > 5
    assert not np.array_equal(first, last)
    assert (pixels[20 + 258 : 190 + 258, 300:] == 255).all()  # seven cells, not twelve
    assert run("show", shapes, tmp_path / "a.txt") == 2


def test_show_adds_a_histogram_for_every_number_that_differs(shapes, photos, tmp_path):
    assert run("ingest", photos, tmp_path / "out", "stages=[{name: brightness}]") == 0
    panels = histograms(entries(tmp_path / "out"))
    # height, width (one is turned), caption (cat or dog); frames in the panel of what is alike, brightness differs by the JPEGs
    assert len(panels) == 5
    alike = histograms(entries(shapes)[:1] * 3)
    assert len(alike) == 1
    bars = np.asarray(_panel("x", np.array([0.0] * 30 + [1.0] * 10)))[:, :, 0] < 100
    columns = bars[20:78].sum(0)
    assert columns[3] == pytest.approx(3 * columns[-3], abs=2)
    assert not columns[20:170].any()


def test_stats_are_those_of_all_latents_at_once(tmp_path, capsys):
    random = np.random.default_rng(0)
    arrays = [(random.normal(size=(3, 1, 2 + i, 4)) * [[[[1]]], [[[2]]], [[[5]]]] + [[[[7]]], [[[0]]], [[[-3]]]]) for i in range(7)]
    for number, part in enumerate((arrays[:4], arrays[4:])):
        with ShardWriter(tmp_path / f"shard-00000{number}.tar") as shard:
            for i, array in enumerate(part):
                buffer = io.BytesIO()
                np.save(buffer, array.astype(np.float32))
                shard.add(f"{number}-{i}", {"latents.npy": buffer.getvalue()}, Facts("latents", *array.shape[1:], None), {})
    assert run("stats", tmp_path, "--json", tmp_path / "stats.json") == 0
    together = np.concatenate([array.astype(np.float32).astype(np.float64).reshape(3, -1) for array in arrays], 1)
    record = json.loads((tmp_path / "stats.json").read_text())
    assert (record["samples"], record["positions"]) == (7, together.shape[1])
    np.testing.assert_allclose(record["mean"], together.mean(1), rtol=1e-10)
    np.testing.assert_allclose(record["std"], together.std(1), rtol=1e-10)
    assert record["overall_std"] == pytest.approx(together.std(), rel=1e-10)
    assert f"channel   2  mean {together.mean(1)[2]:+.4f}" in capsys.readouterr().out
    (tmp_path / "shard-000000.tar").unlink()
    (tmp_path / "shard-000001.tar").unlink()
    assert run("stats", tmp_path) == 2
