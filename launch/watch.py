"""Reading the heartbeats of ranks (dit/runtime/heartbeat.py): who is frozen, and since when nothing moves.

Only changes of the files count, by this process's clock: machines need no common time.
"""

import json
import os
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Pulse = dict[str, Any]
"""What one rank last said."""


@dataclass(frozen=True)
class Patience:
    """Seconds. frozen: without a sign of life while steps are taken. starting: the same before, when libraries and models load.
    stalled: without a finished step while all are alive, or ten times the slowest step so far if that is longer."""

    frozen: float = 6.0
    starting: float = 300.0
    stalled: float = 600.0


class Watch:
    """The ranks of one attempt, as their files in `folder` show them."""

    def __init__(self, folder: Path, patience: Patience) -> None:
        self.folder, self.patience = folder, patience
        self.pulses: dict[int, Pulse] = {}
        self._ticked: dict[int, float] = {}
        self._beaten: dict[int, float] = {}
        self._looked = time.monotonic()

    def look(self) -> None:
        """Read every file again."""
        now = time.monotonic()
        paused = max(0.0, now - self._looked - 1.0)  # this process was stopped itself, or the file system was: nobody's fault
        self._looked = now
        for path in self.folder.glob("rank-*.json"):
            try:
                pulse: Pulse = json.loads(path.read_text())
            except (OSError, ValueError):  # a network file system between two versions of a file: it is there at the next look
                continue
            rank = pulse["rank"]
            before = self.pulses.get(rank, {})
            for since, key in ((self._ticked, "ticks"), (self._beaten, "beats")):
                since[rank] = now if pulse[key] != before.get(key) else since[rank] + paused
            self.pulses[rank] = pulse

    def complaint(self) -> tuple[str, list[int]] | None:
        """What is wrong and with which ranks, or None."""
        now = self._looked
        stepping = {rank for rank, pulse in self.pulses.items() if pulse["phase"] == "step" and _is_there(pulse)}
        silent = {
            rank: now - self._ticked[rank]
            for rank, pulse in self.pulses.items()
            if pulse["phase"] != "end"
            and _is_there(pulse)
            and now - self._ticked[rank] > (self.patience.frozen if rank in stepping else self.patience.starting)
        }
        if silent:
            return "; ".join(f"{self.name(rank)} is frozen: no sign of life for {silent[rank]:.1f} s" for rank in silent), list(silent)
        if not stepping:
            return None
        still = min(now - self._beaten[rank] for rank in stepping)
        if still <= max(self.patience.stalled, 10 * self.slowest):
            return None
        steps = {rank: self.pulses[rank]["step"] for rank in stepping}
        last = [rank for rank in stepping if steps[rank] == min(steps.values())]  # all of them where they wait in one collective
        names = "; ".join(self.name(rank) for rank in last)
        return f"no rank has moved for {still:.0f} s though all are alive; the furthest behind: {names}", last

    def name(self, rank: int) -> str:
        pulse = self.pulses[rank]
        return f"rank {rank} (process {pulse['pid']} on {pulse['host']}, {pulse['phase']}, {pulse['step']} steps done)"

    @property
    def slowest(self) -> float:
        """Seconds between two beats, at most."""
        return max((pulse["slowest"] for pulse in self.pulses.values()), default=0.0)

    def signal(self, number: int, ranks: set[int] | None = None) -> None:
        """Send a signal to `ranks` (None: all): through Slurm to all of them where srun started them, else to those of this machine."""
        chosen = [pulse for rank, pulse in self.pulses.items() if ranks is None or rank in ranks]
        for step in {pulse["slurm_step"] for pulse in chosen} - {None}:
            target = f"{slurm_job(os.environ)}.{step}"
            with suppress(subprocess.TimeoutExpired):  # the next look tries again
                subprocess.run(["scancel", f"--signal={int(number)}", target], check=False, capture_output=True, timeout=60)
        for pulse in chosen:
            if pulse["slurm_step"] is None and pulse["phase"] != "end":
                with suppress(ProcessLookupError):
                    os.kill(pulse["pid"], number)

    def stacks(self, ranks: list[int]) -> str:
        """What `ranks` wrote on SIGUSR2."""
        return "".join(f"=== {self.name(rank)}\n{self._stacks(rank).read_text() or 'no answer'}\n" for rank in ranks)

    def have_stacks(self) -> bool:
        """Whether every rank has written its stacks."""
        return all(self._stacks(rank).stat().st_size for rank in self.pulses)

    def _stacks(self, rank: int) -> Path:
        return self.folder / f"stacks-{rank:05d}.txt"


def _is_there(pulse: Pulse) -> bool:
    """False for a rank of this machine that is no more: an elastic launcher may give its work to a rank of another number."""
    return pulse["slurm_step"] is not None or Path(f"/proc/{pulse['pid']}").exists()


def slurm_job(env: "os._Environ[str] | dict[str, str]") -> str | None:
    """The name of this Slurm job, of this task alone if it is in an array; None outside Slurm."""
    if "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID")
