"""A time limit on one sample, and a memory limit on a loader process. Knows nothing of samples."""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipelines import workers
from data_pipelines.samples import BadSample

KILL_FACTOR = 2.0
"""A loader process that has used this many limits of processor time on one sample is killed: native code cannot be interrupted."""


class _Late(BaseException):
    """Not an Exception, so that no decoder takes it for one of its own."""


class _Alarm:
    """The handler of SIGALRM."""

    armed = False
    installed = False

    def ring(self, *_: object) -> None:
        if self.armed:
            raise _Late


_alarm = _Alarm()


@contextmanager
def alarm() -> Iterator[None]:
    """Keep the handler of SIGALRM in place for all deadlines in the body: to change it for each costs more than all the rest."""
    if _alarm.installed or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGALRM, _alarm.ring)
    _alarm.installed = True
    try:
        yield
    finally:
        _alarm.installed = False
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise BadSample if the body takes longer than `seconds`. Costs some microseconds.

    SIGALRM interrupts Python code and system calls. In a loader process native code that does not return is ended together with
    the process, by SIGPROF, and whoever waits for it has to replace it. Off the main thread there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    in_worker = workers.inside()
    with alarm():
        _alarm.armed = True
        rest, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
        if in_worker:
            signal.setitimer(signal.ITIMER_PROF, KILL_FACTOR * seconds)
        try:
            try:
                yield
            finally:
                _alarm.armed = False  # an alarm from here on finds the work done
        except _Late:
            raise BadSample(f"took longer than {seconds:g} s") from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, rest, interval)  # the process may have an alarm of its own
            if in_worker:
                signal.setitimer(signal.ITIMER_PROF, 0)


def limit_memory(more: int) -> None:
    """Let this process take `more` bytes beside what it has; then allocations fail. Nothing where the system does not count them."""
    counts = Path("/proc/self/statm")
    if counts.exists():
        have = int(counts.read_text().split()[5]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (have + more, hard))
