"""Named places where tests make a process die: in a step, in a save, in a load.

`DIT_FAULT=point:rank:n` kills process `rank` with SIGKILL when it passes `point` for the n-th time. Nothing else sets it.
"""

import os
import signal
from collections import Counter

from dit.runtime import distributed

POINTS = (
    "step.begun",
    "step.accumulated",
    "step.taken",
    "save.begun",
    "save.copied",
    "save.staged",
    "save.half_written",
    "save.written",
    "save.sealed",
    "save.manifested",
    "save.published",
    "save.retained",
    "load.verified",
    "load.filled",
    "load.done",
)
"""All of them; the sweep in tests/faults goes through this list."""
VARIABLE = "DIT_FAULT"
_passed: Counter[str] = Counter()


def point(name: str) -> None:
    """Die here if the environment says so."""
    assert name in POINTS, name
    if VARIABLE not in os.environ:
        return
    wanted, rank, count = os.environ[VARIABLE].split(":")
    _passed[name] += 1
    if (name, distributed.rank(), _passed[name]) == (wanted, int(rank), int(count)):
        os.kill(os.getpid(), signal.SIGKILL)
