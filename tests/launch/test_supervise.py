"""A supervised run survives frozen, dead and stuck ranks, and stops where starting again does not help. Real processes and signals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.processes import ENVIRONMENT, wait_for

COUNTING = str(Path(__file__).parent / "counting.py")
QUICK = ("--frozen", "6", "--stalled", "6")


def supervise(
    run: Path, *options: str, total: int = 8, seconds: float = 0.05, fault: tuple[str, ...] = (), **environment: str
) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "launch.supervise", "--run", str(run), *QUICK, *options, "--", sys.executable, COUNTING]
    arguments = (str(run), str(total), str(seconds), *fault)
    return subprocess.Popen([*command, *arguments], env=ENVIRONMENT | environment, stderr=subprocess.PIPE, text=True)


def finished(process: "subprocess.Popen[str]") -> str:
    err = process.communicate(timeout=240)[1]
    return f"exit {process.returncode}\n{err}"


def attempts(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("freeze", r"rank 1 \(process \d+ on .+, step, \d steps done\) is frozen: no sign of life for \d.\d s\n"),
        ("hold", r"rank 1 \(process \d+ on .+, step, \d steps done\) is frozen: no sign of life for \d.\d s\n"),
        ("wait", r"no rank has moved for \d+ s though all are alive; .*rank 1"),
        ("die", "exit code 137"),
    ],
)
def test_a_rank_that_fails_costs_a_restart_from_the_last_checkpoint(tmp_path: Path, fault: str, words: str) -> None:
    said = finished(supervise(tmp_path, "--processes", "2", fault=(fault, "4")))
    assert said.startswith("exit 0"), said
    assert re.search(words, said), said
    first, second = attempts(tmp_path)
    assert (first["began"], second["began"], second["code"]) == (0, 3, 0)
    assert (tmp_path / "saved.txt").read_text() == "6"
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"
    stacks = "".join(path.read_text() for path in tmp_path.glob("stuck-*-step-*.txt"))
    assert (fault == "die") == (stacks == "")
    if stacks:
        healthy, stuck = stacks.split("=== rank 1")
        assert f'{COUNTING}", line' in healthy
        assert "in fault" in stuck, "the line that the culprit stands at"
        assert "in fault" in said
    assert not list((tmp_path / "heartbeats").iterdir())


def test_a_fault_without_a_checkpoint_in_between_ends_the_run(tmp_path: Path) -> None:
    said = finished(supervise(tmp_path, fault=("always-die", "4")))
    assert said.startswith("exit 93"), said
    assert "3 attempts in a row have failed without a new checkpoint" in said
    assert [attempt["began"] for attempt in attempts(tmp_path)] == [0, 3, 3, 3], "the first attempt won a checkpoint"


def test_an_error_that_would_come_again_ends_the_run_with_the_code_of_its_rank(tmp_path: Path) -> None:
    said = finished(supervise(tmp_path, "--processes", "2", fault=("5", "1")))
    assert said.startswith("exit 5"), said
    assert len(attempts(tmp_path)) == 1


def test_code_75_asks_for_another_start_by_whoever_started_it(tmp_path: Path) -> None:
    assert finished(supervise(tmp_path, fault=("75", "4"))).startswith("exit 75")
    assert finished(supervise(tmp_path, fault=("75", "4"))).startswith("exit 0")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_signals_reach_ranks_as_sigterm_and_the_same_command_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    process = supervise(tmp_path, "--processes", "2", total=40)
    wait_for(lambda: (tmp_path / "steps.txt").exists() and len((tmp_path / "steps.txt").read_text().split()) > 4)
    process.send_signal(number)
    said = finished(process)
    assert said.startswith("exit 0"), said
    assert f"interrupted after {number.name}" in said
    assert attempts(tmp_path)[0]["slowest"] > 0.04
    assert finished(supervise(tmp_path, total=40)).startswith("exit 0")
    steps = [int(step) for step in (tmp_path / "steps.txt").read_text().split()]
    assert steps == list(range(1, 41)), "no step lost, none taken twice"


@pytest.mark.parametrize(("reason", "code"), [("SIGTERM on rank 3", 75), ("file runs/a/STOP", 0), (None, 75)])
def test_where_0_means_done_an_interrupted_run_ends_with_another_code(tmp_path: Path, reason: str | None, code: int) -> None:
    """In a group of pods one was evicted and all have saved; a run that somebody stopped stays stopped."""
    status = json.dumps({"state": "interrupted", "reason": reason})
    write = ["sh", "-c", 'printf %s "$1" > "$2"', "sh", status, str(tmp_path / "status.json")]
    for options, expected in ((("--interrupted", "75"), code), ((), 0)):
        command = [sys.executable, "-m", "launch.supervise", "--run", str(tmp_path), *options, "--", *write]
        assert subprocess.run(command, env=ENVIRONMENT, check=False, capture_output=True, timeout=60).returncode == expected


def test_a_full_disk_is_no_reason_never_to_start_again(tmp_path: Path) -> None:
    """What cannot be written into the history, and a line of it that was cut off, change nothing."""
    (tmp_path / "attempts.jsonl").symlink_to("/dev/full")
    command = [sys.executable, "-m", "launch.supervise", "--run", str(tmp_path), "--", "sh", "-c", "exit 75"]
    done = subprocess.run(command, env=ENVIRONMENT, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 75
    assert "No space left on device; not recorded" in done.stderr
    (tmp_path / "attempts.jsonl").unlink()
    (tmp_path / "attempts.jsonl").write_text('{"job": "x", "beg')
    assert subprocess.run(command, env=ENVIRONMENT, check=False, capture_output=True, timeout=60).returncode == 75


def test_processes_that_do_not_meet_are_started_until_they_do(tmp_path: Path) -> None:
    """The launcher fails until the other node is there, more often than the run itself may fail; then the command is what it was."""
    script = 'if [ "$(wc -l < "$2" 2>/dev/null || echo 0)" -lt 4 ]; then exit 1; fi; shift 2; exec "$@"'
    program = [sys.executable, COUNTING, str(tmp_path), "4", "0.02"]
    command = ["sh", "-c", script, "sh", "-", str(tmp_path / "attempts.jsonl"), *program]
    supervisor = "import launch.supervise as s, sys; s.APART_SECONDS = 0.1; sys.exit(s.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", supervisor, "--run", str(tmp_path), "--", *command],
        env=ENVIRONMENT, check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no rank was started, 4 of 30 times in a row" in done.stderr
    assert [(attempt["code"], attempt["met"]) for attempt in attempts(tmp_path)] == [(1, False)] * 4 + [(0, True)]


def test_a_warning_while_nobody_has_come_starts_nothing_more(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.supervise", "--run", str(tmp_path), "--", "false"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "attempts.jsonl").exists())
    process.send_signal(signal.SIGUSR1)
    assert finished(process).startswith("exit 75")
    assert len(attempts(tmp_path)) == 1


@pytest.mark.slow
def test_a_machine_that_slept_blames_nobody(tmp_path: Path) -> None:
    process = supervise(tmp_path, "--processes", "2", "--frozen", "4", "--stalled", "3", total=25, seconds=0.1)
    wait_for(lambda: (tmp_path / "steps.txt").exists())
    everyone = [process.pid, *(json.loads(path.read_text())["pid"] for path in tmp_path.glob("heartbeats/*/rank-*.json"))]
    assert len(everyone) == 3
    for number, pause in ((signal.SIGSTOP, 0.0), (signal.SIGCONT, 0.7)):
        for pid in everyone:
            os.kill(pid, number)
            time.sleep(pause)  # the supervisor wakes first
        time.sleep(3.0)
    assert "frozen" not in finished(process)
    assert len(attempts(tmp_path)) == 1


def test_a_job_that_was_killed_with_its_supervisor_remembers_it_when_it_is_back(tmp_path: Path) -> None:
    process = supervise(tmp_path, total=200, SLURM_JOB_ID="7")
    wait_for(lambda: (tmp_path / "saved.txt").exists())
    rank = tmp_path / "heartbeats" / "slurm-7" / "rank-00000.json"
    for pid in (process.pid, json.loads(rank.read_text())["pid"]):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert finished(supervise(tmp_path, total=8, SLURM_JOB_ID="7")).startswith("exit 0")
    killed, second = attempts(tmp_path)
    assert (killed["job"], killed["began"], killed["code"]) == ("slurm-7", 0, None)
    assert second["began"] is None or second["began"] >= 3
