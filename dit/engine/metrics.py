"""What a run records: `metrics.jsonl`, `bad_samples.jsonl`, `status.json` and TensorBoard. Written by rank 0 alone.

Knows no tensors of the model and takes no decisions.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from torch import Tensor

from data_pipelines.config_file import replace_file
from dit.engine.durable import naming


class JsonLines:
    """A file of JSON objects, one a line, each with its "step". Opened behind `step`: later lines are of work that was lost."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.kept = _lines_until(path, step)
        _write_atomically(path, "".join(line + "\n" for line in self.kept))
        self._file: TextIO = path.open("a", buffering=1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object; floats keep every digit."""
        with naming(self.path):
            self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        self._file.close()


class Records:
    """All that a run writes beside checkpoints, from `step` on. On other ranks than the first it writes nothing."""

    def __init__(self, run_dir: Path, step: int, is_writer: bool) -> None:
        self.run_dir = run_dir
        self.is_writer = is_writer
        self.bad_file = run_dir / "bad_samples.jsonl"
        self._step = step
        self.held_out: Mapping[str, Any] | None = None
        """What the last validation before this step recorded."""
        self._metrics: JsonLines | None = None
        self._bad: JsonLines | None = None
        self._board: Any = None

    def __enter__(self) -> "Records":
        if self.is_writer:
            from torch.utils.tensorboard import SummaryWriter

            for name in ("samples", "tensorboard"):
                (self.run_dir / name).mkdir(parents=True, exist_ok=True)
            self._metrics = JsonLines(self.run_dir / "metrics.jsonl", self._step)
            self.held_out = _last_validation(self._metrics)
            self._bad = JsonLines(self.bad_file, self._step)
            self._board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=self._step + 1, flush_secs=20)
            self.status("running", self._step)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in (self._metrics, self._bad, self._board):
            if file is not None:
                file.close()
        if error is not None:
            self.status("failed", self._step, reason=f"{type(error).__name__}: {error}")

    @property
    def bad_before(self) -> int:
        """Unusable samples recorded before this start; zero where nothing is written."""
        return len(self._bad.kept) if self._bad else 0

    def step(self, record: Mapping[str, Any]) -> None:
        """One line of `metrics.jsonl`."""
        self._step = int(record["step"])
        self.held_out = record.get("held_out", self.held_out)
        if self._metrics:
            self._metrics.write(record)

    def rewind(self, step: int) -> None:
        """Forget the lines of `metrics.jsonl` behind `step`: their work is undone. The samples that could not be read then are not read
        again, so they stay, as found at `step`."""
        self._step = step
        if not (self._metrics and self._bad):
            return
        self._metrics.close()
        self._metrics = JsonLines(self.run_dir / "metrics.jsonl", step)
        self.held_out = _last_validation(self._metrics)
        self._bad.close()
        found = [json.loads(line) for line in self.bad_file.read_text().splitlines()]
        _write_atomically(self.bad_file, "".join(json.dumps(one | {"step": min(one["step"], step)}) + "\n" for one in found))
        self._bad = JsonLines(self.bad_file, step)

    def untrusted(self, record: Mapping[str, Any]) -> None:
        """Write down a step that the guard did not take as it was, as `bad_steps/step-N.json`."""
        if self.is_writer:
            path = self.run_dir / "bad_steps" / f"step-{record['step']:08d}.json"
            path.parent.mkdir(exist_ok=True)
            _write_atomically(path, json.dumps(record, indent=1) + "\n")

    def bad(self, step: int, samples: list[tuple[str, str]]) -> None:
        """Unusable samples of `step`: id and reason of each."""
        if not self._bad:
            return
        for sample, reason in samples:
            self._bad.write({"step": step, "id": sample, "reason": reason})

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Points of TensorBoard curves, by tag."""
        if not self._board:
            return
        for tag, value in values.items():
            self._board.add_scalar(tag, value, step)

    def videos(self, videos: Tensor, step: int) -> None:
        """Show `videos` (B, T, H, W, 3) uint8 in TensorBoard, the first frame of each as an image."""
        if self._board:
            self._board.add_images("samples/first_frame", videos[:, 0], step, dataformats="NHWC")  # (B, H, W, 3)

    def status(self, state: str, step: int, **more: Any) -> None:
        """Replace `status.json`, which other programs poll."""
        if self.is_writer:
            _write_atomically(self.run_dir / "status.json", json.dumps({"state": state, "step": step, **more}) + "\n")


def _last_validation(metrics: JsonLines) -> Mapping[str, Any] | None:
    return next((json.loads(line)["held_out"] for line in reversed(metrics.kept) if '"held_out"' in line), None)


def _lines_until(path: Path, step: int) -> list[str]:
    if not path.exists():
        return []
    kept = []
    for line in path.read_text().splitlines():
        try:
            if int(json.loads(line)["step"]) > step:
                continue
        except ValueError:  # the line that was being written when the process was killed
            continue
        kept.append(line)
    return kept


def _write_atomically(path: Path, text: str) -> None:
    with naming(path):
        replace_file(path, text)
