"""Worker processes: tasks go out, results come back, and a process that ends by itself is noticed at once and costs what it was at.

Knows nothing of what is done in them. Torch-free.
"""

import multiprocessing.forkserver
import os
import queue
import signal
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from data_pipelines.errors import UserError

_KILL_SECONDS = 5.0

Task = TypeVar("Task")
Result = TypeVar("Result")
Received = TypeVar("Received")


class WorkerLost(RuntimeError):
    """A process ended by itself. code: its exit code, the number of a signal if negative."""

    def __init__(self, code: int) -> None:
        super().__init__(f"its process ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}")
        self.code = code


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Any
    tasks: deque[tuple[Any, Any]]  # (tag, task), the first is being done


class Pool(Generic[Task, Result]):
    """Processes that do tasks, each its own in the order they were submitted. They live until `close`, collection or the end of this one.

    make: called here with the number of every process before it starts, it gives what that process does with a task.
    preload: module with the imports that they need. begin: what each does first.
    """

    def __init__(
        self, make: Callable[[int], Callable[[Task], Result]], processes: int, preload: str, begin: Callable[[], object] | None = None
    ) -> None:
        self._make, self._begin = make, begin
        self._context = _context(preload)
        self._workers: list[_Worker | None] = [None] * processes
        self._close = weakref.finalize(self, _kill, self._workers)

    def submit(self, task: Task, tag: object = None) -> None:
        """Give a task to the process that has the least to do."""
        number = min(range(len(self._workers)), key=lambda n: len(worker.tasks) if (worker := self._workers[n]) else 0)
        worker = self._workers[number] or self._start(number)
        worker.tasks.append((tag, task))
        with suppress(ConnectionError):  # it has ended, as `ready` will find
            worker.pipe.send(task)

    def ready(self) -> Iterator[tuple[Any, Task, Result | WorkerLost]]:
        """Wait for a process; yield (tag, task, result) of what was done. Tasks that a lost process had not begun go to others.

        Raises the UserErrors of tasks, and RuntimeError with the traceback of any other.
        """
        by_pipe: dict[Any, int] = {worker.pipe: number for number, worker in enumerate(self._workers) if worker}
        ready: list[Any] = connection.wait(list(by_pipe))
        for pipe in ready:
            worker = self._workers[by_pipe[pipe]]
            assert worker is not None
            try:
                result = pipe.recv()
            except (EOFError, OSError):
                yield from self._bury(by_pipe[pipe], worker)
                continue
            if isinstance(result, _Raised):
                raise result.error
            yield *worker.tasks.popleft(), result

    def close(self) -> None:
        """End the processes at once, whatever they are at."""
        self._close()

    def _start(self, number: int) -> _Worker:
        pipe, end = self._context.Pipe()
        process = self._context.Process(target=_child, args=(self._make(number), end, self._begin), daemon=True)
        process.start()
        end.close()
        worker = self._workers[number] = _Worker(process, pipe, deque())
        return worker

    def _bury(self, number: int, worker: _Worker) -> Iterator[tuple[Any, Task, WorkerLost]]:
        self._workers[number] = None
        worker.process.join(_KILL_SECONDS)
        _kill([worker])
        code = worker.process.exitcode
        assert code is not None
        if worker.tasks:
            yield *worker.tasks.popleft(), WorkerLost(code)  # before another process starts in its place
        for tag, task in worker.tasks:
            self.submit(task, tag)


class InOrder(Iterator[Received], Generic[Task, Result, Received]):
    """The results of tasks in their order, whatever the number of processes; 0 for none. make, begin and preload as for `Pool`.

    ahead: tasks that each process has before their results are used. receive: what is made here of a task and its result when it
    arrives, in the order of arrival. mend: the task to do instead of one whose process ended; what it raises ends the iteration.
    """

    def __init__(
        self,
        make: Callable[[int], Callable[[Task], Result]],
        tasks: Iterable[Task],
        processes: int,
        ahead: int,
        receive: Callable[[Task, Result], Received],
        mend: Callable[[Task, WorkerLost], Task],
        *,
        preload: str,
        begin: Callable[[], object] | None = None,
    ) -> None:
        self._tasks, self._receive, self._mend = iter(tasks), receive, mend
        self._pool = Pool(make, processes, preload, begin) if processes else None
        self._work = None if processes else make(0)
        self._room = processes * ahead
        self._given = self._taken = 0
        self._done: dict[int, Received] = {}
        self._fill()

    def __next__(self) -> Received:
        if self._pool is None:
            task = next(self._tasks)
            assert self._work is not None
            return self._receive(task, self._work(task))
        if self._taken == self._given:
            raise StopIteration
        while self._taken not in self._done:
            for number, task, result in self._pool.ready():
                if isinstance(result, WorkerLost):
                    self._pool.submit(self._mend(task, result), number)
                else:
                    self._done[number] = self._receive(task, result)
        received = self._done.pop(self._taken)
        self._taken += 1
        self._fill()
        return received

    def close(self) -> None:
        """End the iteration and its processes at once."""
        self._tasks, self._given = iter(()), self._taken
        if self._pool:
            self._pool.close()

    def _fill(self) -> None:
        while self._given < self._taken + self._room:
            try:
                task = next(self._tasks)
            except StopIteration:
                return
            assert self._pool is not None
            self._pool.submit(task, self._given)
            self._given += 1


# --- the processes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Raised:
    error: Exception


def _context(preload: str) -> Any:
    """Start processes from a server that was begun afresh: a fork of this one would copy the locks of its threads
    (NCCL, gloo, OpenMP) in whatever state they are. The server has the imports done, so a process starts as fast as a fork.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    # Schedulers signal every process of a job. The server must outlive that, or its children count as dead.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    return context


_inside = threading.Event()


def inside() -> bool:
    """Whether this process is one of a pool: it may be killed, and another takes its place."""
    return _inside.is_set()


def _child(work: Callable[[Any], object], pipe: Any, begin: Callable[[], object] | None) -> None:
    """Work until the process that started this one ends or kills it: a ctrl-C or a scheduler's SIGTERM is for that one, which may have
    something to save first.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    _inside.set()
    if begin is not None:
        begin()
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive_tasks, args=(pipe, tasks), daemon=True).start()  # so that sending to a busy process never waits
    while True:
        task = tasks.get()
        result: object
        try:
            result = work(task)
        except UserError as error:
            result = _Raised(error)
        except Exception:
            result = _Raised(RuntimeError(traceback.format_exc()))
        pipe.send(result)


def _receive_tasks(pipe: Any, tasks: "queue.SimpleQueue[Any]") -> None:
    try:
        while True:
            tasks.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(1)


def _kill(workers: list[_Worker | None]) -> None:
    for worker in workers:
        if worker and worker.process.is_alive():
            worker.process.kill()
    for number, worker in enumerate(workers):
        if worker:
            worker.process.join(_KILL_SECONDS)
            worker.pipe.close()
            workers[number] = None
