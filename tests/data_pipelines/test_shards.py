"""Shards: readable by every tar reader, the same bytes every time, and no damage goes unnoticed."""

import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_pipelines.decode import encode_png
from data_pipelines.errors import UserError
from data_pipelines.foreign import index_foreign
from data_pipelines.index import index_path, read_index
from data_pipelines.samples import BadSample, Facts
from data_pipelines.shards import ShardWriter, tar_header, verify_shard
from data_pipelines.storage import Member, checksum, read_members

IMAGE = Facts("image", 1, 8, 8, None)
PNG = encode_png(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))


def test_tarfile_and_the_index_see_the_same_members(tmp_path, write_shard):
    shard = write_shard(tmp_path / "s")
    index = read_index(index_path(str(shard)))
    raw = shard.read_bytes()
    with tarfile.open(shard) as tar:
        theirs = {m.name: tar.extractfile(m).read() for m in tar}
    ours = {f"{e.key}.{x}": raw[m.offset : m.offset + m.length] for e in index.entries for x, m in e.members.items()}
    assert ours == theirs
    assert len(theirs) == 30
    assert (index.length, len(index.entries)) == (len(raw), 10)


def test_webdataset_reads_our_shards_and_we_read_theirs(tmp_path, write_shard):
    ours = write_shard(tmp_path / "ours")
    theirs = tmp_path / "theirs.tar"
    samples = list(webdataset.WebDataset(str(ours), shardshuffle=False))
    index = read_index(index_path(str(ours)))
    assert [s["__key__"] for s in samples] == [e.key for e in index.entries]
    with webdataset.TarWriter(str(theirs)) as writer:
        for sample in samples:
            writer.write({k: v for k, v in sample.items() if k in ("__key__", "png", "txt", "cls")})
    found = index_foreign(theirs)
    assert found.problems == ()
    for sample, entry in zip(samples, found.entries, strict=True):
        assert entry.key == sample["__key__"]
        assert entry.facts == IMAGE
        assert entry.caption_length == len("picture 0")
        data = read_members(str(theirs), entry.members)
        assert data == {name: sample[name] for name in ("png", "txt", "cls")}


def test_the_same_samples_give_the_same_bytes(tmp_path, write_shard):
    a, b = write_shard(tmp_path / "a"), write_shard(tmp_path / "b")
    assert a.read_bytes() == b.read_bytes()
    assert Path(index_path(str(a))).read_bytes() == Path(index_path(str(b))).read_bytes()
    with tarfile.open(a) as tar:
        assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in tar} == {(0, 0, 0, 0o644, "")}


def test_long_and_non_ascii_keys_survive(tmp_path):
    key = "ordner/" + "ü" * 80
    with ShardWriter(tmp_path / "x.tar") as shard:
        shard.add(key, {"png": PNG, "txt": b"c"}, IMAGE, {})
    (sample,) = webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False)
    assert sample["__key__"] == key
    assert sample["png"] == PNG
    entry = read_index(index_path(str(tmp_path / "x.tar"))).entries[0]
    assert read_members(str(tmp_path / "x.tar"), entry.members) == {"png": PNG, "txt": b"c"}


@pytest.mark.parametrize(
    "name", ["a.png", "a/b/0001.latents.npy", "x" * 96 + ".txt", "x" * 97 + ".txt", "d" * 90 + "/" + "k" * 60 + ".png", "ü.png"]
)
@pytest.mark.parametrize("size", [0, 1, 511, 20_000, 8**11 - 1, 8**11])
def test_headers_are_those_of_tarfile(name, size):
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    assert tar_header(name, size) == info.tobuf(tarfile.PAX_FORMAT)


@pytest.mark.parametrize("key", ["", "/abs", "a/../b", "a\\b", "a.b", "a\nb", "x" * 201])
def test_unsafe_keys_are_refused(tmp_path, key):
    with ShardWriter(tmp_path / "y.tar") as shard, pytest.raises(ValueError):
        shard.add(key, {"png": PNG}, IMAGE, {})


def test_an_error_leaves_neither_a_shard_nor_an_index_nor_a_partial_file(tmp_path):
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path / "x.tar") as shard:
        shard.add("k", {"png": PNG}, IMAGE, {"at": 1 / 0})
    assert list(tmp_path.iterdir()) == []


def test_a_repeated_key_is_refused(tmp_path):
    with ShardWriter(tmp_path / "x.tar") as shard:
        shard.add("k", {"png": PNG}, IMAGE, {})
        with pytest.raises(ValueError, match="twice"):
            shard.add("k", {"png": PNG}, IMAGE, {})


def test_an_old_index_never_vouches_for_a_new_tar(tmp_path, write_shard):
    folder = tmp_path / "s"
    shard = write_shard(folder)
    with ShardWriter(shard) as writer:
        writer.add("other", {"png": PNG}, IMAGE, {})
    assert [e.key for e in read_index(index_path(str(shard))).entries] == ["other"]
    assert verify_shard(shard).intact


def test_a_crash_between_a_tar_and_its_index_leaves_the_shard_unfinished(tmp_path, write_shard):
    shard = write_shard(tmp_path / "s")
    with pytest.raises(TypeError), ShardWriter(shard) as writer:
        writer.add("k", {"png": PNG}, IMAGE, {"not": object()})  # fails when the index is written, after the tar
    assert not Path(index_path(str(shard))).exists()


# --- damage -----------------------------------------------------------------------------------------------------


def test_every_truncation_is_noticed_and_whole_samples_are_kept(tmp_path, write_shard):
    shard = write_shard(tmp_path / "s")
    index = read_index(index_path(str(shard)))
    whole = shard.read_bytes()
    cut = tmp_path / "cut.tar"
    for length in range(0, len(whole), 97):
        cut.write_bytes(whole[:length])
        report = verify_shard(cut, index)
        assert report.damage, length
        lost = {e.key for e in index.entries if max(m.offset + m.length for m in e.members.values()) > length}
        assert {key for key, _ in report.bad} == lost, length


def test_every_flipped_bit_is_noticed_and_costs_at_most_its_own_sample(tmp_path, write_shard):
    shard = write_shard(tmp_path / "s")
    index = read_index(index_path(str(shard)))
    whole = shard.read_bytes()
    draw = random.Random(0)
    for _ in range(300):
        position = draw.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[position] ^= 1 << draw.randrange(8)
        shard.write_bytes(damaged)
        report = verify_shard(shard, index)
        hit = {e.key for e in index.entries for m in e.members.values() if m.offset <= position < m.offset + m.length}
        assert report.damage
        assert {key for key, _ in report.bad} == hit


def test_a_member_is_verified_when_it_is_read(tmp_path, write_shard):
    shard = write_shard(tmp_path / "s")
    member = read_index(index_path(str(shard))).entries[0].members["txt"]
    assert read_members(str(shard), {"txt": member}) == {"txt": b"picture 0"}
    far = Member(len(shard.read_bytes()) - 9, 9, checksum(bytes(9)))
    assert read_members(str(shard), {"txt": member, "end": far}) == {"txt": b"picture 0", "end": bytes(9)}
    with pytest.raises(BadSample, match="checksum"):
        read_members(str(shard), {"txt": member._replace(offset=member.offset + 1)})
    with pytest.raises(BadSample, match="truncated"):
        read_members(str(shard), {"txt": member, "end": member._replace(offset=10**9)})
    with pytest.raises(BadSample, match="missing"):
        read_members(str(tmp_path / "gone.tar"), {"txt": member})


@pytest.mark.parametrize("address", ["pipe:cat /etc/passwd", "http://169.254.169.254/x", "simplecache::file:///x", "ftp://h/x"])
def test_addresses_of_other_schemes_are_refused(address):
    with pytest.raises(UserError, match=r"data\.sources"):
        read_members(address, {"txt": Member(0, 1, "")})


def test_a_damaged_index_is_refused(tmp_path, write_shard):
    place = Path(index_path(str(write_shard(tmp_path / "s"))))
    text = place.read_text()
    for broken in (text[:-50], text.replace('"width": 8', '"width": 9', 1), "[" * 100_000, json.dumps({"schema": 1})):
        place.write_text(broken)
        with pytest.raises(UserError, match="delete this file"):
            read_index(str(place))
    place.write_text(text.replace('"schema": 1', '"schema": 2'))
    with pytest.raises(UserError, match="schema 2, expected 1"):
        read_index(str(place))
