"""Who may write a run directory on a file system without locks. Real processes, whose locks fail."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.broken_disk import BrokenDisk
from tests.processes import ENVIRONMENT, wait_for

PROGRAM = """
import sys, time
from pathlib import Path
from dit.runtime.lease import lock_for_writing
print(lock_for_writing(Path(sys.argv[1])), flush=True)
time.sleep(float(sys.argv[2]))
"""
FOREVER = 1000.0


class Writers:
    """Processes that want to write `folder`, in a world without locks."""

    def __init__(self, folder: Path, disk: BrokenDisk) -> None:
        self.folder, self.environment = folder, ENVIRONMENT | disk.environment | {"DIT_LEASE_SECONDS": "6"}
        self.all: list[subprocess.Popen[str]] = []
        self.disk = disk
        disk.breaks("flock", errno.ENOLCK, ".lock")

    def start(self, seconds: float = FOREVER) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", PROGRAM, str(self.folder), str(seconds)]
        self.all.append(subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return self.all[-1]


def answer(process: "subprocess.Popen[str]") -> str:
    """Who it says has the folder: "None" if it may write itself."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[Writers]:
    (tmp_path / "run").mkdir()
    writers = Writers(tmp_path / "run", BrokenDisk(tmp_path))
    yield writers
    for process in writers.all:
        process.kill()
        process.communicate()


def test_one_writer_at_a_time(writers: Writers) -> None:
    first = writers.start()
    assert answer(first) == "None"
    assert answer(writers.start()) == f"process {first.pid} on {os.uname().nodename}"
    first.kill()
    third = writers.start(0)
    assert answer(third) == "None", "a lease that nobody renews is taken over"
    third.wait()
    assert not (writers.folder / ".lease").exists(), "one that ends gives it back"


def test_a_lease_that_cannot_be_read_is_looked_at_again_until_it_is_stale(writers: Writers) -> None:
    first, lease = writers.start(), writers.folder / ".lease"
    assert answer(first) == "None"
    writers.disk.breaks("read", errno.ESTALE, "/.lease")
    time.sleep(2.5)  # two looks
    writers.disk.is_mended()
    before = lease.read_text()
    wait_for(lambda: lease.read_text() != before, seconds=10)
    writers.disk.breaks("read", errno.EIO, "/.lease")
    err = first.communicate(timeout=20)[1]
    assert first.returncode == 75
    assert "could not be renewed for 5 s (Input/output error): this process may write no more" in err


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_a_folder_that_another_user_locked_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    (tmp_path / ".lock").touch(0o644)
    code = """
import os, sys
from pathlib import Path
from data_pipelines.errors import UserError
from dit.runtime.lease import lock_for_writing
os.chdir(sys.argv[1])  # pytest's folders are private
os.setuid(65534)
try:
    lock_for_writing(Path())
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert "out=.: no permission to write ./.lock; its owner can" in done.stdout, done.stderr


@pytest.mark.slow
def test_a_writer_that_slept_ends_when_it_wakes_up_to_find_another(writers: Writers) -> None:
    first = writers.start()
    assert answer(first) == "None"
    first.send_signal(signal.SIGSTOP)
    second = writers.start()
    assert answer(second) == "None"
    first.send_signal(signal.SIGCONT)
    err = first.communicate(timeout=120)[1]
    assert first.returncode == 2
    assert f"is now of process {second.pid} on " in err
    assert second.poll() is None


@pytest.mark.slow
def test_of_many_that_come_at_once_one_stays(writers: Writers) -> None:
    first = writers.start()
    assert answer(first) == "None"
    first.kill()
    many = [writers.start() for _ in range(8)]
    alone = [process for process in many if answer(process) == "None"]
    assert alone
    wait_for(lambda: sum(process.poll() is None for process in alone) == 1)
