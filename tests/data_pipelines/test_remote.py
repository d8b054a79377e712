"""Remote shards on a real S3 server on loopback: the local stream exactly whatever the network does, or a clear end, never a silent one."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from data_pipelines import remote
from data_pipelines.__main__ import main
from data_pipelines.cache import ShardCache
from data_pipelines.config import CacheConfig, DataConfig
from data_pipelines.errors import AccessDenied, StorageUnavailable, UserError
from data_pipelines.index import index_path, read_index, spare_index_path
from data_pipelines.loader import StepStream
from data_pipelines.plan import open_plan
from data_pipelines.shards import verify_shard
from data_pipelines.sources import read_source
from data_pipelines.storage import pieces, read_file, read_range, room_for
from tests.fault_proxy import Fault, FaultProxy
from tests.processes import ENVIRONMENT, wait_for
from tests.rclone import KEY, SECRET, S3Server

SHARDS, SAMPLES = 4, 6


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with S3Server(tmp_path_factory.mktemp("s3") / "buckets") as server:
        yield server


@pytest.fixture(scope="module")
def proxy(server):
    with FaultProxy(server.port) as proxy:
        yield proxy
    remote._filesystem.cache_clear()


@pytest.fixture
def s3(server, proxy, tmp_path, monkeypatch):
    """The server, with credentials in the environment and little patience."""
    for name, value in {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "XDG_CACHE_HOME": str(tmp_path / "xdg")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setattr(remote, "PATIENCE_SECONDS", 20.0)
    monkeypatch.setattr(remote, "STALL_SECONDS", 5.0)
    monkeypatch.setattr(remote, "_PAUSE", 0.01)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    proxy.harm(lambda request: None)
    return server


@pytest.fixture
def bucket(s3, tmp_path, write_shard):
    """Address of a bucket of four shards, and the folder that it is a copy of."""
    folder = tmp_path / "local" / "pictures"
    folder.parent.mkdir()
    for number in range(SHARDS):
        write_shard(folder, number, SAMPLES, 48)
    shutil.rmtree(s3.folder / "data", ignore_errors=True)
    shutil.copytree(folder, s3.folder / "data" / "pictures")
    return "s3://data/pictures", folder


def plan_of(address, **changes):
    values = {"sources": [{"path": str(address)}], "token_budget": 24, "packs_per_step": 1, "sizes": [(1, 16, 16)], "num_workers": 0}
    return open_plan(DataConfig(**{**values, "window_shards": 2, **changes}), lambda f: (1, f.height // 8, f.width // 8), 5)


def content(address, steps=4, **changes):
    with StepStream(plan_of(address, **changes), 0, 1) as stream:
        return [
            (sample.id, sample.error, sample.caption, sample.pixels.numpy().tobytes())
            for _ in range(steps)
            for pack in next(stream).packs
            for sample in pack.samples
        ]


# --- the whole path ---------------------------------------------------------------------------------------------


def test_a_remote_source_is_the_same_stream_as_a_local_one(bucket):
    address, folder = bucket
    assert read_source(address).hash == read_source(str(folder)).hash
    assert content(address) == content(folder)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(lambda r: {0: Fault(status=503), 2: Fault(status=429)}.get(r.number % 4), id="refused for now"),
        pytest.param(lambda r: {0: Fault(cut=0, reset=True), 2: Fault(cut=700, reset=True)}.get(r.number % 4), id="reset"),
        pytest.param(lambda r: Fault(cut=1500) if r.number % 2 else None, id="short read"),
    ],
)
def test_faults_of_the_network_change_nothing(bucket, proxy, fault):
    address, folder = bucket
    proxy.harm(fault)
    assert content(address) == content(folder)
    hurt = sum(fault(request) is not None for request in proxy.requests)
    assert 5 < hurt < len(proxy.requests) < 400


def test_a_broken_read_goes_on_where_it_broke(s3, proxy):
    data = os.urandom(100_000)
    (s3.folder / "resume").mkdir(exist_ok=True)
    (s3.folder / "resume" / "x").write_bytes(data)
    proxy.harm(lambda r: Fault(cut=30_000) if r.number < 3 else None)
    assert read_range("s3://resume/x", 1000, 99_000) == data[1000:]
    assert [request.range for request in proxy.requests] == [f"bytes={1000 + 30_000 * k}-99999" for k in range(4)]
    assert read_file("s3://resume/x") == data
    assert b"".join(pieces("s3://resume/x")) == data


def test_a_truncated_and_a_missing_remote_shard_cost_their_own_samples(bucket, s3):
    address, _ = bucket
    first, second = sorted((s3.folder / "data" / "pictures").glob("*.tar"))[:2]
    index = read_index(index_path(str(first)))
    plan = plan_of(address, window_shards=4, token_budget=96)
    end = max(m.offset + m.length for m in index.entries[3].members.values())
    first.write_bytes(first.read_bytes()[:end])
    second.unlink()
    with StepStream(plan, 0, 1) as stream:
        reasons = sorted(reason for _, reason in next(stream).bad)
    assert reasons == ["shard is missing"] * SAMPLES + ["shard is truncated"] * (SAMPLES - 4)


def test_check_finds_damage_of_a_remote_shard(bucket, s3, capsys, tmp_path):
    address, _ = bucket
    assert main(["check", address]) == 0
    assert main(["show", address, str(tmp_path / "sheet.png")]) == 0
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    shard = s3.folder / "data" / "pictures" / "shard-000001.tar"
    place = read_index(index_path(str(shard))).entries[2].members["png"]
    data = bytearray(shard.read_bytes())
    data[place.offset + 9] ^= 1
    shard.write_bytes(data)
    assert main(["check", address]) == 3
    assert "shard-000001/1-002: checksum mismatch" in capsys.readouterr().out


# --- a server that is gone --------------------------------------------------------------------------------------


@pytest.fixture
def own_server(s3, bucket, tmp_path, monkeypatch):
    """A second server over the same buckets, to be harmed."""
    other = S3Server(s3.folder)
    with other:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{other.port}")
        remote._filesystem.cache_clear()
        yield other
    remote._filesystem.cache_clear()


@pytest.mark.parametrize("harm", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_is_gone_ends_the_stream_with_an_error(bucket, own_server, monkeypatch, harm):
    monkeypatch.setattr(remote, "PATIENCE_SECONDS", 2.0)
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.5)
    with StepStream(plan_of(bucket[0]), 0, 1) as stream:
        assert next(stream).bad == []
        own_server.process.send_signal(harm)
        started = time.monotonic()
        with pytest.raises(StorageUnavailable, match=r"s3://data/pictures/.*no answer in .*start the same command") as raised:
            assert [next(stream).bad for _ in range(SHARDS * SAMPLES)] == ["no step but an error"]
    assert time.monotonic() - started < 15
    assert raised.value.exit_code == 75


def test_a_server_that_comes_back_is_forgiven(bucket, own_server):
    with StepStream(plan_of(bucket[0]), 0, 1) as stream:
        next(stream)
        own_server.process.kill()
        own_server.process.wait()
        back = threading.Timer(1.5, own_server.start)
        back.start()
        assert all(next(stream).bad == [] for _ in range(6))
        back.join()


@pytest.mark.parametrize("given", ["2m", "", "-1", "nan"])
def test_a_patience_that_is_no_number_of_seconds_is_said_when_a_store_is_used(monkeypatch, capsys, given):
    monkeypatch.setenv("DIT_S3_PATIENCE", given)
    assert main(["check", "s3://data/pictures"]) == UserError.exit_code
    assert re.fullmatch(rf"error: DIT_S3_PATIENCE = '{given}': expected seconds to wait.*\n", capsys.readouterr().err)


def test_a_patience_that_is_no_number_of_seconds_does_not_hinder_who_uses_no_store(tmp_path, write_shard):
    write_shard(tmp_path / "s")
    command = [sys.executable, "-m", "data_pipelines", "check", str(tmp_path / "s")]
    done = subprocess.run(command, env=ENVIRONMENT | {"DIT_S3_PATIENCE": "2m"}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("wrong", [{"AWS_SECRET_ACCESS_KEY": "wrong"}, {"AWS_ACCESS_KEY_ID": "WRONGKEY12345678"}, {}])
def test_wrong_credentials_fail_at_once_and_say_whose_they_are(bucket, monkeypatch, capsys, wrong):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        if name in wrong:
            monkeypatch.setenv(name, wrong[name])
        elif not wrong:
            monkeypatch.delenv(name)
    remote._filesystem.cache_clear()
    started = time.monotonic()
    code = main(["check", bucket[0]])
    remote._filesystem.cache_clear()
    assert code == AccessDenied.exit_code == 5
    assert time.monotonic() - started < 3
    said = capsys.readouterr().err
    assert "s3://data: access denied for" in said
    assert {"AWS_SECRET_ACCESS_KEY": "TEST...", "AWS_ACCESS_KEY_ID": "WRON...", "": "profile 'default'"}[next(iter(wrong), "")] in said
    assert not any(secret in said for secret in (SECRET, "wrong)", KEY, "WRONGKEY1"))


# --- shards of others -------------------------------------------------------------------------------------------


def test_remote_tars_are_indexed_once_and_what_is_done_is_kept(bucket, s3, proxy, capsys):
    address, folder = bucket
    theirs = s3.folder / "data" / "pictures"
    keep = "shard-000002.tar"
    for shard in theirs.glob("*.index.json"):
        if shard.name != index_path(keep):
            shard.unlink()
    kept = (theirs / index_path(keep)).stat().st_mtime_ns
    assert main(["index", address]) == 0
    said = capsys.readouterr().out
    assert re.search(r"indexing  1/1 MB  [\d.]+/s", said)
    assert f"{SHARDS * SAMPLES} samples in {SHARDS} shards" in said
    source = read_source(address)
    assert source.samples == SHARDS * SAMPLES
    assert (theirs / index_path(keep)).stat().st_mtime_ns == kept
    for shard in folder.glob("*.tar"):
        ours, found = read_index(index_path(str(shard))), read_index(str(theirs / index_path(shard.name)))
        assert [(e.key, e.members, e.facts) for e in found.entries] == [(e.key, e.members, e.facts) for e in ours.entries]
        assert (found.checksum, found.length) == (ours.checksum, ours.length)
    proxy.harm(lambda r: None)
    assert read_source(address).hash == source.hash
    assert not any(request.path.endswith(".tar") for request in proxy.requests)


def test_indexes_of_a_bucket_that_may_only_be_read_lie_in_the_users_cache(bucket, s3, proxy):
    address, _ = bucket
    for shard in (s3.folder / "data" / "pictures").glob("*.index.json"):
        shard.unlink()
    proxy.harm(lambda r: Fault(status=403) if r.method == "PUT" else None)
    source = read_source(address)
    assert source.samples == SHARDS * SAMPLES
    assert all(spare_index_path(shard.address).is_file() for shard in source.shards)
    assert read_source(address).hash == source.hash
    assert source.index(source.shards[0]).entries


# --- the cache on the local disk --------------------------------------------------------------------------------


def wait_until_copied(cache, plan, count):
    addresses = {shard.address for _, shard in plan.shards(0, 0) + plan.shards(0, 1)}
    wait_for(lambda: sum(cache.place(address).exists() for address in addresses) == count, 20)


def test_prefetched_shards_are_read_without_the_server(bucket, own_server, tmp_path):
    config = CacheConfig(path=str(tmp_path / "cache"), size_gb=1)
    plan, cache = plan_of(bucket[0], cache=config, window_shards=SHARDS), ShardCache.open(config)
    expected = content(bucket[1], window_shards=SHARDS)
    with StepStream(plan, 0, 1) as stream:
        first = next(stream)
        wait_until_copied(cache, plan, SHARDS)
        own_server.process.kill()
        got = [first, *(next(stream) for _ in range(3))]
    assert [s.id for step in got for p in step.packs for s in p.samples] == [sample for sample, *_ in expected][:24]
    assert all(step.bad == [] for step in got)
    assert not list(cache.folder.glob("*.partial"))


def test_a_copy_is_verified_and_a_damaged_one_costs_a_remote_read(bucket, s3, tmp_path):
    address, folder = bucket
    cache = ShardCache.open(CacheConfig(path=str(tmp_path / "cache")))
    shard = read_source(address).shards[0]
    index, stop = read_index(shard.index), threading.Event()
    pin = cache.pin(shard.address, index, stop)
    assert cache.place(shard.address).read_bytes() == (folder / "shard-000000.tar").read_bytes()
    pin.close()

    def read():
        memory = memoryview(bytearray(room_for(index.entries[0].members)))
        return {name: bytes(data) for name, data in cache.read_into(shard.address, index.entries[0].members, memory).items()}

    wanted = read()
    copy = cache.place(shard.address)
    copy.write_bytes(b"\0" * copy.stat().st_size)
    assert read() == wanted
    assert not copy.exists()
    served = s3.folder / "data" / "pictures" / "shard-000000.tar"
    data = bytearray(served.read_bytes())
    data[700] ^= 1
    served.write_bytes(data)
    with pytest.raises(Exception, match="not what its index says"):
        cache.pin(shard.address, index, stop)
    assert os.listdir(cache.folder) == [".lock"]


def test_the_bound_holds_and_pinned_copies_stay(bucket, tmp_path):
    address, folder = bucket
    length = max(path.stat().st_size for path in folder.glob("*.tar"))
    cache = ShardCache(ShardCache.open(CacheConfig(path=str(tmp_path / "cache"))).folder, int(2.5 * length))
    shards, stop = read_source(address).shards, threading.Event()
    pins = [cache.pin(shard.address, read_index(shard.index), stop) for shard in shards]
    assert [pin is not None for pin in pins] == [True, True, False, False]
    pins[0].close()
    reader = cache.place(shards[0].address).open("rb")
    assert cache.pin(shards[2].address, read_index(shards[2].index), stop) is not None
    assert [cache.place(shard.address).exists() for shard in shards] == [False, True, True, False]
    assert reader.read() == (folder / "shard-000000.tar").read_bytes()  # evicted under its reader
    assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= cache.limit


def test_an_unfinished_copy_of_a_dead_process_is_taken_over(bucket, tmp_path):
    cache = ShardCache.open(CacheConfig(path=str(tmp_path / "cache")))
    shard = read_source(bucket[0]).shards[0]
    cache._partial(shard.address).write_bytes(b"half of it")
    pin = cache.pin(shard.address, read_index(shard.index), threading.Event())
    assert verify_shard(cache.place(shard.address), read_index(shard.index)).intact
    assert pin is not None


def test_two_who_want_one_shard_copy_it_once(bucket, proxy, tmp_path):
    cache = ShardCache.open(CacheConfig(path=str(tmp_path / "cache")))
    shard = read_source(bucket[0]).shards[0]
    index, pins = read_index(shard.index), []
    proxy.harm(lambda r: None)
    threads = [threading.Thread(target=lambda: pins.append(cache.pin(shard.address, index, threading.Event()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(proxy.requests) == 1
    assert len(pins) == 4
    assert all(pins)


def test_a_cache_that_cannot_be_written_is_said_at_the_start(bucket, tmp_path):
    (tmp_path / "file").write_text("")
    plan = plan_of(bucket[0], cache=CacheConfig(path=str(tmp_path / "file")))
    with pytest.raises(UserError, match=r"data\.cache\.path"):
        StepStream(plan, 0, 1)
