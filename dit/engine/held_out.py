"""Held-out losses, sample by sample, against those of the validation before. Knows nothing of what a loss is.

The same samples at the same noise are measured every time, so the change of each sample is compared with itself: what differs between
samples, which is most of the spread of a loss, cancels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit.runtime.figures import mean_figure


@dataclass(frozen=True)
class HeldOut:
    """losses: (levels, n) at each of `times`. shapes: of each sample, as text. samples: a hash that changes with the samples or noise."""

    losses: Tensor
    times: Sequence[float]
    shapes: Sequence[str]
    samples: str


def compared(now: HeldOut, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """The record of a validation, as JSON: `cells` by name ("all", "t=0.3", and for several shapes "t=0.3 3x4x4"), and what the next needs.

    Each cell has its mean loss and the mean change since `before`, an earlier record of the same samples and times, with 95 % intervals:
    `better` or `worse` where the interval of the change excludes zero, else `no evidence`.
    """
    losses = torch.tensor([[float(f"{loss:.6g}") for loss in level] for level in now.losses.tolist()], dtype=torch.float64)
    same = before is not None and (before["samples"], before["times"]) == (now.samples, list(now.times))
    changes = losses - torch.tensor(before["losses"], dtype=torch.float64) if same and before is not None else None
    cells: dict[str, dict[str, Any]] = {}
    for name, (levels, chosen) in _cells(now).items():
        figure = mean_figure(losses[levels][:, chosen].mean(0))
        cells[name] = {"loss": figure.value, "low": figure.low, "high": figure.high}
        if changes is not None:
            change = mean_figure(changes[levels][:, chosen].mean(0))
            cells[name] |= {"change": change.value, "change_low": change.low, "change_high": change.high}
            cells[name]["verdict"] = _verdict(change.low, change.high)
    return {"cells": cells, "samples": now.samples, "times": list(now.times), "losses": losses.tolist()}


def scalars(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The cells as points of curves: `loss`, `loss_t/0.3`, `loss_t/0.3/3x4x4`, and the same for `change`, `change_low`, `change_high`."""
    values = {}
    for name, cell in cells.items():
        place = "" if name == "all" else "_t/" + name.removeprefix("t=").replace(" ", "/")
        for figure in ("loss", "change", "change_low", "change_high"):
            if cell.get(figure) is not None:
                values[f"{figure}{place}"] = cell[figure]
    return values


def in_words(cell: Mapping[str, Any]) -> str:
    """What a cell says of the change since the validation before."""
    if "change" not in cell:
        return "the first of this run"
    change, low, high = (f"{cell[name]:+.2g}" if cell[name] is not None else "?" for name in ("change", "change_low", "change_high"))
    verdict = "no evidence of a change" if cell["verdict"] == "no evidence" else f"{cell['verdict']} than before"
    return f"{verdict} ({change}, 95 % interval {low} to {high})"


def _cells(held_out: HeldOut) -> dict[str, tuple[list[int], Tensor]]:
    """Rows of the losses and a mask (n,) for each cell."""
    kinds = sorted(set(held_out.shapes))
    everything = torch.ones(len(held_out.shapes), dtype=torch.bool)
    cells = {"all": (list(range(len(held_out.times))), everything)}
    for row, t in enumerate(held_out.times):
        cells[f"t={t:g}"] = ([row], everything)
        for kind in kinds if len(kinds) > 1 else ():
            cells[f"t={t:g} {kind}"] = ([row], torch.tensor([shape == kind for shape in held_out.shapes]))
    return cells


def _verdict(low: float | None, high: float | None) -> str:
    if low is None or high is None or low <= 0 <= high:
        return "no evidence"
    return "better" if high < 0 else "worse"
