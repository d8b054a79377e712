"""The cache of shards on a local disk: what lies beside the copies, and what one reader may take from another."""

import shutil
import threading

import pytest

from data_pipelines import cache as cache_module
from data_pipelines.cache import ShardCache
from data_pipelines.config import CacheConfig
from data_pipelines.index import index_path, read_index
from data_pipelines.samples import BadSample


@pytest.fixture
def shard(tmp_path, write_shard):
    return write_shard(tmp_path / "s")


@pytest.mark.parametrize("below", ["", "shard-copies"])
def test_files_and_folders_of_others_are_neither_counted_nor_deleted(tmp_path, shard, below):
    folder = tmp_path / "disk" / below
    (folder / "a folder").mkdir(parents=True)
    names = ["thesis.tex", "photos.tar", f"{'0' * 32}-notes.txt", f"{'z' * 32}-photos.tar", f"{'0' * 32}photos.tar"]
    for name in names:
        (folder / name).write_bytes(bytes(10**6))
    index = read_index(index_path(str(shard)))
    cache = ShardCache.open(CacheConfig(path=str(tmp_path / "disk"), size_gb=1.5 * index.length / 1e9))
    addresses = [str(shard), str(shutil.copy(shard, tmp_path / "other.tar"))]
    for address in addresses:  # the second takes the place of the first
        copy = cache.pin(address, index, threading.Event())
        assert copy is not None
        copy.close()
    assert [cache.place(address).exists() for address in addresses] == [False, True]
    assert sorted(path.name for path in folder.iterdir() if path.stat().st_size == 10**6) == sorted(names)


def test_a_reader_without_a_copy_does_not_delete_one_that_was_published_meanwhile(tmp_path, monkeypatch):
    cache = ShardCache.open(CacheConfig(path=str(tmp_path)))
    address = "s3://bucket/shard-000000.tar"
    place, asked = cache.place(address), []

    def read(where, members, memory):
        asked.append(where)
        if len(asked) == 1:
            place.write_bytes(b"a copy that another process has just published")
        if where == str(place):
            raise BadSample("shard is missing")
        return {}

    monkeypatch.setattr(cache_module, "read_into", read)
    assert cache.read_into(address, {}, memoryview(b"")) == {}
    assert asked[-1] == address
    assert place.exists()


def test_of_a_copy_that_is_bad_only_that_one_is_deleted(tmp_path, monkeypatch):
    cache = ShardCache.open(CacheConfig(path=str(tmp_path)))
    address = "s3://bucket/shard-000000.tar"
    place, replaced = cache.place(address), [True, False]
    place.write_bytes(b"damaged")

    def read(where, members, memory):
        if where != str(place):
            return {}
        if replaced.pop(0):  # by another process, after this one has opened it
            (tmp_path / "new").write_bytes(b"whole")
            (tmp_path / "new").replace(place)
        raise BadSample("checksum mismatch")

    monkeypatch.setattr(cache_module, "read_into", read)
    for left in (True, False):
        assert cache.read_into(address, {}, memoryview(b"")) == {}
        assert place.exists() == left
