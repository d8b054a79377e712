"""What ingest reads beside folders: manifests in three formats, and WebDatasets of others; every odd row has its reason."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipelines import moving_shapes
from data_pipelines.__main__ import main
from data_pipelines.index import index_path, read_index
from data_pipelines.sources import read_source
from data_pipelines.video import encode_mp4

COLUMNS = ["path", "caption", "class", "label", "start", "end", "licence"]
ROWS = [
    ["a.png", "a square", "x", 3, None, None, "CC0"],
    ["deep/b.jpg", "", "y", 0, None, None, None],
    ["c.mp4", "moving", None, None, 0.25, 0.75, "CC-BY"],
    ["c.mp4", "moving on", None, None, 0.75, None, None],
    ["gone.png", "x", None, None, None, None, None],
    ["note.md", "x", None, None, None, None, None],
    [None, "x", None, None, None, None, None],
    ["a.png", "again", None, None, None, None, None],
    ["c.mp4", "backwards", None, None, 2.0, 1.0, None],
]
REASONS = {5: "no such file", 6: "file of another kind", 7: "row with no path", 8: "twice", 9: "is not before end"}


@pytest.fixture
def folder(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8))
    (tmp_path / "src" / "deep").mkdir(parents=True)
    picture.save(tmp_path / "src" / "a.png")
    picture.save(tmp_path / "src" / "deep" / "b.jpg")
    (tmp_path / "src" / "note.md").write_text("x")
    (tmp_path / "src" / "c.mp4").write_bytes(encode_mp4(moving_shapes.draw(0, 0).video, 8.0, "lossless"))
    return tmp_path / "src"


def write_csv(path):
    lines = [COLUMNS, *(["" if value is None else value for value in row] for row in ROWS)]
    path.write_text("\ufeff" + "\n".join(",".join(map(str, line)) for line in lines), encoding="utf-8")


def write_jsonl(path):
    path.write_text("\n".join(json.dumps(dict(zip(COLUMNS, row))) for row in ROWS) + "\n\nnot json\n")


def write_parquet(path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {name: [str(row[i]) if name == "path" and row[i] else row[i] for row in ROWS] for i, name in enumerate(COLUMNS)}
    parquet.write_table(pyarrow.table(columns), path)


def samples(folder):
    return {s["__key__"]: s for path in sorted(folder.glob("*.tar")) for s in webdataset.WebDataset(str(path), shardshuffle=False)}


@pytest.mark.parametrize(("name", "write"), [("m.csv", write_csv), ("m.jsonl", write_jsonl), ("m.parquet", write_parquet)])
def test_a_manifest_gives_captions_labels_and_spans(tmp_path, folder, name, write):
    write(folder / name)
    assert main(["ingest", str(folder / name), str(tmp_path / "out"), "--clip-frames", "2"]) == 0
    made = samples(tmp_path / "out")
    assert set(made) == {"a", "deep/b", "c_0_25-0_75@00000", "c_0_25-0_75@00001", "c_0_75-end@00000"}
    assert (made["a"]["txt"], made["a"]["cls"]) == (b"a square", b"3")
    assert json.loads(made["a"]["json"])["source"] == {"licence": "CC0"}
    assert "txt" not in made["deep/b"]
    spans = {key: (json.loads(s["json"])["start"], json.loads(s["json"])["end"]) for key, s in made.items() if key.startswith("c_")}
    # eight frames a second: frames 2 to 5, then 6, 7 and 8, of which two make a clip
    assert sorted(spans.values()) == [(0.25, 0.5), (0.5, 0.75), (0.75, 1.0)]
    assert made["c_0_75-end@00000"]["txt"] == b"moving on"
    skipped = dict(json.loads((tmp_path / "out" / "ingest.json").read_text())["skipped"])
    assert all(reason in skipped[f"{name} row {number}"] for number, reason in REASONS.items())
    assert len(skipped) == len(REASONS) + (name == "m.jsonl")


@pytest.mark.parametrize(
    ("text", "said"), [("name,text\nx,y\n", "no row names a file"), ("", "no image or video"), ("path\n\xff", "UTF-8")]
)
def test_a_manifest_that_is_none_is_explained(tmp_path, capsys, text, said):
    (tmp_path / "m.csv").write_bytes(text.encode("latin-1"))
    assert main(["ingest", str(tmp_path / "m.csv"), str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err


def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, folder, capsys, monkeypatch):
    import sys

    (folder / "m.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # what Python itself does with a module that cannot be had
    assert main(["ingest", str(folder / "m.parquet"), str(tmp_path / "out")]) == 2
    assert "pip install -c constraints.txt -e '.[curate]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    assert main(["ingest", str(folder), str(tmp_path / "out"), "scenes={}"]) == 2
    assert "needs the package scenedetect" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_webdataset_of_others_is_taken_in(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    clip = encode_mp4(moving_shapes.draw(0, 0).video, 8.0, "lossless")
    with webdataset.TarWriter(str(folder / "00000.tar")) as sink:
        sink.write({"__key__": "p/one", "png": picture, "txt": "one", "cls": 7, "json": {"url": "https://example.org/1"}})
        sink.write({"__key__": "p/two", "mp4": clip, "txt": "two", "jpg": picture})
        sink.write({"__key__": "p/three", "txt": "no picture"})
    with tarfile.open(folder / "00001.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpeg")
        info.size = 8
        tar.addfile(info, io.BytesIO(b"nonsense"))
        tar.addfile(tarfile.TarInfo("../evil.png"))
    assert main(["ingest", str(folder), str(tmp_path / "out"), "--clip-frames", "4"]) == 0
    made = samples(tmp_path / "out")
    assert set(made) == {"00000/p/one", "00000/p/two@00000", "00000/p/two@00001"}
    assert (made["00000/p/one"]["txt"], made["00000/p/one"]["cls"]) == (b"one", b"7")
    assert json.loads(made["00000/p/one"]["json"])["source"] == {"url": "https://example.org/1"}
    assert made["00000/p/two@00001"]["txt"] == b"two"
    record = json.loads((tmp_path / "out" / "ingest.json").read_text())
    assert len(record["skipped"]) == 3
    assert not list(tmp_path.rglob("evil*"))


def test_ours_go_through_again(tmp_path, shapes):
    assert main(["ingest", str(shapes), str(tmp_path / "out"), "--clip-frames", "9", "--shard-samples", "100"]) == 0
    index = read_index(index_path(str(tmp_path / "out" / "shard-000000.tar")))
    assert len(index.entries) == 45
    (first,) = [e for e in index.entries if e.meta["file"] == "shard-000000/00000000.mp4"]
    (before,) = [e for e in read_source(str(shapes)).index(read_source(str(shapes)).shards[0]).entries if e.key == "00000000"]
    assert first.caption_length == before.caption_length > 0


def record(out):
    return json.loads((out / "ingest.json").read_text())


@pytest.mark.parametrize("member", ["png", "txt"])
def test_a_byte_that_changed_since_a_shard_was_indexed_costs_its_sample(tmp_path, write_shard, member):
    shard = write_shard(tmp_path / "src")
    damaged = read_index(index_path(str(shard))).entries[3].members[member]
    data = bytearray(shard.read_bytes())
    data[damaged.offset + damaged.length - 1] ^= 1
    shard.write_bytes(data)
    assert main(["ingest", str(tmp_path / "src"), str(tmp_path / "out")]) == 0
    assert "shard-000000/0-003" not in samples(tmp_path / "out")
    ((what, reason),) = record(tmp_path / "out")["skipped"]
    assert what == "shard-000000/0-003.png"
    assert reason.startswith("checksum mismatch")


def test_the_json_of_a_sample_is_verified_too(tmp_path):
    (tmp_path / "src").mkdir()
    with webdataset.TarWriter(str(tmp_path / "src" / "a.tar")) as sink:
        for key in "pq":
            sink.write({"__key__": key, "png": np.zeros((8, 8, 3), np.uint8), "json": {"licence": "CC0"}})
    read_source(str(tmp_path / "src"))
    tar = tmp_path / "src" / "a.tar"
    tar.write_bytes(tar.read_bytes().replace(b"CC0", b"CC1", 1))
    assert main(["ingest", str(tmp_path / "src"), str(tmp_path / "out")]) == 0
    assert set(samples(tmp_path / "out")) == {"a/q"}
    assert [what for what, _ in record(tmp_path / "out")["skipped"]] == ["a/p.png"]


def test_what_a_tar_lost_since_it_was_indexed_is_listed(tmp_path):
    (tmp_path / "src").mkdir()
    for name in "ab":
        with webdataset.TarWriter(str(tmp_path / "src" / f"{name}.tar")) as sink:
            for key in range(3):
                sink.write({"__key__": f"{key}", "cls": key, "png": np.full((8, 8, 3), key, np.uint8)})
    read_source(str(tmp_path / "src"))
    tar = tmp_path / "src" / "a.tar"
    length = tar.stat().st_size
    at = read_index(index_path(str(tar))).entries[1].members["cls"].offset
    tar.write_bytes(tar.read_bytes()[:at])
    (tmp_path / "src" / "b.tar").unlink()
    assert main(["ingest", str(tmp_path / "src"), str(tmp_path / "out")]) == 0
    assert set(samples(tmp_path / "out")) == {"a/0"}
    skipped = dict(record(tmp_path / "out")["skipped"])
    assert skipped.pop("a.tar") == f"{at} bytes, {length} when it was indexed"
    assert skipped.pop("b.tar") == "missing, but its index is there"
    assert set(skipped) == {"a/1", "a/2", "b/0", "b/1", "b/2"}


def test_a_label_that_is_no_number_is_listed(tmp_path):
    (tmp_path / "src").mkdir()
    with webdataset.TarWriter(str(tmp_path / "src" / "a.tar")) as sink:
        sink.write({"__key__": "p", "png": np.zeros((8, 8, 3), np.uint8), "cls": b"cat"})
    assert main(["ingest", str(tmp_path / "src"), str(tmp_path / "out")]) == 0
    assert "cls" not in samples(tmp_path / "out")["a/p"]
    assert record(tmp_path / "out")["skipped"] == [["a/p.cls ('cat')", "label is no whole number, left out"]]


def test_classes_that_are_numbers_are_names(tmp_path, folder):
    rows = [{"path": "a.png", "class": 0}, {"path": "deep/b.jpg", "class": 7}, {"path": "c.mp4", "class": "x_y"}]
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["ingest", str(folder / "m.jsonl"), str(tmp_path / "out"), "--captions", "class {class}"]) == 0
    captions = {key: sample["txt"] for key, sample in samples(tmp_path / "out").items()}
    assert captions == {"a": b"class 0", "deep/b": b"class 7", "c@00000": b"class x y"}


def test_numbers_without_bound_are_problems_of_their_rows(tmp_path, folder):
    huge = "1" + "0" * 400
    rows = ['"label": 1e999', f'"label": {huge}', f'"start": {huge}', '"label": 2']
    (folder / "m.jsonl").write_text("\n".join(f'{{"path": "a.png", {row}}}' for row in rows))
    assert main(["ingest", str(folder / "m.jsonl"), str(tmp_path / "out")]) == 0
    assert samples(tmp_path / "out")["a"]["cls"] == b"2"
    skipped = record(tmp_path / "out")["skipped"]
    assert [what for what, _ in skipped] == [f"m.jsonl row {number}" for number in (1, 2, 3)]
    assert all("expected" in reason and len(reason) < 100 for _, reason in skipped)


def test_hidden_files_of_an_archive_are_no_folder_of_its_own(tmp_path, folder):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "dog").mkdir()
    shutil.copy(folder / "a.png", tmp_path / "photos" / "cat")
    shutil.copy(folder / "a.png", tmp_path / "photos" / "dog")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("._photos"))
        tar.addfile(tarfile.TarInfo("photos/._cat"))
        tar.add(tmp_path / "photos", "photos")
    assert main(["ingest", str(tmp_path / "a.tar"), str(tmp_path / "out")]) == 0
    assert {key: sample["cls"] for key, sample in samples(tmp_path / "out").items()} == {"cat/a": b"0", "dog/a": b"1"}
    assert record(tmp_path / "out")["ignored"] == {"hidden": 2}


def test_captions_beside_the_files_are_kept_where_folders_hold_all_of_them(tmp_path, folder, capsys):
    source = tmp_path / "parts"
    for part in ("part1", "part2"):
        (source / part).mkdir(parents=True)
        shutil.copy(folder / "a.png", source / part)
    (source / "part1" / "a.txt").write_text("a square")
    assert main(["ingest", str(source), str(tmp_path / "out")]) == 0
    assert {key: sample.get("txt") for key, sample in samples(tmp_path / "out").items()} == {"part1/a": b"a square", "part2/a": None}
    assert "2 classes, by folder: part1, part2\n" in capsys.readouterr().out
    assert main(["ingest", str(source), str(tmp_path / "named"), "--captions", "class-name"]) == 0
    assert samples(tmp_path / "named")["part1/a"]["txt"] == b"a photo of a part1"
