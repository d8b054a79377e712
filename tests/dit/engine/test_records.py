"""What a run writes for people and programs: metrics, status, progress line."""

import io
import json
from pathlib import Path

import pytest

from dit.engine import progress
from dit.engine.metrics import JsonLines, Records
from dit.engine.progress import Progress, time_left


def test_lines_behind_the_restored_step_and_torn_ones_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    file = JsonLines(path, 2)
    file.write({"step": 3, "loss": 1 / 3})
    assert path.read_text() == '{"step": 1, "loss": 0.1}\n{"step": 2}\n{"step": 3, "loss": 0.3333333333333333}\n'
    file.close()


def test_a_crash_is_in_the_status(tmp_path: Path) -> None:
    def crash() -> None:
        with Records(tmp_path, 4, True) as records:
            records.step({"step": 5})
            raise ZeroDivisionError("oh")

    with pytest.raises(ZeroDivisionError):
        crash()
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "failed", "step": 5, "reason": "ZeroDivisionError: oh"}


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Records(tmp_path, 0, False) as records:
        records.step({"step": 1})
        records.bad(1, [("a", "b")])
        records.scalars({"train/loss": 1.0}, 1)
        records.status("running", 1)
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_read_stays_known_when_its_step_is_undone(tmp_path: Path) -> None:
    with Records(tmp_path, 0, True) as records:
        for step in range(1, 6):
            records.step({"step": step, "held_out": {"loss": step}} if step in (2, 4) else {"step": step})
        records.bad(1, [("a", "torn")])
        records.bad(4, [("b", "torn"), ("c", "gone")])
        records.rewind(3)
        assert records.held_out == {"loss": 2}
        records.step({"step": 4})
        records.bad(4, [("d", "torn")])
    found = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert [(one["step"], one["id"]) for one in found] == [(1, "a"), (3, "b"), (3, "c"), (4, "d")]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    with Records(tmp_path, 3, True) as again:
        assert again.bad_before == 3


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_line() -> None:
    out = io.StringIO()
    line = Progress(1000, 2, peak=1e12, out=out)
    line.add(2.0, 50, 1.0, 0.25, 1e11)
    line.add(4.0, 50, 1.0, 0.25, 3e11)
    assert line.is_due(2)
    assert not line.is_due(3)
    assert line.rates() == {"perf/step_time": 1.0, "perf/data_time": 0.25, "perf/samples_per_sec": 50.0, "perf/mfu": 0.2}
    line.show(2, 100, 0.5, 1e-3)
    expected = "step 2  100/1000 (10.0%)  eta 18s  loss 3.0000  grad 0.5  lr 1.00e-03  50.0 samples/s  data 25%  MFU 20.0%\n"
    assert out.getvalue() == expected


def test_a_terminal_gets_one_line_rewritten() -> None:
    out = Terminal()
    line = Progress(10, 1, peak=None, out=out)
    for step in (1, 2):
        line.add(1.0, 1, 1.0, 0.0, 0.0)
        line.show(step, step, 1.0, 1.0)
    line.end()
    assert out.getvalue().count("\n") == 1
    assert out.getvalue().count("\r") == 2


def test_slow_steps_are_reported_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Progress(10, 1000, peak=None, out=io.StringIO())
    assert not line.is_due(1)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    assert line.is_due(1)


@pytest.mark.parametrize(("seconds", "text"), [(45, "45s"), (720, "12m"), (11_100, "3h05m"), (187_200, "2d04h"), (-1, "0s")])
def test_durations(seconds: float, text: str) -> None:
    assert time_left(seconds) == text
