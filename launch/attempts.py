"""What became of each start of a run, kept in `attempts.jsonl` of its folder, and what follows from it. Exit codes are an interface:
0 done, or interrupted cleanly (status.json says which); 2 config, 3 data, 4 checkpoints, 5 access; 75 start again; 93 never again."""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

FINAL = (2, 3, 4, 5, 93)
"""The same command would fail in the same way."""
AGAIN, NEVER = 75, 93
APART = 30
"""Starts in a row in which the processes did not meet, after which nobody is waited for any more."""
GRACE_MARGIN = 30.0


@dataclass(frozen=True)
class Attempt:
    """One start. job: whose. began, reached: optimizer steps at its first beat and its last, None if it took none. code: None if the
    supervisor was killed with it. slowest: seconds of the longest step, with what was done in it. reason: why the supervisor ended it, if
    it did. asked: the signal that asked the supervisor to end it. met: whether any rank came to life: the launcher starts none before the
    nodes have found each other."""

    job: str
    began: int | None
    reached: int | None
    code: int | None
    slowest: float = 0.0
    reason: str | None = None
    asked: str | None = None
    met: bool = True


@dataclass(frozen=True)
class Verdict:
    action: Literal["finish", "restart", "requeue"]
    code: int
    reason: str


def record(run: Path, attempt: Attempt) -> None:
    """Append `attempt` to those of `run`. A full or broken disk may have ended it and has no room for this: then it is said alone."""
    line = json.dumps(asdict(attempt))
    try:
        with (run / "attempts.jsonl").open("ab+") as file:
            if length := file.seek(0, os.SEEK_END):
                file.seek(length - 1)
                line = line if file.read() == b"\n" else f"\n{line}"  # behind one that was cut off
            file.write(line.encode() + b"\n")
    except OSError as error:
        print(f"{run}/attempts.jsonl: {error.strerror}; not recorded: {line}", file=sys.stderr, flush=True)


def recorded(run: Path) -> list[Attempt]:
    """Every attempt at `run`, oldest first, but for lines that were cut off or are of another release."""
    path, found = run / "attempts.jsonl", list[Attempt]()
    for line in path.read_text().splitlines() if path.is_file() else ():
        with suppress(ValueError, TypeError):
            found.append(Attempt(**json.loads(line)))
    return found


def grace(run: Path, default: float) -> float:
    """Seconds that a run needs from the wish to stop to its end: twice its slowest step so far, which had a save in it, and a margin."""
    slowest = max((attempt.slowest for attempt in recorded(run)), default=0.0)
    return 2 * slowest + GRACE_MARGIN if slowest else default


def failures_in_a_row(attempts: Sequence[Attempt]) -> int:
    """Failed attempts at the end of `attempts` of which none began further than the ones before it: no checkpoint was won in between.

    One that was asked to end before its first step says nothing, nor does one whose processes did not meet; one that had steps to save
    and did not, for lack of time, failed.
    """
    count, furthest = 0, -1
    for attempt in attempts:
        if attempt.code == 0:
            count = 0
        elif (attempt.began is None and attempt.asked) or not attempt.met:
            continue
        elif attempt.began is not None and attempt.began > furthest:
            count = 1
        else:
            count += 1
        furthest = max(furthest, -1 if attempt.began is None else attempt.began)
    return count


def decide(attempts: Sequence[Attempt], state: str | None, limit: int) -> Verdict:
    """What to do after the last of `attempts`. state: of status.json.

    A run that somebody stopped by a STOP file is not started again; one that the scheduler stopped is.
    """
    code, asked = attempts[-1].code, attempts[-1].asked
    assert code is not None
    if code == 0:
        again = asked is not None and state == "interrupted"
        return Verdict("requeue" if again else "finish", 0, f"{state or 'finished'}{f' after {asked}' if asked else ''}")
    if code in FINAL:
        return Verdict("finish", code, f"exit code {code}: starting again would not help")
    failed = f"exit code {code}"
    if not attempts[-1].met:
        apart = next((number for number, attempt in enumerate(reversed(attempts)) if attempt.met), len(attempts))
        if apart >= APART:
            return Verdict("finish", NEVER, f"{failed}; {apart} times in a row no rank was started")
        if not asked and code != AGAIN:
            return Verdict("restart", code, f"{failed}; no rank was started, {apart} of {APART} times in a row")
    if (count := failures_in_a_row(attempts)) >= limit:
        return Verdict("finish", NEVER, f"{failed}; {count} attempts in a row have failed without a new checkpoint")
    if asked or code == AGAIN:
        return Verdict("requeue", AGAIN, f"{failed}{f' after {asked}' if asked else ''}")
    return Verdict("restart", code, f"{failed}; attempt {count + 1} of {limit} without a new checkpoint")
