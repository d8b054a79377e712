"""What `dit evaluate` writes, as a table, and two of them compared: `python -m dit.evaluation.results A.json B.json`.

Results of different protocols are never compared: the same checkpoint gets another figure from another resize, count or network.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from math import hypot
from pathlib import Path
from typing import Any

from data_pipelines.errors import UserError

Results = dict[str, Any]
"""protocol: all that figures depend on beside what is judged. rows: name, subject (run, checkpoint, sampler), figures by split and name."""


def table(results: Results) -> str:
    """Figures as lines and rows as columns, Markdown: value ± half the 95 % interval, one after another for each split."""
    rows = results["rows"]
    names = dict.fromkeys(name for row in rows for figures in row["figures"].values() for name in figures)
    splits = list(results["protocol"]["reference"])
    lines = ["| " + " / ".join(splits) + " | " + " | ".join(row["name"] for row in rows) + " |", "|" + "---|" * (len(rows) + 1)]
    for name in names:
        cells = [" / ".join(_cell(row["figures"][split].get(name)) for split in splits) for row in rows]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    seconds = ["" if row["seconds_per_clip"] is None else f"{row['seconds_per_clip']:.3f}" for row in rows]
    return "\n".join([*lines, "| s/clip | " + " | ".join(seconds) + " |"])


def compare(a: Results, b: Results) -> str:
    """The differences b - a of every figure of every judged row, row by row, with what they are evidence of.

    The interval of a difference takes the two as independent, which is conservative, since both were drawn for the same captions and
    noise. Raises UserError, naming the fields, if the protocols differ, or if there are not as many rows.
    """
    protocols = [dict(_flat(results["protocol"])) for results in (a, b)]
    differ = [key for key in sorted(protocols[0].keys() | protocols[1].keys()) if protocols[0].get(key) != protocols[1].get(key)]
    if differ:
        fields = "\n".join(f"  {key}: {protocols[0].get(key)} and {protocols[1].get(key)}" for key in differ)
        raise UserError(f"these results were measured by different protocols and cannot be compared:\n{fields}")
    judged = [[row for row in results["rows"] if row["subject"]] for results in (a, b)]
    if len(judged[0]) != len(judged[1]):
        raise UserError(f"got {len(judged[0])} and {len(judged[1])} contestants, expected as many of each: they are compared in order")
    lines = ["| A | B | split | figure | A | B | B - A | |", "|" + "---|" * 8]
    for one, other in zip(*judged, strict=True):
        for split, figures in one["figures"].items():
            for name in figures.keys() & other["figures"][split].keys():
                difference = _difference(figures[name], other["figures"][split][name])
                lines.append(f"| {one['name']} | {other['name']} | {split} | {name} | {difference} |")
    return "\n".join([*lines[:2], *sorted(lines[2:])])


def _difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    change = b["value"] - a["value"]
    cells = f"{_cell(a)} | {_cell(b)} | {change:+.4g}"
    if a["low"] is None or b["low"] is None:
        return f"{cells} | no interval"
    # each end by the halves that face it: intervals of proportions are not symmetric
    below = hypot(b["value"] - b["low"], a["high"] - a["value"])
    above = hypot(b["high"] - b["value"], a["value"] - a["low"])
    verdict = "B is higher" if change > below else "B is lower" if -change > above else "no evidence"
    return f"{cells} [{change - below:+.4g}, {change + above:+.4g}] | {verdict}"


def _cell(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "-"
    if figure["low"] is None:
        return f"{figure['value']:.3g}"
    return f"{figure['value']:.4g} ±{(figure['high'] - figure['low']) / 2:.2g}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read(path: str) -> Results:
    """Read results.json. Raises UserError for a file that is none."""
    try:
        results = json.loads(Path(path).read_text())
        if {"protocol", "rows"} <= results.keys():
            return results
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a results.json of dit evaluate ({error})") from error
    raise UserError(f"{path}: not a results.json of dit evaluate: `protocol` or `rows` is missing")


def main(argv: Sequence[str]) -> int:
    """Print the comparison of two files; returns the exit code."""
    if len(argv) != 2:
        print("usage: python -m dit.evaluation.results A/results.json B/results.json", file=sys.stderr)
        return 2
    try:
        print(compare(read(argv[0]), read(argv[1])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
