"""A disk that breaks on command: errors of system calls on chosen files, by a library put before the C library."""

import shutil
import subprocess
from pathlib import Path

import pytest


class BrokenDisk:
    """Processes with `environment` meet the error that was last told. Skips the test where there is no gcc."""

    def __init__(self, folder: Path) -> None:
        if shutil.which("gcc") is None:
            pytest.skip("no gcc: apt-get install gcc")
        library, self.control = folder / "broken_disk.so", folder / "broken_disk"
        source = Path(__file__).with_suffix(".c")
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", str(source), "-o", str(library), "-ldl"], check=True, timeout=60)
        self.environment = {"LD_PRELOAD": str(library), "BROKEN_DISK": str(self.control)}

    def breaks(self, call: str, number: int, part: str) -> None:
        """From now on `call` (read, write, fsync, rename or flock) on paths with `part` in them fails with errno `number`."""
        new = self.control.with_suffix(".new")
        new.write_text(f"{call} {number} {part}\n")
        new.rename(self.control)

    def is_mended(self) -> None:
        """All is well again."""
        self.control.unlink(missing_ok=True)
