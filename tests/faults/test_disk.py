"""Disks that break or fill while a run saves: the last good checkpoint stays, the error names the file, all ranks end alike, and the
same command goes on bit for bit when the disk is mended."""

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dit.engine import durable
from tests.faults.broken_disk import BrokenDisk
from tests.processes import Forks, metrics, train_config, wait_for

RANKS, STEPS = 2, 8
AGAIN = 75


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> BrokenDisk:
    return BrokenDisk(tmp_path_factory.mktemp("disk"))


@pytest.fixture(scope="module")
def on_disk(disk: BrokenDisk, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    forks = Forks(tmp_path_factory.mktemp("on-disk"), **disk.environment)
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def whole(forks: Forks, tmp_path_factory: pytest.TempPathFactory, latents: Path) -> list[dict[str, object]]:
    """The records of the run that nothing happens to."""
    config = write(tmp_path_factory.mktemp("whole") / "run.yaml", latents, True)
    forks.run("train", str(config), ranks=RANKS).ok()
    return metrics(config.with_suffix(""))


def write(path: Path, latents: Path, is_async: bool) -> Path:
    train = {"train__samples": 16 * STEPS, "train__save_every_steps": 2, "train__async_save": is_async}
    return train_config(path, latents, engine={"zero_stage": 2}, **train)


BREAKS = [
    ("fsync", errno.EIO, "rank-00001-of-00002.safetensors", True),
    ("write", errno.ENOSPC, "rank-00001-of-00002.safetensors", False),
    ("write", errno.EIO, "rank-00000-of-00002.safetensors", True),
    ("fsync", errno.EIO, "state.json", False),
    ("fsync", errno.EIO, "manifest.json", False),
    ("write", errno.ENOSPC, "manifest.json", True),
    ("rename", errno.EROFS, ".writing-step-", False),
    ("write", errno.ENOSPC, "metrics.jsonl", False),
]
QUICK = BREAKS[0], BREAKS[7]


@pytest.mark.parametrize(
    ("call", "number", "part", "is_async"), [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in BREAKS]
)
def test_an_error_of_the_disk(
    on_disk: Forks,
    disk: BrokenDisk,
    tmp_path: Path,
    latents: Path,
    whole: list[dict[str, object]],
    call: str,
    number: int,
    part: str,
    is_async: bool,
) -> None:
    config = write(tmp_path / "run.yaml", latents, is_async)
    run = tmp_path / "run"
    on_disk.run("train", str(config), "train.samples=64", ranks=RANKS).ok()  # it has the checkpoint of step 4
    disk.breaks(call, number, part)
    try:
        ranks = on_disk.start("train", str(config), ranks=RANKS)
        codes = ranks.own_codes()
    finally:
        disk.is_mended()
    said = ranks.wait()
    assert codes == [AGAIN, AGAIN] or (codes[0] == AGAIN and part == "metrics.jsonl"), said.err  # records are of one rank
    assert re.search(rf"^error: .*\[Errno {number}\] {os.strerror(number)}: '\S*{part}", said.err, re.MULTILINE), said.err
    assert "Traceback" not in ranks.files[0][1].read_text()
    newest = durable.published(run / "checkpoints")[0]
    assert newest == 4
    assert durable.problems(durable.step_folder(run / "checkpoints", newest)) == []
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")] == []

    on_disk.run("train", str(config), ranks=RANKS).ok()
    assert metrics(run) == whole


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a disk")
@pytest.mark.slow
def test_a_full_disk(forks: Forks, tmp_path: Path, latents: Path, whole: list[dict[str, object]]) -> None:
    full = tmp_path / "full"
    full.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(full)], check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs: {mounted.stderr.strip()}")
    try:
        config = write(full / "run.yaml", latents, False)
        forks.run("train", str(config), "train.samples=64", ranks=RANKS).ok()
        ranks = forks.start("train", str(config), "train.samples=16000", ranks=RANKS)
        run = full / "run"
        wait_for(lambda: len(metrics(run)) >= 5)
        fill(full / "filler")
        assert ranks.own_codes()[0] == AGAIN, ranks.wait().err
        assert "Traceback" not in ranks.files[0][1].read_text()
        assert durable.problems(durable.step_folder(run / "checkpoints", durable.published(run / "checkpoints")[0])) == []
        (full / "filler").unlink()
        forks.run("train", str(config), "train.samples=1600", ranks=RANKS).ok()
        assert metrics(run)[: len(whole)] == whole
    finally:
        subprocess.run(["umount", str(full)], check=True)


def fill(path: Path) -> None:
    """Leave no byte on the disk of `path`."""
    with path.open("wb", buffering=0) as file:
        size = shutil.disk_usage(path).free
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2
