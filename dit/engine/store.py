"""Copies of a run's checkpoints in an object store: complete or not there, as on the disk, since the manifest comes last.

    s3://bucket/runs/a/config.resolved.yaml ... metrics.jsonl       records of the run, as they were at the last upload
    s3://bucket/runs/a/checkpoints/step-00000500/...                as in the run directory; without manifest.json it is no checkpoint

The first process uploads from the run directory, in a thread of its own, one checkpoint at a time; what was stored is read back and
compared with the manifest before that is written. Memory: four parts of 8 MiB going up, or one piece of 16 MiB coming down.
"""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import BinaryIO

import xxhash

from data_pipelines import remote, storage
from data_pipelines.errors import NoValidCheckpoint, StorageUnavailable, UserError
from dit.config import FitRun
from dit.engine import durable

log = logging.getLogger(__name__)
CONFIG = "config.resolved.yaml"
RECORDS = (
    CONFIG,
    "teacher.resolved.yaml",
    "encoders.json",
    "env.json",
    "command.txt",
    "data.txt",
    "metrics.jsonl",
    "bad_samples.jsonl",
    "status.json",
)


class Store:
    """The store of `run`, which has one. Used by the first process alone."""

    def __init__(self, run: FitRun) -> None:
        assert run.train.checkpoint_store is not None
        self.address, self.run_dir, self.train = run.train.checkpoint_store, Path(run.out), run.train
        self.root = self.run_dir / "checkpoints"
        self.failed = 0
        """Uploads that did not succeed."""
        self._thread: Thread | None = None

    def config(self) -> str | None:
        """The config of the run that is stored here, if there is any."""
        try:
            return storage.read_file(f"{self.address}/{CONFIG}").decode()
        except FileNotFoundError:
            return None

    def bring(self) -> None:
        """Bring the newest valid checkpoint and the records to the run directory, unless that has a valid one as new.

        Raises NoValidCheckpoint if there are checkpoints, here or there, and none is valid; UserError if there is no such bucket.
        """
        here = durable.published(self.root)
        valid = next((step for step in here if not durable.problems(durable.step_folder(self.root, step))), -1)
        reasons: list[str] = []
        for step in self._steps():
            if step <= valid:
                break
            if not (bad := self._fetch(step)):
                for name in RECORDS:
                    self._fetch_record(name)
                log.info("brought checkpoint %d from %s", step, self.address)
                return
            log.warning("NOT TAKING checkpoint %d of %s, it is damaged:\n%s", step, self.address, "\n".join(bad))
            reasons += bad
        if reasons and valid < 0:
            listing = "\n".join(f"  {reason}" for reason in reasons)
            raise NoValidCheckpoint(
                f"{self.address} has checkpoints but none is valid:\n{listing}\nGive another `out` and train.checkpoint_store to start anew"
            )

    def offer(self, step: int) -> None:
        """Begin to upload `step`, which has just been published here; if the one before is still on its way, leave it to the next."""
        if self._thread and self._thread.is_alive():
            log.info("checkpoint %d is not uploaded: the one before is still on its way to %s", step, self.address)
            return
        files = self._opened(step)
        self._thread = Thread(target=self._try, args=(step, files), name="upload", daemon=True)
        self._thread.start()

    def settle(self) -> None:
        """Wait, and see that the newest checkpoint and the last records are there. Raises StorageUnavailable or AccessDenied."""
        if self._thread:
            self._thread.join()
        step = durable.published(self.root)[0]
        try:
            if self._manifest(step) != (durable.step_folder(self.root, step) / durable.MANIFEST).read_bytes():
                self._upload(step, self._opened(step))
            self._upload_records()
        except (StorageUnavailable, OSError) as error:
            raise StorageUnavailable(f"{self.address} lacks the last checkpoint, {step}, which is safe in {self.root}: {error}") from error

    def _try(self, step: int, files: Mapping[str, BinaryIO]) -> None:
        try:
            self._upload(step, files)
        except Exception as error:  # whatever it is, training goes on
            self.failed += 1
            log.warning("UPLOAD FAILED, %d so far: checkpoint %d to %s: %s", self.failed, step, self.address, error)

    def _opened(self, step: int) -> dict[str, BinaryIO]:
        """The files of a checkpoint, open: retention may take their names away."""
        with ExitStack() as stack:
            paths = durable.step_folder(self.root, step).iterdir()
            files: dict[str, BinaryIO] = {path.name: stack.enter_context(path.open("rb")) for path in paths}
            stack.pop_all()
        return files

    def _upload(self, step: int, files: Mapping[str, BinaryIO]) -> None:
        folder = self._folder(step)
        with ExitStack() as stack:
            for file in files.values():
                stack.enter_context(file)
            remote.delete_object(f"{folder}/{durable.MANIFEST}")  # of an earlier run of the same step
            self._upload_records()
            manifest = files[durable.MANIFEST].read()
            for entry in json.loads(manifest)["files"]:
                address = f"{folder}/{entry['name']}"
                remote.upload_object(address, files[entry["name"]])
                if _checksum(address) != entry["xxh3_64"]:
                    raise StorageUnavailable(f"{address} is not what was uploaded")
            remote.write_object(f"{folder}/{durable.MANIFEST}", manifest)
        self._retain(step)

    def _upload_records(self) -> None:
        for name in RECORDS:
            if (path := self.run_dir / name).is_file():
                with path.open("rb") as file:
                    remote.upload_object(f"{self.address}/{name}", file)

    def _retain(self, newest: int) -> None:
        """Delete, the manifest first, what retention does not keep, and what has no manifest."""
        there = self._objects()
        complete = sorted((step for step, names in there.items() if durable.MANIFEST in names), reverse=True)
        doomed = set(durable.superfluous(complete, self.train.keep_checkpoints, newest, self.train.keep_every_steps))
        for step in doomed | (there.keys() - set(complete)):
            for name in sorted(there[step], key=lambda name: name != durable.MANIFEST):
                remote.delete_object(f"{self._folder(step)}/{name}")

    def _fetch(self, step: int) -> list[str]:
        """Bring a checkpoint here; what is wrong with it, and then it is not brought."""
        names = self._objects()[step]
        free, size = shutil.disk_usage(self.run_dir).free, sum(names.values())
        if free < size:
            raise UserError(
                f"{self.root}: checkpoint {step} of {self.address} needs {size / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free"
            )
        staged = durable.stage(self.root, step)
        for name in names:
            with durable.naming(staged / name), (staged / name).open("wb") as file:
                for piece in storage.pieces(f"{self._folder(step)}/{name}"):
                    file.write(piece)
            durable.seal(staged / name)
        if bad := durable.problems(staged):
            shutil.rmtree(staged)
            return [line.replace(str(staged), self._folder(step)) for line in bad]
        durable.appear(staged, self.root, step)
        return []

    def _fetch_record(self, name: str) -> None:
        try:
            data = storage.read_file(f"{self.address}/{name}")
        except FileNotFoundError:
            return
        storage.write_file(str(self.run_dir / name), data)

    def _steps(self) -> list[int]:
        """Steps that have a manifest there, newest first."""
        return sorted((step for step, names in self._objects().items() if durable.MANIFEST in names), reverse=True)

    def _objects(self) -> dict[int, dict[str, int]]:
        """Name and length of what is stored of each step."""
        found: dict[int, dict[str, int]] = {}
        try:
            listed = remote.list_tree(f"{self.address}/checkpoints")
        except FileNotFoundError:
            raise UserError(f"train.checkpoint_store={self.address}: there is no such bucket; make it, or change the key") from None
        for address, length in listed.items():
            if match := re.fullmatch(r"/checkpoints/step-(\d{8,})/([^/]+)", address.removeprefix(self.address)):
                found.setdefault(int(match[1]), {})[match[2]] = length
        return found

    def _manifest(self, step: int) -> bytes | None:
        try:
            return storage.read_file(f"{self._folder(step)}/{durable.MANIFEST}")
        except FileNotFoundError:
            return None

    def _folder(self, step: int) -> str:
        return f"{self.address}/checkpoints/{durable.step_folder(self.root, step).name}"


def _checksum(address: str) -> str:
    """xxh3_64 of an object as the store gives it back."""
    digest = xxhash.xxh3_64()
    for piece in storage.pieces(address):
        digest.update(piece)
    return digest.hexdigest()
