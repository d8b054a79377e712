"""What ingest reads beside folders: manifests in three formats, and WebDatasets of others; every odd row has its reason."""

import io
import json
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
    assert "pip install 'dit[curate]'" in capsys.readouterr().err
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
