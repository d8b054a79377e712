"""Decoding: exact where nothing is scaled, upright, bounded, and a pure function of (bytes, size, key)."""

import io
import struct
import zlib
from itertools import pairwise

import av
import numpy as np
import pytest
from PIL import Image

from data_pipelines import moving_shapes
from data_pipelines.decode import decode, decode_image, decode_npy, encode_png, fit, image_size, is_plain
from data_pipelines.probe import probe
from data_pipelines.samples import BadSample, Facts
from data_pipelines.video import encode_mp4, examine, frames_at, write_gif, write_mp4

CLIP = moving_shapes.draw(0, 1).video
LOSSLESS = encode_mp4(CLIP, 8.0, "lossless")


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# --- video ------------------------------------------------------------------------------------------------------


def test_lossless_video_comes_back_bit_for_bit_and_encodes_to_the_same_bytes():
    np.testing.assert_array_equal(decode(LOSSLESS, "mp4", (9, 32, 32), 0), CLIP)
    assert encode_mp4(CLIP, 8.0, "lossless") == LOSSLESS
    assert probe({"mp4": LOSSLESS, "txt": b""}) == Facts("video", 9, 32, 32, 8.0)


@pytest.mark.parametrize(("quality", "worst_mean"), [("archive", 1.5), ("view", 4.0)])  # of 255; chroma is halved in the second
def test_lossy_video_stays_close(quality, worst_mean):
    smooth = np.stack([np.add.outer(np.arange(48), np.arange(64) * 2)] * 3, -1)[None].repeat(5, 0).astype(np.uint8)
    back = np.stack(list(frames_at(encode_mp4(smooth, 8.0, quality), "mp4", range(5))))
    assert back.shape == smooth.shape
    assert 0 < np.abs(back.astype(int) - smooth).mean() < worst_mean


def test_odd_sides_gain_an_edge_pixel_only_where_the_format_needs_it(tmp_path):
    odd = CLIP[:, :31, :29]
    write_mp4(tmp_path / "a.mp4", odd, 8, lossless=True)
    np.testing.assert_array_equal(np.stack(list(frames_at(tmp_path / "a.mp4", "mp4", range(9)))), odd)
    buffer = io.BytesIO()
    write_mp4(buffer, odd, 8, lossless=False)
    seen = examine(buffer.getvalue(), "mp4")
    assert (seen.height, seen.width, len(seen.times), seen.fps) == (32, 30, 9, 8.0)
    assert np.allclose(np.diff(seen.times), 1 / 8)


def test_frames_are_chosen_by_number_with_repeats():
    np.testing.assert_array_equal(np.stack(list(frames_at(LOSSLESS, "mp4", (1, 1, 4, 8)))), CLIP[[1, 1, 4, 8]])
    with pytest.raises(BadSample, match="ends before"):
        list(frames_at(LOSSLESS, "mp4", (8, 9)))


def test_the_window_of_frames_is_drawn_from_the_key():
    firsts = set()
    for key in range(40):
        window = decode(LOSSLESS, "mp4", (5, 32, 32), key)
        (first,) = [n for n in range(5) if np.array_equal(window, CLIP[n : n + 5])]
        firsts.add(first)
        np.testing.assert_array_equal(window, decode(LOSSLESS, "mp4", (5, 32, 32), key))
    assert firsts == {0, 1, 2, 3, 4}
    with pytest.raises(BadSample, match="video of 9 frames, 10 needed"):
        decode(LOSSLESS, "mp4", (10, 32, 32), 0)


@pytest.mark.parametrize(("matrix", "turns"), [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_video_is_turned_upright(matrix, turns):
    """The display matrix (a b; c d) of ISO 14496-12 maps (x, y) to (a x + c y, b x + d y): 0 1 -1 0 is a clockwise quarter."""
    wide = encode_mp4(CLIP[:, 4:20], 8.0, "lossless")
    at = wide.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    turned = wide[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + wide[at + 36 :]
    expected = np.rot90(CLIP[:, 4:20], turns, axes=(1, 2))
    np.testing.assert_array_equal(np.stack(list(frames_at(turned, "mp4", range(9)))), expected)
    assert (examine(turned, "mp4").height, examine(turned, "mp4").width) == expected.shape[1:3]


def test_gifs_are_upscaled_by_whole_pixels(tmp_path):
    write_gif(tmp_path / "a.gif", CLIP, 10, scale=3)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.size, gif.n_frames, gif.info["duration"]) == ((96, 96), 9, 100)
        first = np.asarray(gif.convert("RGB")).astype(int)
    # A palette of 256 colours for a frame of fewer than that.
    assert np.abs(first - CLIP[0].repeat(3, 0).repeat(3, 1)).max() <= 8
    assert decode((tmp_path / "a.gif").read_bytes(), "gif", (9, 96, 96), 0).shape == (9, 96, 96, 3)


@pytest.mark.parametrize("cut", range(0, len(LOSSLESS), 97))
def test_a_truncated_video_is_a_bad_sample_or_whole(cut):
    try:
        back = decode(LOSSLESS[:cut], "mp4", (9, 32, 32), 0)
    except BadSample:
        return
    np.testing.assert_array_equal(back, CLIP)


def test_what_is_no_video_is_refused(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n".encode()
    concat = f"ffconcat version 1.0\nfile {secret}\n".encode()
    sound = io.BytesIO()
    with av.open(sound, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        for _ in range(3):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for data in (b"", b"nonsense" * 100, playlist, concat, sound.getvalue(), encode_png(CLIP[0])):
        for extension in ("mp4", "mkv", "avi", "gif"):
            with pytest.raises(BadSample):
                examine(data, extension)
    with pytest.raises(BadSample, match="no video stream"):
        examine(sound.getvalue(), "mp4")


def test_real_videos_decode_in_every_codec(shared_data):
    expected = {"av1_video.mkv": (125, 360, 640, 25.0), "h265_video.mp4": (10, 128, 128, 10.0), "nasa_13013.mp4": (325, 180, 320, 25.0)}
    for name, (count, height, width, fps) in expected.items():
        path = shared_data / "videos" / name
        seen = examine(path, path.suffix[1:])
        assert (len(seen.times), seen.height, seen.width, seen.fps) == (count, height, width, fps)
        assert all(a < b for a, b in pairwise(seen.times))
        clip = decode(path.read_bytes(), path.suffix[1:], (5, 48, 80), 7)
        assert clip.shape == (5, 48, 80, 3)
        assert clip.std() > 5


# --- images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(orientation):
    upright = np.zeros((24, 40, 3), np.uint8)
    upright[:12, :20] = 255  # the light corner is top left
    # How the camera stored it: the inverse of what the EXIF orientation asks for.
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright, 1), 7: np.rot90(upright, 2).transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    np.testing.assert_array_equal(decode_image(data), upright)
    assert image_size(data) == (24, 40)
    assert is_plain(data) == (orientation == 1)


def test_every_mode_becomes_rgb():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey = Image.fromarray(ramp)
    cases = {
        "grey": (encoded(grey, "PNG"), ramp),
        "sixteen": (encoded(Image.fromarray(ramp.astype(np.uint16) * 257), "PNG"), ramp),
        "palette": (encoded(Image.merge("RGB", [grey] * 3).quantize(256), "PNG"), ramp),
        "clear": (encoded(Image.merge("LA", [grey, Image.new("L", (16, 16), 0)]), "PNG"), np.full_like(ramp, 255)),
        "opaque": (encoded(Image.merge("RGBA", [grey] * 3 + [Image.new("L", (16, 16), 255)]), "WEBP", lossless=True), ramp),
        "bits": (encoded(Image.fromarray(ramp > 127), "PNG"), (ramp > 127) * np.uint8(255)),
    }
    for name, (data, expected) in cases.items():
        back = decode_image(data)
        assert (back.shape, back.dtype) == ((16, 16, 3), np.uint8), name
        assert np.abs(back.astype(int) - expected[..., None]).max() <= (8 if name == "palette" else 0), name
    cmyk = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    assert cmyk[..., 0].min() > 200
    assert cmyk[..., 1:].max() < 60


def _png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9000, 30000, 200000])
def test_huge_images_are_refused_by_their_header(side):
    for read in (decode_image, image_size):
        with pytest.raises(BadSample, match=r"pixels"):
            read(_png_header(side, side))


def test_images_of_other_formats_and_damaged_ones_are_bad_samples():
    png = encode_png(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    for data in (b"", b"GIF89a" + png, encoded(Image.new("RGB", (4, 4)), "BMP"), encoded(Image.new("RGB", (4, 4)), "TIFF"), png[:-200]):
        with pytest.raises(BadSample):
            decode_image(data)


def test_an_image_of_the_right_size_is_untouched_and_others_are_covered_and_cropped():
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    np.testing.assert_array_equal(decode(encode_png(picture), "png", (1, 20, 30), 5)[0], picture)
    lefts = set()
    for key in range(60):
        crop = decode(encode_png(picture), "png", (1, 20, 20), key)[0]
        (left,) = [n for n in range(11) if np.array_equal(crop, picture[:, n : n + 20])]
        lefts.add(left)
    assert lefts == set(range(11))
    np.testing.assert_array_equal(fit(picture, 20, 20, key=None), picture[:, 5:25])


def test_scaling_keeps_the_aspect_ratio():
    y, x = np.mgrid[:60, :80]
    disc = ((x - 39.5) ** 2 + (y - 29.5) ** 2 < 20**2).astype(np.uint8)[..., None].repeat(3, 2) * 255
    small = fit(disc, 30, 30, key=None) > 127
    assert abs(small.any(0)[:, 0].sum() - small.any(1)[:, 0].sum()) <= 1  # still as wide as high
    assert small[..., 0].sum() == pytest.approx(np.pi * 100, rel=0.05)


# --- arrays -----------------------------------------------------------------------------------------------------


def test_arrays_whose_header_lies_are_refused_before_memory_is_taken():
    buffer = io.BytesIO()
    np.save(buffer, np.ones((2, 3), np.float32))
    data = buffer.getvalue()
    np.testing.assert_array_equal(decode_npy(data), np.ones((2, 3), np.float32))
    for broken in (
        data[:-1],
        data + b"0",
        data.replace(b"(2, 3)", b"(2000000000, 3)"),
        data.replace(b"(2, 3)", b"(-1,-6)"),
        b"\x93NUMPY",
        b"",
    ):
        with pytest.raises(BadSample):
            decode_npy(broken)


@pytest.mark.parametrize("dtype", ["<f2", "<f4"])
def test_only_finite_arrays_are_taken_whatever_their_sign(dtype):
    limits = np.finfo(dtype)
    fine = np.array([0, -0.0, limits.max, limits.min, limits.tiny, -limits.smallest_subnormal], dtype)
    for odd in (None, np.inf, -np.inf, np.nan, np.copysign(np.nan, -1)):
        buffer = io.BytesIO()
        np.save(buffer, fine if odd is None else np.append(fine, np.array(odd, dtype)))
        if odd is None:
            np.testing.assert_array_equal(decode_npy(buffer.getvalue()), fine)
        else:
            with pytest.raises(BadSample, match="NaN or infinite"):
                decode_npy(buffer.getvalue())


def test_a_picture_so_narrow_that_it_fills_the_memory_is_a_bad_sample():
    for shape in ((1, 10_000, 3), (10_000, 1, 3)):
        with pytest.raises(BadSample, match="too narrow to fill 256 x 256"):
            fit(np.zeros(shape, np.uint8), 256, 256, key=None)
    assert fit(np.zeros((4, 2000, 3), np.uint8), 64, 64, key=None).shape == (64, 64, 3)
