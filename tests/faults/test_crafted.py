"""Files with code in them, through the commands that would read them: refused or left out with a reason, and nothing of it runs."""

import io
import json
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dit import cli
from dit.engine import durable
from tests.processes import Forks, train_config


def pickle_of(canary: Path) -> bytes:
    """What runs `touch CANARY` in whoever unpickles it. Written by hand: we import no pickle."""
    return f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode()


def array_of(canary: Path) -> bytes:
    """An .npy of Python objects."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + pickle_of(canary)


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def shards(folder: Path, members: dict[str, bytes], link: str = "") -> Path:
    """A folder with one tar of `members`, and of a symbolic link to `link` if that is given."""
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as file:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
        if link:
            entry = tarfile.TarInfo("link.png")
            entry.type, entry.linkname = tarfile.SYMTYPE, link
            file.addfile(entry)
    return folder


def checkpoint(run: Path, state: bytes, **beside: bytes) -> Path:
    """A run with one checkpoint that its manifest says is intact; `beside` are files that no manifest names."""
    staged = durable.stage(run / "checkpoints", 5)
    (staged / "rank-00000-of-00001.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    (staged / "state.json").write_bytes(state)
    folder = durable.publish(staged, run / "checkpoints", 5, [durable.seal(path) for path in sorted(staged.iterdir())])
    for name, data in beside.items():
        (folder / name).write_bytes(data)
    return run


def text(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def index_with(folder: Path, old: str, new: str) -> Path:
    """A folder of shards with `old` of its index replaced."""
    shards(folder, {"a.png": picture()})
    assert cli.main(["data", "index", str(folder)]) == 0
    index = folder / "0.tar.index.json"
    assert old in index.read_text()
    index.write_text(index.read_text().replace(old, new))
    return folder


Case = tuple[Callable[[Path, Path], list[object]], int, str]
DEEP = b"[" * 100_000
CASES: dict[str, Case] = {
    "config with a !!python tag": (
        lambda t, c: ["train", text(t / "run.yaml", f"out: !!python/object/apply:posix.system ['touch {c}']\n".encode())],
        2,
        "not valid YAML",
    ),
    "config nested 3000 deep": (lambda t, c: ["train", text(t / "run.yaml", b"out: " + DEEP[:3000])], 2, "not valid YAML"),
    "override nested 3000 deep": (
        lambda t, c: ["train", text(t / "run.yaml", b"out: a"), f"out={DEEP[:3000].decode()}"],
        2,
        "not valid YAML",
    ),
    "pipe: address": (lambda t, c: ["data", "check", f"pipe:touch {c}"], 2, "expected a local path or one of file://, s3://"),
    "command in a path": (lambda t, c: ["data", "ingest", f"$(touch {c}); touch {c}", t / "out"], 2, "no such file or folder"),
    "WebDataset with .pyd, .pickle and .pth members": (
        lambda t, c: [
            "data",
            "ingest",
            shards(t / "w", {"a.png": picture(), **{f"a.{e}": pickle_of(c) for e in ("pyd", "pickle", "pth")}}),
            t / "out",
        ],
        0,
        "1 samples in 1 shards",
    ),
    "tar with members ../ and /": (
        lambda t, c: [
            "data",
            "ingest",
            shards(t / "w", {"../canary": b"x", str(c): b"x", "../a.png": picture(), "b.png": picture()}),
            t / "out",
        ],
        0,
        "unsafe member name: 0/../a.png",
    ),
    "tar with a link": (lambda t, c: ["data", "index", shards(t / "w", {"b.png": picture()}, "/etc/passwd")], 0, "1 x not a regular file"),
    ".npy of objects as latents": (
        lambda t, c: ["data", "stats", shards(t / "w", {"a.latents.npy": array_of(c), "a.text.npy": array_of(c)})],
        2,
        "1 x .npy of '|O', expected float16 or float32",
    ),
    ".npz as latents": (
        lambda t, c: ["data", "stats", shards(t / "w", {"a.latents.npy": b"PK\x03\x04" + array_of(c), "a.text.npy": array_of(c)})],
        2,
        "1 x not a .npy array",
    ),
    "pickle as a picture": (
        lambda t, c: ["data", "ingest", text(t / "a.png", pickle_of(c)).parent, t.parent / f"{t.name}-out"],
        2,
        "none of its 1 images",
    ),
    "pickle as a manifest": (lambda t, c: ["data", "ingest", text(t / "m.parquet", pickle_of(c)), t / "out"], 2, "not a readable parquet"),
    "pickle as an archive": (lambda t, c: ["data", "ingest", text(t / "m.tar.gz", pickle_of(c)), t / "out"], 2, "cannot be unpacked"),
    "manifest with a number of 5000 digits": (
        lambda t, c: ["data", "ingest", text(t / "m.jsonl", b'{"path": ' + b"9" * 5000 + b"}"), t / "out"],
        2,
        "no row names a file",
    ),
    "manifest with commands": (
        lambda t, c: ["data", "ingest", text(t / "m.jsonl", json.dumps({"path": f"|touch {c};.png"}).encode()), t / "out"],
        2,
        "1 x no such file",
    ),
    "index that points outside": (
        lambda t, c: ["data", "check", index_with(t / "w", '"shard": "0.tar"', '"shard": "../../etc/passwd"')],
        2,
        "the index is damaged",
    ),
    "index with a number of 5000 digits": (
        lambda t, c: ["data", "check", index_with(t / "w", '"height": 16', '"height": ' + "9" * 5000)],
        2,
        "not a whole shard index",
    ),
    "index with NaN": (lambda t, c: ["data", "check", index_with(t / "w", '"height": 16', '"height": NaN')], 2, "the index is damaged"),
    "checkpoint with pickles beside": (
        lambda t, c: ["ckpt", "verify", checkpoint(t / "run", b"{}", **{"optimizer.pt": pickle_of(c), ".metadata": pickle_of(c)})],
        0,
        "step 5: valid",
    ),
    "checkpoint whose state is nested 100,000 deep": (
        lambda t, c: ["ckpt", "ls", checkpoint(t / "run", DEEP)],
        0,
        "unreadable: maximum recursion depth",
    ),
    "checkpoint whose manifest is a pickle": (
        lambda t, c: ["ckpt", "verify", checkpoint(t / "run", b"{}", **{"manifest.json": pickle_of(c)})],
        4,
        "manifest.json: unreadable",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_crafted_input_runs_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    canary, (make, code, said) = tmp_path / "canary", CASES[name]
    (tmp_path / "in").mkdir()
    argv = [str(word) for word in make(tmp_path / "in", canary)]
    got = cli.main(argv)
    out, err = capfd.readouterr()
    assert (got, "Traceback" in err) == (code, False), err
    assert said in out + err, out + err
    assert not canary.exists()
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("key", ["encoders.latents", "encoders.text"])
def test_a_pickle_named_safetensors_is_no_encoder(forks: Forks, encode_config: Path, tmp_path: Path, key: str) -> None:
    names = {"encoders.latents": "small_video_vae", "encoders.text": "small"}
    weights = text(tmp_path / "weights.safetensors", pickle_of(tmp_path / "canary"))
    done = forks.run("encode", str(encode_config), f"{key}={{name: {names[key]}, path: {weights}}}", f"out={tmp_path}/out")
    assert (done.code, "Traceback" in done.err) == (2, False), done.err
    assert f"{key}.path" in done.err
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("command", ["train", "ckpt"])
def test_a_pickle_named_safetensors_is_no_checkpoint(forks: Forks, teacher: Path, latents: Path, tmp_path: Path, command: str) -> None:
    """Its manifest says that it is intact: whoever made it meant it to be read."""
    run, canary = tmp_path / "run", tmp_path / "canary"
    run.mkdir()
    text(run / "config.resolved.yaml", (teacher / "config.resolved.yaml").read_bytes())
    newest = durable.step_folder(teacher / "checkpoints", durable.published(teacher / "checkpoints")[0])
    staged = durable.stage(run / "checkpoints", 6)
    text(staged / "rank-00000-of-00001.safetensors", pickle_of(canary))
    text(staged / "state.json", (newest / "state.json").read_bytes())
    durable.publish(staged, run / "checkpoints", 6, [durable.seal(path) for path in sorted(staged.iterdir())])
    config = train_config(tmp_path / "run.yaml", latents)
    argv = ["train", str(config)] if command == "train" else ["ckpt", "export", str(run), "--out", str(tmp_path / "exported")]
    done = forks.run(*argv)
    assert (done.code, "Traceback" in done.err) == (4, False), done.err
    assert "rank-00000-of-00001.safetensors" in done.err
    assert not canary.exists()


def test_the_pickle_would_run(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "pickle", str(text(tmp_path / "a", pickle_of(tmp_path / "canary")))], check=True)
    assert (tmp_path / "canary").exists()
