"""Asking a run to stop: SIGTERM, SIGINT, or a file named STOP in its directory.

Only notes the wish; the loop makes all ranks agree on it. Never USR1: it kills torchrun, and NCCL uses it.
"""

import signal
from pathlib import Path
from types import FrameType, TracebackType


class StopSignals:
    """While entered, SIGTERM and SIGINT set `reason` instead of ending the process; a second SIGINT interrupts at once."""

    def __init__(self, run_dir: Path) -> None:
        self.file = run_dir / "STOP"
        self._signal: str | None = None
        self._before: dict[signal.Signals, object] = {}

    @property
    def reason(self) -> str | None:
        """Why to stop, or None."""
        if self._signal:
            return self._signal
        return f"file {self.file}" if self.file.exists() else None

    def honoured(self) -> str | None:
        """Say why it was stopped, and take the STOP file away so that the same command can go on."""
        reason = self.reason
        self.file.unlink(missing_ok=True)
        return reason

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number).name
