"""Paired comparison of validations: the change of each sample, its interval, and what may not be compared."""

import json

import pytest
import torch
from torch import Tensor

from dit.engine.held_out import HeldOut, compared, in_words, scalars
from dit.runtime.figures import mean_figure

TIMES = (0.3, 0.7)


def losses_of(seed: int = 0, count: int = 60) -> Tensor:
    """Losses whose spread between samples is far larger than any change."""
    return 1 + torch.rand(2, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def held_out(losses: Tensor, **changes: object) -> HeldOut:
    values = {"times": TIMES, "shapes": ["1x4x4", "3x4x4", "3x4x4"] * (losses.shape[1] // 3), "samples": "a", **changes}
    return HeldOut(losses, **values)  # type: ignore[arg-type]


def test_the_first_validation_has_means_and_no_change() -> None:
    losses = losses_of()
    record = compared(held_out(losses), None)
    assert list(record["cells"]) == ["all", *(name for t in ("t=0.3", "t=0.7") for name in (t, f"{t} 1x4x4", f"{t} 3x4x4"))]
    assert record["cells"]["all"]["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert record["cells"]["t=0.7 1x4x4"]["loss"] == pytest.approx(float(losses[1, ::3].mean()), rel=1e-5)
    figure = mean_figure(losses[0])
    assert record["cells"]["t=0.3"]["low"] == pytest.approx(figure.low, rel=1e-5)
    assert not any("change" in cell for cell in record["cells"].values())
    assert "first" in in_words(record["cells"]["all"])


@pytest.mark.parametrize(("shift", "verdict"), [(-0.01, "better"), (0.01, "worse"), (0.0, "no evidence")])
def test_small_changes_are_seen_through_the_spread_of_samples(shift: float, verdict: str) -> None:
    before, wobble = losses_of(), 0.02 * torch.randn(2, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    now = before + wobble - wobble.mean(1, keepdim=True) + shift
    first = compared(held_out(before), None)
    cell = compared(held_out(now), first)["cells"]["all"]
    assert cell["verdict"] == verdict
    assert cell["change"] == pytest.approx(shift, abs=1e-4)
    assert cell["change_low"] < cell["change"] < cell["change_high"]
    assert cell["high"] - cell["low"] > 10 * (cell["change_high"] - cell["change_low"])  # unpaired, nothing would be seen
    assert in_words(cell).startswith("no evidence of a change (" if verdict == "no evidence" else f"{verdict} than before (")


def test_a_change_at_one_level_and_shape_is_found_there() -> None:
    before = losses_of()
    now = before.clone()
    now[1, ::3] -= 0.1 + 0.01 * torch.rand(20, dtype=torch.float64)
    cells = compared(held_out(now), compared(held_out(before), None))["cells"]
    assert {name for name, cell in cells.items() if cell["verdict"] == "better"} == {"all", "t=0.7", "t=0.7 1x4x4"}
    assert cells["t=0.3"]["change"] == 0
    values = scalars(cells)
    assert {"loss", "loss_t/0.3", "loss_t/0.7/1x4x4", "change", "change_low_t/0.7/1x4x4"} <= values.keys()
    assert values["change_t/0.7/1x4x4"] == pytest.approx(-0.105, abs=0.005)


@pytest.mark.parametrize("changes", [{"samples": "b"}, {"times": (0.3, 0.6)}])
def test_other_samples_or_times_are_not_compared(changes: dict[str, object]) -> None:
    first = compared(held_out(losses_of()), None)
    assert not any("change" in cell for cell in compared(held_out(losses_of(), **changes), first)["cells"].values())


def test_one_shape_has_no_cells_of_its_own() -> None:
    record = compared(held_out(losses_of(), shapes=["3x4x4"] * 60), None)
    assert list(record["cells"]) == ["all", "t=0.3", "t=0.7"]


def test_a_comparison_is_the_same_from_the_file_as_from_memory() -> None:
    """Losses are rounded before they are used, so a resumed run writes what an uninterrupted one does."""
    first = compared(held_out(losses_of(1)), None)
    assert compared(held_out(losses_of(2)), json.loads(json.dumps(first))) == compared(held_out(losses_of(2)), first)
