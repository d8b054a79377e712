"""What follows from how a run ended."""

from pathlib import Path

import pytest

from launch.attempts import APART, Attempt, decide, failures_in_a_row, record, recorded


def history(*ends: tuple[int | None, int | None]) -> list[Attempt]:
    """Attempts by (step they began at, exit code)."""
    return [Attempt("job", began, began, code) for began, code in ends]


@pytest.mark.parametrize(
    ("ends", "count"),
    [
        ([(0, 0)], 0),
        ([(0, 1), (0, 1)], 2),
        ([(0, 1), (20, 1), (40, 1)], 1),  # each won a checkpoint
        ([(0, 1), (20, 1), (20, None), (None, 1)], 3),  # killed from outside, failed in its imports
        ([(20, 1), (0, 1)], 2),  # fell back to an older one
        ([(20, 1), (20, 1), (20, 0), (30, 1)], 1),
    ],
)
def test_failures_without_a_new_checkpoint(ends: list[tuple[int | None, int | None]], count: int) -> None:
    assert failures_in_a_row(history(*ends)) == count


def test_a_preemption_before_the_first_step_is_no_failure_but_one_without_a_save_is() -> None:
    early, late = Attempt("job", None, None, 143, asked="SIGUSR1"), Attempt("job", 0, 9, 143, asked="SIGUSR1")
    assert decide([early] * 5, None, 3).action == "requeue"
    assert decide([late] * 2, "running", 3).action == "requeue"
    assert (decide([late] * 3, "running", 3).action, decide([late] * 3, "running", 3).code) == ("finish", 93)


@pytest.mark.parametrize(
    ("code", "state", "asked", "action", "exit_code"),
    [
        (0, "done", None, "finish", 0),
        (0, "done", "SIGTERM", "finish", 0),
        (0, "interrupted", None, "finish", 0),  # by a STOP file
        (0, "interrupted", "SIGUSR1", "requeue", 0),
        (0, None, None, "finish", 0),  # a verb without status.json
        (1, "failed", None, "restart", 1),
        (139, "running", None, "restart", 139),
        (75, "failed", None, "requeue", 75),
        *((code, "failed", asked, "finish", code) for code in (2, 3, 4, 5, 93) for asked in (None, "SIGUSR1")),
    ],
)
def test_what_to_do(code: int, state: str | None, asked: str | None, action: str, exit_code: int) -> None:
    verdict = decide([Attempt("job", 0, 9, code, asked=asked)], state, 3)
    assert (verdict.action, verdict.code) == (action, exit_code)


def test_processes_that_do_not_meet_are_waited_for_but_not_for_ever() -> None:
    """The node that all meet at is away for minutes: no sign that the run itself would fail again."""
    failed, apart = Attempt("job", 0, 9, 1), Attempt("job", None, None, 1, met=False)
    assert failures_in_a_row([failed, *[apart] * 9, failed]) == 2
    assert decide([failed, *[apart] * (APART - 1)], "running", 3).action == "restart"
    verdict = decide([failed, *[apart] * APART], "running", 3)
    assert (verdict.action, verdict.code) == ("finish", 93)
    assert decide([*[apart] * APART, failed], "running", 3).action == "restart"


def test_a_line_that_was_cut_off_or_is_of_another_release_costs_itself_alone(tmp_path: Path) -> None:
    first, last = Attempt("job", 0, 9, 1), Attempt("job", 9, 12, 0)
    record(tmp_path, first)
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('{"job": "job", "mood": "good"}\n{"job": "jo')
    record(tmp_path, last)
    assert recorded(tmp_path) == [first, last]
