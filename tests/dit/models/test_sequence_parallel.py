"""Ranks that compute packs together against ranks that compute one each, in four real processes."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Forks

WORKER = str(Path(__file__).with_name("sequence_worker.py"))
SUMS = 1e-6
"""Relative difference of losses and gradient norms: float32 sums in another order."""
WEIGHTS = 1e-5
"""Of weights after two steps of size 1e-3, for Adam's first steps magnify differences of the smallest gradients."""


def run(forks: Forks, folder: Path, scenario: str) -> dict[str, Any]:
    forks.run(WORKER, str(folder), scenario, ranks=4).ok()
    found = folder / "found.json"
    return json.loads(found.read_text()) if found.is_file() else {}


def test_answers_gradients_and_tangents_are_those_of_one_rank(forks: Forks, tmp_path: Path) -> None:
    run(forks, tmp_path, "backbone")


@pytest.mark.parametrize("scenario", ["training", pytest.param("training_everywhere", marks=pytest.mark.slow)])
def test_steps_are_those_of_one_rank_to_a_pack(forks: Forks, tmp_path: Path, scenario: str) -> None:
    found = run(forks, tmp_path, scenario)
    assert len(found) > 5
    for name, shape in found.items():
        reference = found[f"{name.split()[0]} 1 0"]
        steps = reference["steps"][-len(shape["steps"]) :]  # the last, where it began from a checkpoint
        assert list(chain(*shape["steps"])) == pytest.approx(list(chain(*steps)), rel=SUMS), name
        assert shape["weights"] == pytest.approx(reference["weights"], abs=WEIGHTS), name


@pytest.mark.slow
def test_copies_of_weights_within_groups_change_nothing(forks: Forks, tmp_path: Path) -> None:
    found = run(forks, tmp_path, "copies")
    reference = found["flow 1 0"]
    for name, shape in found.items():
        steps = reference["steps"][1:2] if name == "flow moved" else reference["steps"]
        assert list(chain(*shape["steps"])) == pytest.approx(list(chain(*steps)), rel=SUMS), name
        assert shape["weights"] == pytest.approx(reference["weights"], abs=WEIGHTS), name


def test_what_cannot_be_shared_is_refused(forks: Forks, tmp_path: Path) -> None:
    run(forks, tmp_path, "refused")
    processes, heads = json.loads((tmp_path / "refused.json").read_text())
    assert processes.startswith("world size % engine.sequence_parallel = 4 % 3 = 1, expected 0")
    assert heads.startswith("backbone.num_heads % engine.sequence_parallel = 2 % 4 = 2, expected 0")
