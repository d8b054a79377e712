"""The progress line: where the run is, how fast, and what it waits for."""

import math
import sys
import time
from typing import TextIO

import torch

SECONDS_BETWEEN_LINES = 20.0
SECONDS_ON_TERMINAL = 1.0
SMOOTHING = 0.95
PEAK_BF16_FLOPS = {
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
}
"""Dense bfloat16 FLOP/s from the data sheets, by a word of the device's name (SXM parts)."""


def peak_flops(precision: str) -> float | None:
    """Peak FLOP/s of this process's device at `precision`, or None where it is not known."""
    if precision != "bf16" or not torch.cuda.is_available():
        return None
    words = torch.cuda.get_device_name().split()
    return next((peak for name, peak in PEAK_BF16_FLOPS.items() if name in words and "PCIe" not in words), None)


class Progress:
    """Measures steps and prints a line: rewritten in place on a terminal, else one plain line an interval.

    total: samples of the run. peak: FLOP/s of all devices together, or None.
    """

    def __init__(self, total: int, every_steps: int, peak: float | None, out: TextIO | None = None) -> None:
        self.total, self.every_steps, self.peak = total, every_steps, peak
        self.out = sys.stdout if out is None else out
        self._losses: dict[str, tuple[float, int]] = {}
        self.curves: dict[str, float] = {}
        """The newest value of every curve: where networks train in turns, not all have one from the last step."""
        self._printed = time.monotonic()
        self._reset()

    def _reset(self) -> None:
        self.steps = self.samples = 0
        self.seconds = self.data_seconds = self.flops = 0.0

    def add(self, loss: float, samples: int, seconds: float, data_seconds: float, flops: float, network: str = "") -> None:
        """Count one step, of the network in turn: `samples`, `seconds`, of them `data_seconds` waiting for data, `flops` on all devices."""
        if math.isfinite(loss):
            mean, count = self._losses.get(network, (0.0, 0))
            memory = min(SMOOTHING, 1 - 1 / (count + 1))  # the plain mean at first
            self._losses[network] = (memory * mean + (1 - memory) * loss, count + 1)
        self.steps += 1
        self.samples += samples
        self.seconds += seconds
        self.data_seconds += data_seconds
        self.flops += flops

    def is_due(self, step: int) -> bool:
        """True every `every_steps` steps and at least every 20 s, on a terminal every second."""
        patience = SECONDS_ON_TERMINAL if self.out.isatty() else SECONDS_BETWEEN_LINES
        return step % self.every_steps == 0 or time.monotonic() - self._printed >= patience

    def rates(self) -> dict[str, float]:
        """Averages since the last line, as TensorBoard tags."""
        rates = {
            "perf/step_time": self.seconds / self.steps,
            "perf/data_time": self.data_seconds / self.steps,
            "perf/samples_per_sec": self.samples / self.seconds,
        }
        if self.flops and self.peak:
            rates["perf/mfu"] = self.flops / self.seconds / self.peak
        return rates

    def show(self, step: int, samples_seen: int, grad_norm: float, lr: float) -> None:
        """Print the line and start a new interval."""
        rate = self.samples / self.seconds
        eta = time_left((self.total - samples_seen) / rate)
        parts = [
            f"step {step}",
            f"{samples_seen}/{self.total} ({samples_seen / self.total:.1%})",
            f"eta {eta}",
            *(f"{network} loss {mean:.4f}".lstrip() for network, (mean, _) in sorted(self._losses.items())),
            f"grad {grad_norm:.3g}",
            f"lr {lr:.2e}",
            f"{rate:.1f} samples/s",
            f"data {self.data_seconds / self.seconds:.0%}",
        ]
        if self.flops and self.peak:
            parts.append(f"MFU {self.flops / self.seconds / self.peak:.1%}")
        line = "  ".join(parts)
        self.out.write(f"\r{line}\033[K" if self.out.isatty() else line + "\n")
        self.out.flush()
        self._printed = time.monotonic()
        self._reset()

    def end(self) -> None:
        """Leave the rewritten line standing."""
        if self.out.isatty():
            self.out.write("\n")


def time_left(seconds: float) -> str:
    """A duration as a person says it: 45s, 12m, 3h05m, 2d04h."""
    whole = max(0, round(seconds))
    if whole < 120:
        return f"{whole}s"
    minutes = whole // 60
    if minutes < 120:
        return f"{minutes}m"
    hours = minutes // 60
    return f"{hours}h{minutes % 60:02d}m" if hours < 48 else f"{hours // 24}d{hours % 24:02d}h"
