"""Hostile and odd files in one folder: each is kept or skipped for the stated reason, nothing runs, memory is bounded."""

import io
import json
import os
import resource
import socket
import struct
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data_pipelines.sources import read_source
from data_pipelines.video import encode_mp4, write_gif

KEPT = "kept"
MAX_MIB = 150  # above what importing takes; the bombs ask for 0.3 to 13 GB
CLIP = np.asarray(Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)).resize((64, 48)))
CLIP = np.stack([np.roll(CLIP, i, 1) for i in range(10)])
PICTURE = Image.fromarray(CLIP[0])


def image(kind, picture=PICTURE, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *chunks):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = zlib.compress(b"\0" * (width * 3 + 1) * min(height, 4))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def video(container, codec, pixels, frames=CLIP, times=None):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        stream.time_base = Fraction(1, 1000)
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(format=pixels)
            picture.pts, picture.time_base = times[number] if times else number * 100, Fraction(1, 1000)
            file.mux(stream.encode(picture))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def sound():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=8000)
        for _ in range(3):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def no_frames():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as file:
        stream = file.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        file.start_encoding()
    return buffer.getvalue()


def huge_avi():
    """An AVI whose header states 16,000 x 16,000 pixels."""
    data = bytearray(video("avi", "rawvideo", "bgr24"))
    at = data.index(b"strf") + 12
    data[at : at + 8] = struct.pack("<ii", 16000, 16000)
    return bytes(data)


def turned():
    data = encode_mp4(CLIP, 10.0, "lossless")
    at = data.index(b"tkhd") + 4 + 40
    return data[:at] + struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30) + data[at + 36 :]


def gif(frames):
    buffer = io.BytesIO()
    write_gif(buffer, frames, 10)
    return buffer.getvalue()


def files(secret: Path, port: int) -> dict[str, tuple[bytes, str]]:
    """Name -> content and what must become of it."""
    mp4, mkv = encode_mp4(CLIP, 10.0, "lossless"), video("matroska", "ffv1", "yuv420p")
    playlist = f"#EXTM3U\n#EXTINF:1,\nfile://{secret}\n#EXTINF:1,\nhttp://127.0.0.1:{port}/a.ts\n#EXT-X-ENDLIST\n".encode()
    pictures = [PICTURE, PICTURE.rotate(90), PICTURE.rotate(180)]
    sixteen = Image.fromarray(np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 20)
    alpha = PICTURE.copy()
    alpha.putalpha(100)
    opener = b"cos\nsystem\n(S'touch pwned'\ntR."  # what a pickle that runs a command looks like
    return {
        "plain.jpg": (image("JPEG"), KEPT),
        "cmyk.jpg": (image("JPEG", PICTURE.convert("CMYK")), KEPT),
        "grey16.png": (image("PNG", sixteen), KEPT),
        "alpha.png": (image("PNG", alpha), KEPT),
        "palette.png": (image("PNG", PICTURE.quantize(16), transparency=3), KEPT),
        "one_pixel.png": (image("PNG", PICTURE.resize((1, 1))), KEPT),
        "png_named.jpg": (image("PNG"), KEPT),
        "bits.png": (image("PNG", PICTURE.convert("1")), KEPT),
        "still.webp": (image("WEBP"), KEPT),
        "animated.webp": (image("WEBP", save_all=True, append_images=pictures), "animated image"),
        "animated.png": (image("PNG", save_all=True, append_images=pictures), "animated image"),
        "truncated.jpg": (image("JPEG")[:-200], "image cannot be decoded"),
        "truncated.png": (image("PNG")[:-500], "image cannot be decoded"),
        "bomb.png": (png(65000, 65000), "pixels"),
        "text_bomb.png": (png(8, 8, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 28), 9))), "image cannot be decoded"),
        "nonsense.jpg": (b"nonsense" * 1000, "not a JPEG, PNG, WEBP image"),
        "empty.png": (b"", "not a JPEG, PNG, WEBP image"),
        "vector.png": (b'<svg xmlns="http://www.w3.org/2000/svg"><script>touch pwned</script></svg>', "not a JPEG, PNG, WEBP image"),
        "pickle.jpg": (opener, "not a JPEG, PNG, WEBP image"),
        "film.mp4": (mp4, KEPT),
        "film-00000.png": (image("PNG"), KEPT),  # not the key of the film's first clip
        "film@00000.png": (image("PNG"), KEPT),
        "turned.mp4": (turned(), KEPT),
        "odd.mp4": (encode_mp4(CLIP[:, :33, :47], 10.0, "lossless"), KEPT),
        "tiny.mp4": (encode_mp4(CLIP[:, :2, :2], 10.0, "lossless"), KEPT),
        "ten_bits.mkv": (video("matroska", "ffv1", "yuv420p10le"), KEPT),
        "alpha.mov": (video("mov", "png", "rgba"), KEPT),
        "uneven.mkv": (video("matroska", "ffv1", "yuv420p", times=[0, 20, 25, 200, 210, 700, 701, 702, 1500, 3000]), KEPT),
        "old.avi": (video("avi", "mjpeg", "yuvj420p"), KEPT),
        "animated.gif": (gif(CLIP), KEPT),
        "still.gif": (gif(CLIP[:1]), "video shorter than"),
        "one_frame.mp4": (encode_mp4(CLIP[:1], 10.0, "lossless"), "video shorter than"),
        "no_frames.mkv": (no_frames(), "video ends too early"),
        "empty.mp4": (b"", "video cannot be decoded"),
        "truncated.mp4": (mp4[: len(mp4) // 2], "video cannot be decoded"),
        "cut_short.mkv": (mkv[: len(mkv) // 3], "video shorter than"),
        "huge.avi": (huge_avi(), "16000 x 16000 pixels"),
        "sound.mp4": (sound(), "no video stream"),
        "playlist.mp4": (playlist, "video cannot be decoded"),
        "playlist.mkv": (playlist, "video cannot be decoded"),
        "concat.avi": (f"ffconcat version 1.0\nfile {secret}\n".encode(), "video cannot be decoded"),
        "mkv_named.mp4": (mkv, "video cannot be decoded"),
        "pickle.mp4": (opener, "video cannot be decoded"),
        "long_caption.png": (image("PNG"), KEPT),
        "long_caption.txt": (b"word " * 20_000, ""),
        "huge_caption.png": (image("PNG"), "larger than"),
        "huge_caption.txt": (b"x" * (3 << 20), ""),
        "latin_caption.png": (image("PNG"), "caption is not UTF-8"),
        "latin_caption.txt": (b"caf\xe9", ""),
        "twin.jpg": (image("JPEG"), KEPT),
        "twin.png": (image("PNG"), KEPT),
        "TWIN.webp": (image("WEBP"), KEPT),
        "$(touch pwned);`touch pwned`.png": (image("PNG"), KEPT),
        "-rf.png": (image("PNG"), KEPT),
        "line\nbreak.png": (image("PNG"), KEPT),
        "n" * 240 + ".png": (image("PNG"), KEPT),
        os.fsdecode(b"bytes \xff\xfe.png"): (image("PNG"), KEPT),
    }


def odd_places(folder: Path) -> dict[str, str]:
    """Links, pipes, sockets, devices -> what must become of them."""
    (folder / "link.png").symlink_to("plain.jpg")
    (folder / "broken.png").symlink_to("nowhere.png")
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (folder / "zeros.png").symlink_to("/dev/zero")
    (folder / "itself").symlink_to(".")
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(os.path.relpath(folder / "socket.jpg"))
    return {
        "link.png": KEPT,
        "broken.png": "link that leads nowhere",
        "loop.mp4": "link that leads nowhere",
        "zeros.png": "a device",
        "itself": "link to a folder",
        "pipe.mp4": "a pipe",
        "socket.jpg": "a socket",
    }


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """The folder, what must become of everything in it, and a server that must never hear anything."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "zoo"
    folder.mkdir()
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        animals = files(secret, server.getsockname()[1])
        for name, (data, _) in animals.items():
            (folder / name).write_bytes(data)
        fates = {name: fate for name, (_, fate) in animals.items() if fate} | odd_places(folder)
        yield folder, fates, server


def limited():
    resource.setrlimit(resource.RLIMIT_CPU, (120, 120))


def test_every_animal_is_kept_or_skipped_for_its_reason(zoo, tmp_path):
    folder, fates, server = zoo
    peak = "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024"
    command = f"import sys, resource, data_pipelines.ingest; from data_pipelines.__main__ import main; before = {peak}; "
    command += f"code = main(sys.argv[1:]); print('MIB', {peak} - before); sys.exit(code)"
    arguments = ["ingest", str(folder), str(tmp_path / "out"), "--processes", "1", "--clip-frames", "5", "stages=[{name: brightness}]"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        [sys.executable, "-c", command, *arguments], capture_output=True, text=True, timeout=120, env=environment, preexec_fn=limited
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert len(fates) >= 55

    record = json.loads((tmp_path / "out" / "ingest.json").read_text())
    reasons = dict(record["skipped"])
    source = read_source(str(tmp_path / "out"))
    entries = [entry for shard in source.shards for entry in source.index(shard).entries]
    kept = {entry.meta["file"] for entry in entries}
    became = {name: KEPT if name in kept else reasons.get(name, "nothing was said of it") for name in fates}
    assert {name: became[name] for name, fate in fates.items() if fate not in became[name]} == {}
    assert kept == {name for name, fate in fates.items() if fate == KEPT}
    assert set(reasons) == set(fates) - kept  # and nothing is named twice or invented

    facts = {entry.meta["file"]: entry.facts for entry in entries}
    assert (facts["turned.mp4"].height, facts["turned.mp4"].width) == (64, 48)
    assert (facts["odd.mp4"].height, facts["odd.mp4"].width) == (33, 47)
    assert {entry.meta["file"]: entry.caption_length for entry in entries}["long_caption.png"] == 99_999
    spans = [(e.meta["start"], e.meta["end"]) for e in entries if e.meta["file"] == "uneven.mkv"]
    assert spans[0] == (0.0, 0.7)
    assert len({entry.key.lower() for entry in entries}) == len(entries)

    assert int(done.stdout.rpartition("MIB")[2]) < MAX_MIB, done.stdout
    assert not list(tmp_path.rglob("pwned"))
    assert b"secret" not in b"".join(path.read_bytes() for path in (tmp_path / "out").glob("*.tar"))
    with pytest.raises(BlockingIOError):
        server.accept()
