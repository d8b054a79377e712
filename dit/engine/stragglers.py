"""Ranks that are slower than the others, who wait for them in every step: named in the log once a window."""

import logging
import platform
import time
from collections.abc import Sequence
from statistics import median, median_low

import torch

from dit.runtime import distributed

log = logging.getLogger(__name__)
WINDOW = 25
"""Steps that a rank is judged by."""
FACTOR = 1.5


class OwnTime:
    """Seconds inside `with`, of the device if it is a GPU; read it when the device has been waited for."""

    def __init__(self) -> None:
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._host = 0.0

    def __enter__(self) -> None:
        if torch.cuda.is_available():
            self._spans.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._spans[-1][0].record()
        self._host -= time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._host += time.perf_counter()
        if self._spans:
            self._spans[-1][1].record()

    def seconds(self) -> float:
        """All spans together."""
        return sum(begin.elapsed_time(end) for begin, end in self._spans) / 1000 if self._spans else self._host


class Stragglers:
    """Judges ranks by the median over a window of what a step costs them before they first wait for each other."""

    def __init__(self) -> None:
        self._seconds: list[float] = []

    def add(self, seconds: float, step: int) -> None:
        """Count the seconds of this rank's own in `step`. Called by all ranks alike."""
        self._seconds.append(seconds)
        if len(self._seconds) < WINDOW:
            return
        ranks = distributed.gather_json([median(self._seconds), platform.node()])
        self._seconds = []
        for rank, score in slow_ranks([own for own, _ in ranks]):
            own, host = ranks[rank]
            if distributed.rank() == 0:
                where = f"steps {step - WINDOW + 1}-{step}: rank {rank} on {host}"
                log.warning("%s is slow, and all wait for it: %.3g s of its own a step, %.2f times the median of ranks", where, own, score)


def slow_ranks(seconds: Sequence[float]) -> list[tuple[int, float]]:
    """Ranks that take `FACTOR` times the median of all or more, with that factor. Of two ranks the median is the faster."""
    middle = median_low(seconds)
    return [(rank, own / middle) for rank, own in enumerate(seconds) if own >= FACTOR * middle]
