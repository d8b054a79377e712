"""What a rank tells the supervisor that started it: that it is alive, and where in the run it is. Torch-free.

A supervisor names a folder in DIT_HEARTBEATS; without one nothing here does anything. Each rank keeps one small file there,
`rank-00003.json`, which a thread rewrites every second: it stands still when the process does, also when the interpreter is held by
C code. Within a phase `beat` only sets variables, so the loop pays nothing. SIGUSR2 writes the stacks of all threads to
`stacks-00003.txt`, even of a held interpreter.
"""

import faulthandler
import json
import os
import platform
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

FOLDER = "DIT_HEARTBEATS"
SECONDS = 1.0


class _Heart:
    def __init__(self, folder: Path, rank: int) -> None:
        self.file = folder / f"rank-{rank:05d}.json"
        self.facts: dict[str, Any] = {"rank": rank, "pid": os.getpid(), "host": platform.node()}
        self.facts |= {
            "slurm_step": os.environ.get("SLURM_STEP_ID"),
            "phase": "start",
            "step": None,
            "first_step": None,
            "beats": 0,
            "slowest": 0.0,
            "exit": None,
            "ticks": 0,
        }
        self.last = time.monotonic()
        self.writing = threading.Lock()
        self.stacks = (folder / f"stacks-{rank:05d}.txt").open("w")
        faulthandler.register(signal.SIGUSR2, file=self.stacks, all_threads=True)
        threading.Thread(target=self._tick, name="heartbeat", daemon=True).start()

    def _tick(self) -> None:
        while True:
            self.write()
            time.sleep(SECONDS)

    def write(self) -> None:
        """Replace the file: readers on any machine see all of it or what was there before."""
        with self.writing:
            self.facts["ticks"] += 1
            temporary = self.file.with_suffix(".writing")
            with suppress(OSError):  # a full disk, or a supervisor that is gone: no reason to end a run
                temporary.write_text(json.dumps(self.facts))
                temporary.replace(self.file)


_heart: _Heart | None = None


def start() -> None:
    """Begin to report, if a supervisor wants it. The first thing a process does: imports may be what it is stuck in."""
    global _heart
    if folder := os.environ.get(FOLDER):
        _heart = _Heart(Path(folder), int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))))


def beat(step: int, phase: str) -> None:
    """Note that `step` steps are done and `phase` begins: "step", or what takes its own time, as "save" and "draw"."""
    if _heart is None:
        return
    now = time.monotonic()
    facts = _heart.facts
    if facts["beats"]:
        facts["slowest"] = max(facts["slowest"], now - _heart.last)
    else:
        facts["first_step"] = step
    _heart.last = now
    is_news = phase != facts["phase"]
    facts.update(step=step, phase=phase, beats=facts["beats"] + 1)
    if is_news:  # how long a silence may be depends on it
        _heart.write()


def end(code: int) -> None:
    """Report the exit code of this rank: launchers replace it by their own."""
    if _heart is not None:
        _heart.facts.update(phase="end", exit=code)
        _heart.write()
