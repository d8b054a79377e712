"""One progress line with an ETA for work that is counted in items: rewritten in place on a terminal, else a plain line now and then."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
PLAIN_SECONDS = 10.0
"""How often a line is printed where output is not a terminal."""


class Progress:
    """Count items done and say how long the rest will take; `silent` counts only."""

    def __init__(self, total: int, label: str, unit: str = "", *, silent: bool = False) -> None:
        self.total, self.label, self.unit, self.silent = total, label, unit, silent
        self.done = 0
        self.start = self.last = time.monotonic()
        self.terminal = sys.stdout.isatty()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Note that `count` more items are done, and print if it is time."""
        self.done += count
        now = time.monotonic()
        finished = self.done >= self.total
        if self.silent:
            return
        if not finished and now - self.last < (0.2 if self.terminal else PLAIN_SECONDS):
            return
        self.last = now
        line = self._line(now - self.start, finished, note)
        if self.terminal:
            print(f"\r\x1b[2K{line}", end="\n" if finished else "", flush=True)
        else:
            print(line, flush=True)

    def _line(self, elapsed: float, finished: bool, note: str) -> str:
        rate = self.done / max(elapsed, 1e-9)
        rest = f"{duration(elapsed)}" if finished else f"ETA {duration((self.total - self.done) / max(rate, 1e-9))}"
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.label}  {self.done}/{self.total}{unit}  {rate:.3g}/s  {rest}{'  ' + note if note else ''}"


def track(items: Iterable[Item], label: str, total: int | None = None, *, silent: bool = False) -> Iterator[Item]:
    """Yield `items` and print progress unless `silent`; `total` is needed where they have no length."""
    known = list(items) if total is None and not hasattr(items, "__len__") else items
    progress = Progress(total if total is not None else len(known), label, silent=silent)  # type: ignore[arg-type]
    for item in known:
        yield item
        progress.advance()


def duration(seconds: float) -> str:
    """Seconds as 7s, 3m05s or 2h10m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
