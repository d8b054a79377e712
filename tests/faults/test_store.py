"""Checkpoints in an S3 store, a real server: a run goes on from there on another machine bit for bit, whatever happened to the server
or to what it keeps, and never takes what is damaged."""

import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipelines import remote
from data_pipelines.errors import StorageUnavailable
from dit.engine import durable
from tests.fault_proxy import Fault, FaultProxy, Request
from tests.processes import Forks, metrics, train_config, wait_for
from tests.rclone import KEY, SECRET, S3Server

RANKS, STEPS = 2, 8
ACCESS = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3") / "buckets", remembers="1h") as server:  # one that forgets all the time may lock up
        (server.folder / "bucket").mkdir(parents=True)
        yield server


@pytest.fixture(scope="module")
def stored(server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Processes that know the server."""
    address = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}", "DIT_S3_PATIENCE": "30"}
    forks = Forks(tmp_path_factory.mktemp("stored"), **ACCESS, **address)
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def whole(forks: Forks, tmp_path_factory: pytest.TempPathFactory, latents: Path) -> list[dict[str, object]]:
    """The records of the run that nothing happens to."""
    config = write(tmp_path_factory.mktemp("whole") / "run.yaml", latents)
    forks.run("train", str(config), "train.checkpoint_store=null", ranks=RANKS).ok()
    return metrics(config.with_suffix(""))


def write(path: Path, latents: Path) -> Path:
    """A run whose store has the name of its folder."""
    store = f"s3://bucket/{path.parent.name}"
    return train_config(path, latents, train__samples=16 * STEPS, train__save_every_steps=2, train__checkpoint_store=store)


def restart(server: S3Server) -> None:
    """Have it see what was changed behind its back."""
    server.process.kill()
    server.process.wait()
    server.start()


def checkpoints(server: S3Server, config: Path) -> Path:
    return server.folder / "bucket" / config.parent.name / "checkpoints"


def test_another_machine_goes_on_and_takes_nothing_that_is_damaged(
    stored: Forks, server: S3Server, tmp_path: Path, latents: Path, whole: list[dict[str, object]]
) -> None:
    config = write(tmp_path / "run.yaml", latents)
    run, there = tmp_path / "run", checkpoints(server, config)
    stored.run("train", str(config), "train.samples=64", ranks=RANKS).ok()
    stored.run("train", str(config), "train.samples=80", ranks=RANKS).ok()
    assert durable.published(there)[0] == 5
    for step in durable.published(there):
        assert durable.problems(durable.step_folder(there, step)) == []
        for path in durable.step_folder(run / "checkpoints", step).iterdir():
            assert (durable.step_folder(there, step) / path.name).read_bytes() == path.read_bytes()

    share = durable.step_folder(there, 5) / "rank-00001-of-00002.safetensors"
    intact = share.read_bytes()
    share.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    restart(server)
    shutil.rmtree(run)
    older = durable.published(there)[1]
    done = stored.run("train", str(config), "train.samples=80", ranks=RANKS).ok()
    assert f"NOT TAKING checkpoint 5 of s3://bucket/{tmp_path.name}, it is damaged:" in done.err
    assert f"step-00000005/{share.name}: its checksum does not match" in done.err
    assert f"brought checkpoint {older} " in done.err
    assert metrics(run) == whole[:5]

    shutil.rmtree(run)
    stored.run("train", str(config), ranks=RANKS).ok()
    assert metrics(run) == whole
    assert durable.published(there)[0] == STEPS

    for step in durable.published(there):
        os.truncate(durable.step_folder(there, step) / "state.json", 5)
    restart(server)
    shutil.rmtree(run)
    refused = stored.run("train", str(config), ranks=RANKS)
    assert refused.code == 4, refused.err
    assert "has checkpoints but none is valid" in refused.err
    assert durable.published(run / "checkpoints") == []
    done = stored.run("doctor", str(config))
    assert f"ok  s3://bucket/{tmp_path.name}: " in done.out
    refused = stored.run("train", str(config), "train.seed=4", f"out={tmp_path}/other", ranks=RANKS)
    assert refused.code == 2, refused.err
    assert f"s3://bucket/{tmp_path.name} holds another run" in refused.err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_that_dies_in_an_upload(
    stored: Forks, server: S3Server, tmp_path: Path, latents: Path, whole: list[dict[str, object]]
) -> None:
    config = write(tmp_path / "run.yaml", latents)
    run, there = tmp_path / "run", checkpoints(server, config)
    stored.run("train", str(config), "train.samples=32", ranks=RANKS).ok()
    before = {path: path.read_bytes() for path in durable.step_folder(there, 2).iterdir()}
    steps = 4000  # so that there is time for an upload to fail while it trains on
    ranks = stored.start("train", str(config), f"train.samples={16 * steps}", "train.save_every_steps=20", ranks=RANKS)
    wait_for(lambda: len(metrics(run)) > 2)
    server.process.send_signal(signal.SIGSTOP)  # it takes the connection, and no more
    wait_for(lambda: len(durable.published(run / "checkpoints")) > 1)
    server.process.kill()
    server.process.wait()
    wait_for(lambda: "uploads_failed" in metrics(run)[-1])
    (run / "STOP").touch()
    assert ranks.own_codes() == [75] * RANKS
    assert "UPLOAD FAILED, 1 so far: checkpoint " in ranks.wait().err
    assert "lacks the last checkpoint" in ranks.wait().err
    assert {path: path.read_bytes() for path in durable.step_folder(there, 2).iterdir()} == before
    assert durable.published(there) == [2]

    server.start()
    reached = len(metrics(run))
    stored.run("train", str(config), f"train.samples={16 * reached}", ranks=RANKS).ok()  # it is finished, but for the upload
    assert durable.published(there)[0] == reached
    shutil.rmtree(run)
    stored.run("train", str(config), f"train.samples={16 * (reached + 2)}", ranks=RANKS).ok()
    assert [{**line, "uploads_failed": None} for line in metrics(run)[: len(whole)]] == [{**line, "uploads_failed": None} for line in whole]
    assert [line["step"] for line in metrics(run)] == list(range(1, reached + 3))


def test_an_object_in_parts_is_whole_or_not_there(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ACCESS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "PATIENCE_SECONDS", 20.0)
    monkeypatch.setattr(remote, "_PAUSE", 0.01)
    monkeypatch.setattr(remote, "_PART", 1 << 16)
    path, data = tmp_path / "file", random.Random(0).randbytes(5 * (1 << 16) + 7)
    path.write_bytes(data)
    with FaultProxy(server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        remote._filesystem.cache_clear()
        failed: list[str] = []

        def every_part_once(request: Request) -> Fault | None:
            part = request.path.partition("partNumber=")[2]
            if not part or part in failed:
                return None
            failed.append(part)
            return Fault(status=503)

        proxy.harm(every_part_once)
        with path.open("rb") as file:
            remote.upload_object("s3://bucket/parts/whole", file)
        assert len(failed) == 6
        assert remote.read_object("s3://bucket/parts/whole") == data

        monkeypatch.setattr(remote, "PATIENCE_SECONDS", 0.2)
        proxy.harm(lambda request: Fault(status=500) if "partNumber=3" in request.path else None)
        with path.open("rb") as file, pytest.raises(StorageUnavailable):
            remote.upload_object("s3://bucket/parts/broken", file)
        assert any(request.method == "DELETE" and "uploadId" in request.path for request in proxy.requests), "the parts are forgotten"
        assert remote.list_tree("s3://bucket/parts") == {"s3://bucket/parts/whole": len(data)}
    remote._filesystem.cache_clear()
