"""Worker processes that read ahead: items come back in the order of the sampler, whatever the number of workers.

Knows nothing of what is read.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data_pipelines.deadline import limit_memory
from data_pipelines.errors import UserError

READ_AHEAD = 2
"""Items that each worker prepares ahead of their use."""

_PRELOAD = ["data_pipelines.raw"]
_KILL_SECONDS = 5.0

Item = TypeVar("Item")


class WorkerLost(RuntimeError):
    """Workers ended by themselves; what they and the others read ahead is lost. codes: exit code by process id."""

    def __init__(self, codes: dict[int, int]) -> None:
        super().__init__(f"loader processes ended with exit codes {sorted(codes.values())}")
        self.codes = codes


class InOrder(Iterator[Item], Generic[Item]):
    """Iterate `dataset[index] for index in sampler` with `num_workers` processes, 0 for none.

    The workers live as long as the iteration. `close` ends them, and so do collection and the end of the process.
    memory: bytes that each may take. Raises WorkerLost.
    """

    def __init__(self, dataset: Dataset[Item], sampler: Sampler[Any], num_workers: int, memory: int | None = None) -> None:
        before = set(multiprocessing.active_children())
        loader: DataLoader[Item | UserError] = DataLoader(
            _Carried(dataset),
            batch_size=None,
            sampler=sampler,
            num_workers=num_workers,
            prefetch_factor=READ_AHEAD if num_workers else None,
            multiprocessing_context=_context() if num_workers else None,
            worker_init_fn=partial(_begin, memory=memory),
            generator=torch.Generator(),  # else the loader takes its seed from the process-wide generator
        )
        self._running: list[Iterator[Item | UserError]] = [iter(loader)]
        workers = [child for child in multiprocessing.active_children() if child not in before]
        self._workers = workers
        self._close = weakref.finalize(self, _end, self._running, workers)

    def __next__(self) -> Item:
        if not self._running:
            raise StopIteration
        try:
            item = next(self._running[0])
        except RuntimeError as error:  # how the loader says that a worker is gone, but also an error in the data set
            codes = {worker.pid or 0: worker.exitcode for worker in self._workers if worker.exitcode is not None}
            if not codes:
                raise
            raise WorkerLost(codes) from error
        if isinstance(item, UserError):
            raise item
        return item

    def close(self, *, kill: bool = False) -> None:
        """End the iteration and its workers; `kill` waits for none of them."""
        for worker in self._workers if kill else ():
            worker.kill()
        self._close()


class _Carried(Dataset[Item | UserError], Generic[Item]):
    """Items, and errors for the user as items: a loader would raise them with a worker's traceback in their text."""

    def __init__(self, dataset: Dataset[Item]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: Any) -> Item | UserError:
        try:
            return self.dataset[index]
        except UserError as error:
            return error


def _context() -> Any:
    """Start workers from a server process that was begun afresh: a fork of this one would copy the locks of its threads
    (NCCL, gloo, OpenMP) in whatever state they are. The server has the imports done, so a worker starts as fast as a fork.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    # Schedulers signal every process of a job. The server must outlive that, or its workers count as dead.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    return context


def _begin(_: int, memory: int | None) -> None:
    if memory is not None:
        limit_memory(memory)
    _follow_the_parent()


def _follow_the_parent() -> None:
    """End when the training process ends, not before: a ctrl-C or a scheduler's SIGTERM is for it, and it reads on until it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    # The loader's own watchdog looks at the process that forked this one, which here is the server.
    threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _end(running: list[Iterator[Any]], workers: list[BaseProcess]) -> None:
    running.clear()  # the loader's iterator ends its workers when it is dropped
    for worker in workers:
        worker.join(_KILL_SECONDS)
        if worker.is_alive():
            worker.kill()
            worker.join(_KILL_SECONDS)
