"""The loader: the planned stream, decoded, whatever the number of ranks and workers, with holes where data is bad."""

import hashlib
import io
import json

import numpy as np
import pytest
import torch

from data_pipelines import moving_shapes
from data_pipelines.config import DataConfig
from data_pipelines.decode import encode_png
from data_pipelines.errors import UserError
from data_pipelines.index import index_path, read_index
from data_pipelines.loader import StepStream
from data_pipelines.plan import START, open_plan
from data_pipelines.raw import read_sample
from data_pipelines.samples import Facts
from data_pipelines.shards import ShardWriter


def grid_of(facts):
    return (facts.frames + 3) // 4, facts.height // 16, facts.width // 16


def plan_of(folder, seed=0, **changes):
    values = {"sources": [{"path": str(folder)}], "token_budget": 40, "packs_per_step": 4, "sizes": [(9, 32, 32)], "num_workers": 0}
    return open_plan(DataConfig(**{**values, "window_shards": 2, **changes}), grid_of, seed)


def fingerprint(packs):
    """Hash of the packs of a step, whichever rank reads which."""
    digests = []
    for pack in packs:
        digest = hashlib.sha256(repr(pack.place).encode())
        for sample in pack.samples:
            digest.update(f"{sample.id} {sample.key} {sample.caption} {sample.error}".encode())
            digest.update(sample.pixels.numpy().tobytes() if sample.pixels is not None else b"-")
        digests.append(digest.hexdigest())
    return tuple(sorted(digests))


def run(folder, world_size, workers, count, start=START):
    """Hashes of every step over all ranks, and the position after the last."""
    plan = plan_of(folder, num_workers=workers)
    streams = [StepStream(plan, rank, world_size, start) for rank in range(world_size)]
    hashes = []
    for _ in range(count):
        parts = [next(stream) for stream in streams]
        assert len({(part.samples, part.position) for part in parts}) == 1
        assert parts[0].samples == sum(len(pack.samples) for part in parts for pack in part.packs)
        assert {pack.place.samples for part in parts for pack in part.packs} == {parts[0].samples}
        numbers = [pack.place.first + i for part in parts for pack in part.packs for i in range(len(pack.samples))]
        assert sorted(numbers) == list(range(parts[0].samples))  # each sample has its own
        hashes.append(fingerprint([pack for part in parts for pack in part.packs]))
    for stream in streams:
        stream.close()
    return hashes, parts[0].position


@pytest.fixture(scope="module")
def reference(shapes):
    return run(shapes, 1, 0, 8)


@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (4, 0), (1, 1), (1, 2), (2, 1)])
def test_the_stream_depends_on_neither_ranks_nor_workers(shapes, reference, world_size, workers):
    assert run(shapes, world_size, workers, 8) == reference
    assert len(set(reference[0])) == 8


@pytest.mark.parametrize("cut", [1, 3, 5, 7])
def test_a_stream_that_is_cut_goes_on_as_if_it_had_not_been(shapes, reference, cut):
    before, position = run(shapes, 2, 0, cut)
    after, end = run(shapes, 4, 0, 8 - cut, position)
    assert (before + after, end) == reference


def test_pixels_captions_and_keys_are_those_of_the_rendered_clips(shapes):
    with StepStream(plan_of(shapes), 0, 1) as stream:
        step = next(stream)
    for pack in step.packs:
        assert len(pack.samples) == len(pack.grids) == 3
        assert set(pack.grids) == {(3, 2, 2)}
        for sample in pack.samples:
            clip = moving_shapes.draw(3, int(sample.id.rpartition("/")[2]))
            assert sample.caption == clip.caption
            assert sample.label is None
            assert sample.error is None
            assert sample.pixels.dtype == torch.uint8
            np.testing.assert_array_equal(sample.pixels.numpy(), clip.video)
    assert step.bad == []
    assert step.counters == {}


def test_the_process_wide_generator_is_left_alone(shapes):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with StepStream(plan_of(shapes), 0, 1) as stream:
        next(stream)
    assert torch.equal(torch.get_rng_state(), before)


# --- holes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def zoo(tmp_path):
    """One shard of nine samples, most of them bad in different ways."""
    picture = np.full((16, 16, 3), 77, np.uint8)
    good = encode_png(picture)
    image = Facts("image", 1, 16, 16, None)
    samples = {
        "good": {"png": good, "txt": b"fine", "cls": b"4"},
        "silent": {"png": good},
        "empty": {"png": good, "txt": b"  \n"},
        "broken": {"png": good[:40], "txt": b"x"},
        "short": {"png": encode_png(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))[:-200]},
        "text": {"png": b"this is no picture"},
        "class": {"png": good, "cls": b"four"},
        "flipped": {"png": good, "txt": b"damaged on disk"},
    }
    (tmp_path / "zoo").mkdir()
    path = tmp_path / "zoo" / "shard-000000.tar"
    with ShardWriter(path) as shard:
        for key, members in samples.items():
            shard.add(key, members, image, {})
        shard.add("playlist", {"mp4": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n"}, Facts("video", 1, 16, 16, 8.0), {})
    entry = next(e for e in read_index(index_path(str(path))).entries if e.key == "flipped")
    data = bytearray(path.read_bytes())
    data[entry.members["png"].offset + 50] ^= 4
    path.write_bytes(data)
    return path.parent


REASONS = {
    "broken": "not a JPEG, PNG, WEBP image",
    "short": "image cannot be decoded",
    "text": "not a JPEG, PNG, WEBP image",
    "class": "class label is not a whole number",
    "flipped": "checksum mismatch",
    "playlist": "video cannot be decoded",
}


def test_bad_samples_leave_holes_that_keep_their_place(zoo):
    plan = plan_of(zoo, token_budget=9, packs_per_step=1, sizes=[(1, 16, 16)])
    with StepStream(plan, 0, 1) as stream:
        step = next(stream)
    (pack,) = step.packs
    assert step.samples == len(pack.samples) == len(pack.grids) == 9
    samples = {sample.id.rpartition("/")[2]: sample for sample in pack.samples}
    assert {key for key, sample in samples.items() if sample.error} == set(REASONS)
    for key, reason in REASONS.items():
        assert samples[key].error.startswith(reason)
        assert samples[key].pixels is None
        assert (samples[key].id, samples[key].error) in step.bad
    assert (samples["good"].caption, samples["good"].label) == ("fine", 4)
    assert samples["good"].pixels.shape == (1, 16, 16, 3)
    assert (samples["good"].pixels == 77).all()
    assert step.counters == {"empty_captions": 2}
    assert samples["silent"].caption == samples["empty"].caption == ""


def test_a_skip_list_makes_holes_without_reading(zoo):
    plan = plan_of(zoo, token_budget=9, packs_per_step=1, sizes=[(1, 16, 16)])
    with StepStream(plan, 0, 1, skip=frozenset({"zoo/shard-000000/good"})) as stream:
        step = next(stream)
    assert dict(step.bad)["zoo/shard-000000/good"] == "on the skip list"
    assert len(step.bad) == 7
    assert step.samples == 9


def test_a_missing_shard_leaves_holes(tmp_path, write_shard):
    folder = tmp_path / "s"
    gone = write_shard(folder, 0, 3, 16)
    write_shard(folder, 1, 3, 16)
    plan = plan_of(folder, token_budget=6, packs_per_step=1, sizes=[(1, 16, 16)])
    gone.unlink()
    with StepStream(plan, 0, 1) as stream:
        step = next(stream)
    assert [reason for _, reason in step.bad] == ["shard is missing"] * 3
    assert step.samples == 6


# --- caches -----------------------------------------------------------------------------------------------------


def _npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_cached_latents_and_text_come_back_as_they_were_stored(tmp_path):
    draws = np.random.default_rng(0)
    latents = draws.normal(size=(4, 3, 4, 6)).astype(np.float16)
    text = draws.normal(size=(5, 7)).astype(np.float32)
    bad = latents.copy()
    bad[0, 0, 0, 0] = np.nan
    facts = Facts("latents", 3, 4, 6, None)
    other = {
        "fortran": np.asfortranarray(latents),
        "objects": np.array([{"a": 1}], dtype=object),
        "double": latents.astype(float),
        "nan": bad,
    }
    (tmp_path / "c").mkdir()
    with ShardWriter(tmp_path / "c" / "shard-000000.tar") as shard:
        shard.add("good", {"latents.npy": _npy(latents), "text.npy": _npy(text), "txt": b"hello"}, facts, {"label": 2})
        for key, array in other.items():
            shard.add(key, {"latents.npy": _npy(array)}, facts, {})
        shard.add("size", {"latents.npy": _npy(latents[:, :2])}, facts, {})
    plan = open_plan(
        DataConfig(sources=[{"path": str(tmp_path / "c")}], token_budget=200, packs_per_step=1, num_workers=1),
        lambda f: (f.frames, f.height // 2, f.width // 2),
        0,
    )
    with StepStream(plan, 0, 1) as stream:
        samples = {sample.id.rpartition("/")[2]: sample for sample in next(stream).packs[0].samples}
    good = samples.pop("good")
    assert good.latents.dtype == torch.float16
    assert good.caption == "hello"
    assert good.label == 2
    assert good.pixels is None
    np.testing.assert_array_equal(good.latents.numpy(), latents)
    np.testing.assert_array_equal(good.text.numpy(), text)
    assert {key: bool(sample.error) for key, sample in samples.items()} == dict.fromkeys([*other, "size"], True)
    assert "NaN" in samples["nan"].error
    assert "expected float16 or float32 in C order" in samples["double"].error


def test_a_sample_can_be_replayed_alone(shapes):
    plan = plan_of(shapes, sizes=[(5, 16, 24)])
    with StepStream(plan, 0, 1) as stream:
        sample = next(stream).packs[0].samples[1]
    planned = plan.step(START).packs[0][1]
    alone = read_sample(planned)
    assert (alone.id, alone.key) == (sample.id, sample.key)
    assert torch.equal(alone.pixels, sample.pixels)


def test_a_world_size_that_does_not_divide_is_refused(shapes):
    with pytest.raises(UserError, match="4 % 3 = 1"):
        StepStream(plan_of(shapes), 0, 3)


def test_positions_are_plain_json(shapes):
    position = plan_of(shapes).step(START).after
    assert json.loads(json.dumps(position)) == list(position)
