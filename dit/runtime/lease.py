"""The right to write a run directory, which one process has at a time: a lock of the file system or, where that has none, a lease.

A killed launcher may leave ranks behind that train on, and two jobs may be sent to one folder. A lock goes with its process, however
that ends. A lease is a file, `.lease`, that its holder renews six times in STALE_SECONDS; whoever sees it unchanged for that long, by
its own clock, takes it over. Its holder looks before it renews, and ends at once if the lease is another's, or could be before the
next look because it cannot be renewed. What remains: one that stood still for longer than that (swapped out, cut off from its file
server) and then goes on can write until its next look, a sixth of STALE_SECONDS later. Torch-free.
"""

import atexit
import fcntl
import logging
import os
import platform
import secrets
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from data_pipelines.errors import StorageUnavailable, UserError
from dit.runtime import heartbeat

log = logging.getLogger(__name__)
STALE_SECONDS = float(os.environ.get("DIT_LEASE_SECONDS", "60"))


def lock_for_writing(folder: Path) -> str | None:
    """Make this process the only writer of `folder` until it ends, however it ends; returns who is, if there is one.

    Waits for STALE_SECONDS where the file system has no locks and the last writer was killed. Raises UserError where this user may not
    write the lock file, as one that another user made.
    """
    try:
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)  # stays open: the lock goes with the process
    except PermissionError as error:
        raise UserError(
            f"out={folder}: no permission to write {folder}/.lock; its owner can `chmod g+w` it, or give another `out`"
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return (folder / ".lock").read_text().strip() or "another process"
    except OSError as error:  # not every network file system has locks
        log.warning("%s cannot be locked (%s): taking a lease instead", folder, error.strerror)
        return Lease(folder).take()
    os.truncate(handle, 0)
    os.write(handle, f"{_me()}\n".encode())
    return None


class Lease:
    """This process's claim to `folder`."""

    def __init__(self, folder: Path) -> None:
        self.path, self.renewals = folder / ".lease", 0
        self.mine = f"{_me()} [{secrets.token_hex(8)}]"

    def take(self) -> str | None:
        """Hold the lease until the process ends; returns who has it, if that one is alive."""
        if (seen := self._read()) and (owner := self._owner_after(seen)):
            return owner
        claim = self.path.with_name(f".lease-{secrets.token_hex(8)}")
        claim.write_text(self._text())
        claim.replace(self.path)
        time.sleep(STALE_SECONDS / 6)  # whoever claims it in the same moment overwrites this claim, and the last one has it
        if not self._is_mine():
            return _owner(self._read())
        threading.Thread(target=self._keep, name="lease", daemon=True).start()
        atexit.register(self._give_back)
        return None

    def _owner_after(self, seen: str) -> str | None:
        """Who renews the lease that was `seen`; None if nobody does."""
        end = time.monotonic() + STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(STALE_SECONDS / 60)
            if (now := self._read()) != seen:
                return _owner(now) if now else None  # given back
        return None

    def _keep(self) -> None:
        renewed = time.monotonic()
        while True:
            now = time.monotonic()
            try:
                if not self._is_mine():
                    _end(f"{self.path} is now of {_owner(self._read())}", UserError.exit_code)
                self.renewals += 1
                with self.path.open("r+") as file:  # in place: that needs no room on a full disk
                    file.write(self._text())
                renewed = now
            except OSError as error:  # a network file system has such moments
                log.warning("%s cannot be renewed (%s)", self.path, error.strerror)
                now = time.monotonic()  # it may have taken its time to fail
                if now + STALE_SECONDS / 6 >= renewed + STALE_SECONDS:  # at the next look it may be another's
                    _end(f"{self.path} could not be renewed for {now - renewed:.0f} s ({error.strerror})", StorageUnavailable.exit_code)
            time.sleep(STALE_SECONDS / 6)

    def _give_back(self) -> None:
        with suppress(OSError):  # then it is taken over when it is stale
            if self._is_mine():
                self.path.unlink(missing_ok=True)

    def _is_mine(self) -> bool:
        return (self._read() or "").startswith(self.mine)

    def _read(self) -> str | None:
        try:
            return self.path.read_text()
        except FileNotFoundError:
            return None

    def _text(self) -> str:
        return f"{self.mine} {self.renewals:012d}\n"


def _end(reason: str, code: int) -> None:
    print(f"error: {reason}: this process may write no more", file=sys.stderr, flush=True)
    heartbeat.end(code)
    os._exit(code)  # from a thread, and before anything else is written


def _owner(text: str | None) -> str:
    return (text or "another process").partition(" [")[0]


def _me() -> str:
    return f"process {os.getpid()} on {platform.node()}"
