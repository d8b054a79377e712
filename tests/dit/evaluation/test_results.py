"""Results of one protocol are compared figure by figure; of two protocols never, and the fields that differ are named."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.errors import UserError
from dit.evaluation.results import compare, main, table


def figure(value: float, half: float | None) -> dict[str, Any]:
    low, high = (None, None) if half is None else (value - half, value + half)
    return {"value": value, "low": low, "high": high, "count": 100}


def results(**figures: dict[str, Any]) -> dict[str, Any]:
    facts = {"features": {"name": "network", "weights": "abc", "resize": "whole frame to 224 x 224"}}
    protocol = {"reference": {"all": "123"}, "samples": 100, "seed": 1, "size": [9, 32, 32], "metrics": {"frechet/dino": facts}}
    judged = {"name": "run euler 4 s=1", "subject": {"run": "run", "checkpoint": "x"}, "seconds_per_clip": 0.5, "figures": {"all": figures}}
    floor = {"name": "reference", "subject": None, "seconds_per_clip": None, "figures": {"all": figures}}
    return {"protocol": protocol, "rows": [judged, floor]}


def test_a_difference_has_an_interval_and_a_verdict() -> None:
    a = results(up=figure(1, 0.3), down=figure(1, 0.3), near=figure(1, 0.3), p=figure(0.5, None))
    b = results(up=figure(1.6, 0.4), down=figure(0.4, 0.4), near=figure(1.4, 0.4), p=figure(0.6, None))
    lines = {line.split(" | ")[3]: line for line in compare(a, b).splitlines()[2:]}
    assert len(lines) == 4  # the floor is no contestant
    assert lines["up"].endswith("+0.6 [+0.1, +1.1] | B is higher |")  # 0.5 = hypot(0.3, 0.4)
    assert lines["down"].endswith("-0.6 [-1.1, -0.1] | B is lower |")
    assert lines["near"].endswith("+0.4 [-0.1, +0.9] | no evidence |")
    assert lines["p"].endswith("+0.1 | no interval |")


def test_lopsided_intervals_face_each_other() -> None:
    a = results(rate={"value": 0.0, "low": 0.0, "high": 0.3, "count": 10})
    b = results(rate={"value": 0.4, "low": 0.0, "high": 0.5, "count": 10})
    assert "[-0.1, +0.5]" in compare(a, b)  # below: hypot(0.4, 0.3), above: hypot(0.1, 0)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("samples",), 200, "samples: 100 and 200"),
        (("seed",), 2, "seed: 1 and 2"),
        (("reference", "all"), "124", "reference.all: 123 and 124"),
        (("metrics", "frechet/dino", "features", "weights"), "abd", "metrics.frechet/dino.features.weights: abc and abd"),
        (("metrics", "frechet/dino", "features", "resize"), "crop", "features.resize: whole frame to 224 x 224 and crop"),
        (("size",), [1, 32, 32], "size: [9, 32, 32] and [1, 32, 32]"),
        (("metrics", "kernel"), {"subset": 9}, "metrics.kernel.subset: None and 9"),
    ],
)
def test_another_protocol_is_refused_by_field(path: tuple[str, ...], value: object, named: str) -> None:
    a = results(x=figure(1, 0.1))
    b = copy.deepcopy(a)
    place = b["protocol"]
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(UserError, match="different protocols") as error:
        compare(a, b)
    assert named in str(error.value)
    assert len(str(error.value).splitlines()) == 2


def test_other_numbers_of_contestants_are_refused() -> None:
    a = results(x=figure(1, 0.1))
    b = copy.deepcopy(a)
    b["rows"].insert(0, b["rows"][0])
    with pytest.raises(UserError, match="got 1 and 2 contestants"):
        compare(a, b)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for path, value in zip(paths, (1, 2), strict=True):
        Path(path).write_text(json.dumps(results(x=figure(value, 0.1))))
    assert main(paths) == 0
    assert "B is higher" in capsys.readouterr().out
    for broken in ("", "[]", "{}", "{"):
        Path(paths[1]).write_text(broken)
        assert main(paths) == 2
        assert capsys.readouterr().err.startswith(f"error: {paths[1]}: not a results.json")
    assert main(paths[:1]) == 2
    assert main([paths[0], str(tmp_path / "none.json")]) == 2


def test_the_table_shows_values_with_their_intervals() -> None:
    lines = table(results(x=figure(1.25, 0.5), p=figure(0.031, None))).splitlines()
    assert lines[0] == "| all | run euler 4 s=1 | reference |"
    assert lines[2:] == ["| x | 1.25 ±0.5 | 1.25 ±0.5 |", "| p | 0.031 | 0.031 |", "| s/clip | 0.500 |  |"]
