"""Shards of others and folders of shards: whole samples only, everything left out is reported."""

import io
import random
import shutil
import tarfile
from collections import Counter

import numpy as np
import pytest
import webdataset

from data_pipelines.__main__ import main
from data_pipelines.decode import encode_png
from data_pipelines.errors import UserError
from data_pipelines.foreign import index_foreign
from data_pipelines.index import index_path, read_index
from data_pipelines.samples import BadSample, Facts, split_name
from data_pipelines.sources import read_source

IMAGE = Facts("image", 1, 8, 8, None)
PNG = encode_png(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))


def _tar(path, members, kind=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_a_foreign_tar_cut_anywhere_yields_whole_samples_only(tmp_path, write_shard):
    shard = write_shard(tmp_path / "s", samples=6)
    complete = read_index(index_path(str(shard)))
    fields = {e.key: set(e.members) for e in complete.entries}
    ends = [max(m.offset + m.length for m in e.members.values()) for e in complete.entries]
    whole = shard.read_bytes()
    last_data = -(-ends[-1] // 512) * 512
    cut = tmp_path / "cut.tar"
    for length in range(0, last_data, 97):
        cut.write_bytes(whole[:length])
        found = index_foreign(cut)
        assert found.problems, length
        assert all(set(e.members) == fields[e.key] for e in found.entries), length
        have = sum(-(-end // 512) * 512 <= length for end in ends)
        assert len(found.entries) >= have - 1, length  # only the last whole one may be in doubt


def test_a_flipped_bit_in_a_foreign_tar_is_noticed_or_in_content_that_nobody_vouches_for(tmp_path, write_shard):
    """300 flips: in headers all are found; in padding they are harmless; in content only a decoder could tell before there is an index."""
    shard = write_shard(tmp_path / "s", side=16)
    whole, draw, found_in = shard.read_bytes(), random.Random(1), Counter()
    foreign = tmp_path / "foreign.tar"
    foreign.write_bytes(whole)
    intact = index_foreign(foreign)
    fields = {e.key: set(e.members) for e in intact.entries}
    contents = [(e.key, m.offset, m.offset + m.length) for e in intact.entries for m in e.members.values()]
    headers = {start - 512 for _, start, _ in contents}
    for _ in range(300):
        position = draw.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[position] ^= 1 << draw.randrange(8)
        foreign.write_bytes(damaged)
        found = index_foreign(foreign)
        assert all(set(e.members) == fields[e.key] for e in found.entries), position
        assert len(found.entries) >= len(intact.entries) - 2, position
        hit = next((key for key, start, end in contents if start <= position < end), None)
        if hit is not None:
            found_in["content"] += 1
            assert [e for e in found.entries if e.key != hit] == [e for e in intact.entries if e.key != hit]
            assert found.problems or next(e for e in found.entries if e.key == hit) not in intact.entries  # its new checksum is on record
        elif position // 512 * 512 in headers and position % 512 != 155:  # the byte after the header's checksum means nothing
            found_in["header"] += 1
            assert found.problems, position
        else:
            found_in["padding"] += 1
            beyond = position >= -(-contents[-1][2] // 512) * 512  # in a block that may have been a header
            assert found.entries == (intact.entries[:-1] if beyond else intact.entries), position
    assert min(found_in[where] for where in ("content", "header", "padding")) > 30, found_in


def test_a_damaged_header_in_a_foreign_tar_does_not_end_the_shard(tmp_path, write_shard):
    shard = write_shard(tmp_path / "s")
    index = read_index(index_path(str(shard)))
    damaged = bytearray(shard.read_bytes())
    damaged[index.entries[4].members["png"].offset - 512 + 150] ^= 1  # its header's checksum
    path = tmp_path / "foreign.tar"
    path.write_bytes(damaged)
    found = index_foreign(path)
    keys = [e.key for e in index.entries]
    assert [e.key for e in found.entries] == [k for i, k in enumerate(keys) if i != 4]
    assert any("damaged header" in why for _, why in found.problems)
    assert any(what == keys[4] for what, _ in found.problems)
    assert len(list(webdataset.WebDataset(str(path), shardshuffle=False))) <= 5  # what others make of it


def test_a_sample_that_lost_its_first_member_is_not_half_kept(tmp_path, write_shard):
    shard = write_shard(tmp_path / "s")
    index = read_index(index_path(str(shard)))
    damaged = bytearray(shard.read_bytes())
    damaged[index.entries[4].members["cls"].offset - 512 + 10] ^= 1  # the first of its members, so the one before is in doubt as well
    path = tmp_path / "foreign.tar"
    path.write_bytes(damaged)
    keys = [e.key for e in index.entries]
    assert [e.key for e in index_foreign(path).entries] == keys[:3] + keys[5:]


def _joined(whole, _):
    return whole + whole, len(whole)


def _with_a_lost_page(whole, index):
    start = index.entries[2].members["cls"].offset - 512
    return whole[:start] + bytes(4096) + whole[start + 4096 :], start + 4096


def _with_a_late_byte(whole, _):
    return whole + bytes(2 << 20) + b"x", len(whole) + (2 << 20)


@pytest.mark.parametrize("harm", [_joined, _with_a_lost_page, _with_a_late_byte])
def test_what_lies_behind_a_block_of_zeros_is_reported(tmp_path, write_shard, harm):
    shard = write_shard(tmp_path / "s", side=16)
    index, path = read_index(index_path(str(shard))), tmp_path / "foreign.tar"
    data, begin = harm(shard.read_bytes(), index)
    path.write_bytes(data)
    found = index_foreign(path)
    kept = found.entries
    assert [e.key for e in kept] == [e.key for e in index.entries[: len(kept)]]
    assert all(set(e.members) == {"png", "txt", "cls"} for e in kept)
    behind, last = found.problems
    assert behind == (f"byte {begin}", f"{len(data) - begin} bytes behind the end mark of the archive are not read")
    assert last == (index.entries[len(kept)].key, "next to a damaged place, may be incomplete")


@pytest.mark.parametrize("zeros", [0, 1, 512, 3 << 20])
def test_zeros_behind_the_end_mark_are_padding(tmp_path, write_shard, zeros):
    shard, path = write_shard(tmp_path / "s"), tmp_path / "foreign.tar"
    path.write_bytes(shard.read_bytes() + bytes(zeros))
    found = index_foreign(path)
    assert found.problems == ()
    assert [e.key for e in found.entries] == [e.key for e in read_index(index_path(str(shard))).entries]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_in_any_order_make_samples(tmp_path, kind):
    long = "d" * 90 + "/" + "k" * 60
    keys = ["a", "sub/b", long]
    path = _tar(tmp_path / "t.tar", [(f"./{k}.PNG", PNG) for k in keys] + [(f"./{k}.txt", b"hi") for k in reversed(keys)], kind)
    index = index_foreign(path)
    assert {e.key: set(e.members) for e in index.entries} == {k: {"png", "txt"} for k in keys}
    assert [e.key for e in read_index(index_path(str(path))).entries] == keys  # written beside it


def test_what_is_no_sample_is_reported(tmp_path):
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:

        def add(name, data=b"", kind=tarfile.REGTYPE):
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), kind, "good.png"
            tar.addfile(info, io.BytesIO(data))

        add("good.png", PNG)
        add("good.txt", b"caption")
        add("link.png", kind=tarfile.SYMTYPE)
        add("device.png", kind=tarfile.CHRTYPE)
        add("../../escape.png", PNG)
        add("/abs.png", PNG)
        add("README", b"x")
        add(".hidden.png", PNG)
        add("good.png", PNG)
        add("lonely.txt", b"no picture")
        add("evil.pkl", b"cos\nsystem\n(S'false'\ntR.")
        add("broken.png", PNG[:20])
        add("latin.png", PNG)
        add("latin.txt", b"\xff\xfe\xff")
    index = index_foreign(path)
    assert [e.key for e in index.entries] == ["good"]
    reasons = dict(index.problems)
    assert reasons["link.png"] == reasons["device.png"] == "not a regular file"
    assert reasons["../../escape.png"] == reasons["/abs.png"] == "unsafe member name"
    assert reasons["README"] == reasons[".hidden.png"] == "member name without key or extension"
    assert reasons["good.png"] == "the same member twice, the first is used"
    assert reasons["lonely"] == reasons["evil"] == "no image, video or latents member"
    assert "image cannot be decoded" in reasons["broken"] or "not a JPEG" in reasons["broken"]
    assert reasons["latin"] == "caption is not UTF-8"


def test_names_split_by_the_webdataset_rule():
    assert split_name("a/b.c/k.latents.NPY") == ("a/b.c/k", "latents.npy")
    assert split_name("./x.jpg") == ("x", "jpg")
    with pytest.raises(BadSample):
        split_name("a/../b.jpg")


# --- folders ----------------------------------------------------------------------------------------------------


def test_a_source_is_summed_up_and_its_hash_follows_its_content(tmp_path, write_shard):
    folder = tmp_path / "s"
    for number in range(3):
        write_shard(folder, number)
    manifest = read_source(str(folder))
    assert (manifest.samples, len(manifest.shards), dict(manifest.facts)) == (30, 3, {IMAGE: 30})
    shutil.copytree(folder, tmp_path / "copy")
    assert read_source(str(tmp_path / "copy")).hash == manifest.hash
    write_shard(tmp_path / "copy", 1, samples=9)
    assert read_source(str(tmp_path / "copy")).hash != manifest.hash


def test_a_truncated_shard_and_left_out_samples_are_told_at_the_start(tmp_path, write_shard):
    folder = tmp_path / "s"
    shard = write_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-5000])
    _tar(folder / "theirs.tar", [("a.png", PNG), ("b.txt", b"x")])
    problems = read_source(str(folder)).problems
    assert any("when it was indexed" in p for p in problems)
    assert any("1 x no image" in p for p in problems)


def test_an_index_whose_tar_is_gone_is_a_problem_and_damage(tmp_path, write_shard, capsys):
    folder = tmp_path / "s"
    shards = [write_shard(folder, number) for number in range(3)]
    whole = read_source(str(folder))
    shards[0].unlink()
    source = read_source(str(folder))
    assert source.problems == (f"{shards[0]} is missing, but its index is there; its samples will be holes",)
    assert (source.hash, source.shards) == (whole.hash, whole.shards)
    assert main(["check", str(folder)]) == 3
    said = capsys.readouterr()
    assert f"damaged: {shards[0]}: missing" in said.out
    assert "1 shards are damaged, 10 of 30 samples unusable" in said.err
    (folder / index_path(shards[0].name)).unlink()
    assert main(["check", str(folder)]) == 0


def test_folders_without_shards_are_named_with_their_key(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, said in [(tmp_path / "gone", "no such folder"), (empty, "no .tar shard")]:
        with pytest.raises(UserError, match=rf"data\.sources\[3\]\.path.*{said}"):
            read_source(str(path), config_key="data.sources[3].path")
    (empty / "x.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match="compressed tars cannot be read by offset"):
        read_source(str(empty))
    with pytest.raises(UserError, match="a file; expected the folder"):
        read_source(str(empty / "x.tar.gz"))
    (empty / "x.tar").write_bytes(b"not a tar")
    with pytest.raises(UserError, match="no usable sample"):
        read_source(str(empty))
