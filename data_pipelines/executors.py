"""Executors: the same work, item by item, in processes of this machine, in the tasks of a Slurm array, or on a Ray cluster.

An item is an output file with a fixed name that appears whole or not at all. So it may be made anywhere, twice, or again after a
kill, with the same bytes; no executor hands anything back, and what is done is seen in the folder. Torch-free.
"""

import json
import os
import shlex
import subprocess
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, assert_never

import xxhash

from data_pipelines.config import ExecutorConfig
from data_pipelines.errors import AccessDenied, StorageUnavailable, UserError
from data_pipelines.extras import optional
from data_pipelines.storage import published
from data_pipelines.workers import Pool, WorkerLost

Item = TypeVar("Item", int, str)
Work = Callable[[Item], object]

LOGS = "slurm"
"""Folder of the logs of an array, and of what failed in it."""
_ENDING = (AccessDenied.exit_code, StorageUnavailable.exit_code)  # what befell one item will befall all
_LISTED = 10
_POLL_SECONDS = 20.0
_SETTLE_SECONDS = 15.0  # a network file system shows new files late
_RAY_STORE = 100 << 20  # bytes of shared memory; nothing goes through it


class Failure(NamedTuple):
    """Why an item was not made: the exit code that a command would have ended with, and the reason."""

    item: str
    code: int
    reason: str


class WorkFailed(UserError):
    """Some items could not be made; all others were."""

    def __init__(self, failures: Sequence[Failure], total: int) -> None:
        lines = [f"  {item} (exit code {code}): {reason}" for item, code, reason in failures[:_LISTED]]
        more = [f"  and {len(failures) - _LISTED} more"] if len(failures) > _LISTED else []
        head = f"{len(failures)} of {total} were not made, what was made is kept; the same command tries them again:"
        super().__init__("\n".join([head, *lines, *more]))
        self.exit_code = failures[0].code


_Outcomes = Generator[tuple[Item, Failure | None], None, None]


@dataclass(frozen=True)
class Executor:
    """Where work is done. argv: the command that makes all items, up to the option whose value is a share; tasks of an array repeat it."""

    config: ExecutorConfig = field(default_factory=ExecutorConfig)
    argv: tuple[str, ...] = ()

    @property
    def share(self) -> tuple[int, int]:
        """(I, N): this process is task I of N of an array."""
        number, _, tasks = (self.config.share or "0/1").partition("/")
        if int(number) >= int(tasks):
            raise UserError(f"share = {self.config.share}: expected I/N with I from 0 to N - 1")
        return int(number), int(tasks)

    @property
    def processes(self) -> int:
        """As configured, else one a core of this process: those that Slurm gave to a task, one if it does not say."""
        if self.config.processes:
            return self.config.processes
        if self.config.share:
            return int(os.environ.get("SLURM_CPUS_PER_TASK", "1"))
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def owns(self, number: int) -> bool:
        """Whether the item with this number is in the share of this process."""
        share, tasks = self.share
        return number % tasks == share

    def run(
        self, work: Work[Item], items: Sequence[Item], done: Callable[[Item], bool], folder: Path, *, pays: bool = True
    ) -> Generator[Item, None, None]:
        """Make every item by `work(item)`, in any order; yield each that is made.

        done: whether an item is made, by whomever. folder: where the logs of an array lie. pays: False does local work without
        starting processes, unless their number is given. A failure costs its own item alone, unless it would befall all.
        Raises WorkFailed at the end.
        """
        if not items:
            return
        failures = []
        outcomes = self._outcomes(work, items, done, folder.absolute() / LOGS, pays)
        try:
            for item, failure in outcomes:
                if failure is None or done(item):  # made by another process meanwhile
                    yield item
                    continue
                failures.append(failure)
                if failure.code in _ENDING:
                    break
        finally:
            outcomes.close()
        if failures:
            self.note(folder, failures)
            raise WorkFailed(failures, len(items))

    def note(self, folder: Path, failures: Sequence[Failure]) -> None:
        """Tell the process that watches an array what failed in this share of it; nothing if this is the whole."""
        if self.config.share is None:
            return
        (folder / LOGS).mkdir(parents=True, exist_ok=True)
        with published(folder / LOGS / f"failed-{self.share[0]}.json") as file:
            file.write(json.dumps(failures).encode())

    def _outcomes(self, work: Work[Item], items: Sequence[Item], done: Callable[[Item], bool], logs: Path, pays: bool) -> _Outcomes[Item]:
        match self.config.name:
            case "local":
                processes = min(self.processes, len(items))
                if processes == 1 or not (pays or self.config.processes):
                    return ((item, attempt(work, item)) for item in items)
                return _in_processes(work, items, processes)
            case "slurm-array":
                return _in_array(self, items, done, logs)
            case "ray":
                return _on_ray(work, items, self.config)
            case _:
                assert_never(self.config.name)


LOCAL = Executor()
"""Processes of this machine."""


def attempt(work: Work[Item], item: Item) -> Failure | None:
    """Do the work on one item; returns why it failed."""
    try:
        work(item)
    except (UserError, OSError) as error:  # of the system: a full disk, a folder without permission
        return Failure(str(item), getattr(error, "exit_code", UserError.exit_code), str(error))
    except Exception as error:
        traceback.print_exc()
        return Failure(str(item), 1, f"{type(error).__name__}: {error}")
    return None


# --- processes of this machine ----------------------------------------------------------------------------------


def _in_processes(work: Work[Item], items: Sequence[Item], processes: int) -> _Outcomes[Item]:
    """Processes that take item after item; one that is killed costs its item alone."""
    preload = (work.func if isinstance(work, partial) else work).__module__
    pool: Pool[Item, Failure | None] = Pool(lambda _: partial(attempt, work), processes, preload)
    rest = iter(items)
    doing = 0
    try:
        while True:
            for item in islice(rest, processes - doing):
                pool.submit(item)
                doing += 1
            if not doing:
                return
            for _, item, result in pool.ready():
                doing -= 1
                yield item, Failure(str(item), 1, str(result)) if isinstance(result, WorkerLost) else result
    finally:
        pool.close()


# --- Slurm ------------------------------------------------------------------------------------------------------


def _in_array(executor: Executor, items: Sequence[Item], done: Callable[[Item], bool], logs: Path) -> _Outcomes[Item]:
    """Tasks of an array, each of which repeats the command for its share; watched through the folder that they fill.

    An array that is at work on the folder already is watched, not doubled: so the command may be killed and said again.
    """
    name = f"dit-{xxhash.xxh3_64_hexdigest(str(logs).encode())}"
    logs.mkdir(parents=True, exist_ok=True)
    if _states(name):
        print("an array is at work on this folder already; watching it", flush=True)
    else:
        for file in logs.glob("failed-*.json"):
            file.unlink()
        _submit(executor, name, logs)
    waiting, shown, pause = list(items), Counter[str](), 0.5
    end: float | None = None
    failures: dict[str, Failure] = {}
    while waiting and (end is None or time.monotonic() < end):
        time.sleep(pause)
        pause = min(_POLL_SECONDS, 1.5 * pause)
        states = _states(name)
        if states and states != shown:
            print(f"array {name}: " + ", ".join(f"{count} tasks {state.lower()}" for state, count in states.items()), flush=True)
            shown = states
        if not states and end is None:
            end, pause = time.monotonic() + _SETTLE_SECONDS, 0.5
        for file in logs.glob("failed-*.json") if not states else ():
            failures |= {entry[0]: Failure(*entry) for entry in json.loads(file.read_text())}
        finished = [item for item in waiting if done(item) or str(item) in failures]
        waiting = [item for item in waiting if item not in set(finished)]
        yield from ((item, failures.get(str(item))) for item in finished)
    for item in waiting:
        yield item, Failure(str(item), 1, f"its task ended without a word; the logs are in {logs}")


def _submit(executor: Executor, name: str, logs: Path) -> None:
    tasks = executor.config.tasks
    script = f'#!/bin/sh\nexec {shlex.join(executor.argv)}"$SLURM_ARRAY_TASK_ID/{tasks}"\n'
    options = [f"--job-name={name}", f"--array=0-{tasks - 1}", f"--output={logs}/%A-%a.log", *executor.config.slurm_options]
    answer = _slurm("sbatch", "--parsable", *options, given=script)
    print(f"submitted array job {answer.strip()} of {tasks} tasks; its logs are in {logs}, `scancel {answer.strip()}` ends it", flush=True)


def _states(name: str) -> Counter[str]:
    """How many tasks of the arrays of this name are in which state; none once all have ended."""
    return Counter(_slurm("squeue", "--me", "--noheader", "--array", f"--name={name}", "--format=%T").split())


def _slurm(*command: str, given: str = "") -> str:
    try:
        return subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError as error:
        raise UserError(f"executor slurm-array: there is no {command[0]} here; start this on a machine that submits to Slurm") from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"executor slurm-array: {command[0]} refused: {error.stderr.strip()}; see slurm_options") from error


# --- Ray --------------------------------------------------------------------------------------------------------


def _on_ray(work: Work[Item], items: Sequence[Item], config: ExecutorConfig) -> _Outcomes[Item]:
    """Plain tasks of the cluster at RAY_ADDRESS, or of one that is started here and ends with the work.

    Not Ray Data: nothing flows from task to task, and its blocks join items, so that one failure would cost several.
    """
    ray = optional("ray", "executor ray", extra="ray")
    own = {"address": "local", "num_cpus": config.tasks, "object_store_memory": _RAY_STORE, "include_dashboard": False}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    ray.init(**({} if os.environ.get("RAY_ADDRESS") else own), logging_level="WARNING")
    try:
        remote = ray.remote(num_cpus=1, num_gpus=config.gpus)(_attempt_in)
        running: dict[Any, Item] = {}
        rest = iter(items)
        while True:
            running |= {remote.remote(os.getcwd(), work, item): item for item in islice(rest, config.tasks - len(running))}
            if not running:
                return
            (ready,), _ = ray.wait(list(running))
            item = running.pop(ready)
            try:
                yield item, ray.get(ready)
            except ray.exceptions.RayError as error:
                yield item, Failure(str(item), 1, f"{type(error).__name__}: {error}")
    finally:
        ray.shutdown()


def _attempt_in(folder: str, work: Work[Item], item: Item) -> Failure | None:
    os.chdir(folder)  # paths may be relative to where the command was given
    return attempt(work, item)
