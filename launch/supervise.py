"""Keep a run going: `python -m launch.supervise --run RUN -- COMMAND`, where COMMAND is torchrun, srun or `python -m dit ...`.

A process beside the ranks watches their heartbeats. A rank that is frozen is named, the stacks of all are written down, all are killed,
and the command starts again from the newest checkpoint, as it does when a rank dies; but not when that wins no checkpoint. SIGUSR1,
SIGTERM and ctrl-C reach the ranks as SIGTERM, upon which they save; a Slurm job whose run is not done then goes back to the queue.
"""

import argparse
import errno
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

from data_pipelines.errors import UserError
from launch.attempts import AGAIN, FINAL, Attempt, Verdict, decide, record, recorded
from launch.watch import Patience, Watch, slurm_job

POLL_SECONDS = 0.1
STACKS_SECONDS = 1.0
CLEARING_SECONDS = 5.0
LOOK_SECONDS = 0.5
APART_SECONDS = 10.0
"""Before a start after one in which the processes did not meet: a node may be on its way."""
PARTING_SECONDS = 2.0
"""Between the failure of one process and the end of the others, which may have their own reason to tell."""


NO_ANSWER = "no answer from Slurm in 120 seconds"
BROKEN_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)


class Supervisor:
    """One command and its ranks, through all its attempts."""

    def __init__(self, run: Path, command: list[str], processes: int, patience: Patience, limit: int, interrupted: int = 0) -> None:
        self.run, self.command, self.processes, self.patience, self.limit = run, command, processes, patience, limit
        self.interrupted = interrupted
        self.slurm = slurm_job(os.environ)
        self.job = f"slurm-{self.slurm}" if self.slurm else f"{platform.node()}-{os.getpid()}"
        self.folder = run / "heartbeats" / self.job
        self.asked: str | None = None
        self.abort = False

    def main(self) -> int:
        """Run the command until there is nothing more to do; returns the exit code."""
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)
        attempts = [attempt for attempt in recorded(self.run) if attempt.job == self.job]
        if any(self.folder.glob("rank-*.json")):
            attempts.append(self._close(None, "killed from outside together with its supervisor"))
        while True:
            code, reason = self._attempt()
            attempts.append(self._close(code, reason))
            status = self._status()
            verdict = Verdict("finish", 130, "interrupted twice") if self.abort else decide(attempts, status.get("state"), self.limit)
            if verdict.code == 0 and status.get("state") == "interrupted" and not str(status.get("reason")).startswith("file "):
                verdict = replace(verdict, code=self.interrupted)
            say(f"{verdict.action}: {verdict.reason}")
            if verdict.action == "finish":
                return verdict.code
            if verdict.action == "requeue":
                return self._requeue(verdict)
            if not attempts[-1].met:
                self._pause(APART_SECONDS)
                if self.asked:
                    return self._requeue(Verdict("requeue", AGAIN, f"{self.asked} before any rank was started"))

    def _attempt(self) -> tuple[int, str | None]:
        """Start the command, watch it to its end; its exit code, and why it was ended if it was."""
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "DIT_HEARTBEATS": str(self.folder.resolve())}
        ranks = [subprocess.Popen(self.command, env=environment | place, start_new_session=True) for place in _places(self.processes)]
        watch = Watch(self.folder, self.patience)
        try:
            reason = self._watch(watch, ranks)
            watch.look()
            return _telling_code(ranks, watch), reason
        finally:
            for rank in ranks:
                _kill_group(rank)

    def _watch(self, watch: Watch, ranks: "list[subprocess.Popen[bytes]]") -> str | None:
        """Until all have ended: pass signals on, end what is stuck and whoever waits for the dead. Why they were ended, if they were."""
        told: set[int] = set()
        looked, parting, reason = time.monotonic(), 0.0, None
        while any(rank.poll() is None for rank in ranks):
            time.sleep(POLL_SECONDS)
            now = time.monotonic()
            if now - looked >= LOOK_SECONDS:
                looked = now
                watch.look()
                if self.asked and (untold := watch.pulses.keys() - told):
                    watch.signal(signal.SIGTERM, set(untold))
                    told |= untold
                if reason is None and (complaint := watch.complaint()):
                    reason = complaint[0]
                    self._write_stacks(watch, *complaint)
            codes = [rank.poll() or 0 for rank in ranks]
            parting = parting or (now if any(codes) else 0.0)
            if reason or self.abort or min(codes) < 0 or (parting and now - parting > PARTING_SECONDS):
                watch.signal(signal.SIGKILL)
                for rank in ranks:
                    _kill_group(rank)
        return reason

    def _write_stacks(self, watch: Watch, complaint: str, culprits: list[int]) -> None:
        """Say who is stuck and where, and keep the stacks of all ranks in the run directory."""
        say(complaint)
        watch.signal(signal.SIGUSR2)
        watch.signal(signal.SIGCONT)  # a stopped process writes its stacks when it goes on, which is not for long
        end = time.monotonic() + STACKS_SECONDS
        while time.monotonic() < end and not watch.have_stacks():
            time.sleep(0.01)
        time.sleep(0.05)  # to their end
        step = watch.pulses[culprits[0]]["step"]
        path = self.run / f"stuck-{time.strftime('%Y%m%d-%H%M%S')}-step-{step}.txt"
        path.write_text(f"{complaint}\n\n{watch.stacks(sorted(watch.pulses))}")
        print(watch.stacks(culprits), file=sys.stderr)
        say(f"stacks of all ranks: {path}")

    def _close(self, code: int | None, reason: str | None) -> Attempt:
        """Record the attempt that ended, and clear what its ranks left."""
        watch = Watch(self.folder, self.patience)
        watch.look()
        began = [pulse["first_step"] for pulse in watch.pulses.values() if pulse["first_step"] is not None]
        reached = [pulse["step"] for pulse in watch.pulses.values() if pulse["step"] is not None]
        met = self.processes > 0 or bool(watch.pulses)
        attempt = Attempt(self.job, min(began, default=None), max(reached, default=None), code, watch.slowest, reason, self.asked, met)
        record(self.run, attempt)
        end = time.monotonic() + CLEARING_SECONDS
        while self.folder.exists() and time.monotonic() < end:  # a rank on another node may still be writing
            shutil.rmtree(self.folder, ignore_errors=True)
            time.sleep(0.05 if self.folder.exists() else 0.0)
        return attempt

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.asked:
            time.sleep(POLL_SECONDS)

    def _status(self) -> dict[str, Any]:
        path = self.run / "status.json"
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    def _requeue(self, verdict: Verdict) -> int:
        """Send the Slurm job back to the queue, if it is one and is not being cancelled; elsewhere the code says what to do."""
        if not self.slurm:
            return verdict.code
        state = _slurm("squeue", "--noheader", f"--jobs={self.slurm}", "--format=%T")
        if state not in ("RUNNING", NO_ANSWER):
            say(f"the job is {state or 'gone'}: not requeued")
            return verdict.code
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the end of this job is what was asked for
        answer = _slurm("scontrol", "requeue", self.slurm)
        if answer:
            say(f"cannot requeue: {answer}; submit it again")
            return AGAIN
        time.sleep(30)  # Slurm ends this process; a job that ends by itself first is COMPLETED
        return verdict.code

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.abort = number == signal.SIGINT and self.asked == "SIGINT"
        self.asked = signal.Signals(number).name


def say(text: str) -> None:
    """A line of the supervisor's own."""
    print(f"{time.strftime('%H:%M:%S')} supervise: {text}", file=sys.stderr, flush=True)


def _places(processes: int) -> list[dict[str, str]]:
    """What torchrun would tell each rank of one machine; nothing where the command makes its ranks itself."""
    if processes == 0:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    group |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _telling_code(processes: "list[subprocess.Popen[bytes]]", watch: Watch) -> int:
    """The exit code that says most: a rank's own, which torchrun replaces by 1 and srun by that of whom it killed; 128 + n for signals."""
    codes = [process.returncode for process in processes]
    if not any(codes):
        return 0
    own = {pulse["exit"] for pulse in watch.pulses.values()}
    telling = [code for code in (*FINAL, AGAIN) if code in own or code in codes]
    failed = next((code for code in codes if code > 0), next(code for code in codes if code))
    return telling[0] if telling else failed if failed > 0 else 128 - failed


def _slurm(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return NO_ANSWER
    return (done.stdout + done.stderr).strip()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and supervise; a UserError becomes its message and exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m launch.supervise", description=__doc__, formatter_class=raw)
    parser.add_argument("--run", required=True, type=Path, help="run directory, the `out` of the config")
    parser.add_argument(
        "--processes", type=int, default=0, help="how often to start the command, as ranks of this machine (0: it makes them itself)"
    )
    parser.add_argument("--attempts", type=int, default=3, help="stop after so many without a new checkpoint (default: %(default)s)")
    parser.add_argument(
        "--interrupted",
        type=int,
        default=0,
        metavar="CODE",
        help="exit code of a run that was interrupted, by no STOP file, before its end (default: 0); 75 where 0 means that all is done",
    )
    for field in fields(Patience):
        parser.add_argument(
            f"--{field.name}", type=float, default=field.default, help="seconds (default: %(default)s), see launch/watch.py"
        )
    parser.add_argument("command", nargs="+", help="after --: what to run")
    options = parser.parse_args(argv)
    patience = Patience(options.frozen, options.starting, options.stalled)
    try:
        options.run.mkdir(parents=True, exist_ok=True)
        return Supervisor(options.run, options.command, options.processes, patience, options.attempts, options.interrupted).main()
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return AGAIN if error.errno in BROKEN_DISK else UserError.exit_code


if __name__ == "__main__":
    sys.exit(main())
