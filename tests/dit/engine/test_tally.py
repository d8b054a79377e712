"""What a step says of itself beside its loss."""

import pytest
import torch
from torch import Tensor

from dit.engine.tally import Tally
from dit.runtime.losses import Losses


def losses(values: list[float], **figures: list[float]) -> Losses:
    tensors: dict[str, Tensor] = {name: torch.tensor(figure) for name, figure in figures.items()}
    return Losses(torch.tensor(values), torch.tensor([0.1, 0.9]), tensors)


def test_a_figure_is_the_mean_over_the_samples_that_have_it() -> None:
    nan, tally = float("nan"), Tally()
    tally.add(["a", "b"], losses([1.0, 2.0], gap=[4.0, nan], norm=[nan, nan]), 0.0)
    tally.add(["c", "d"], losses([3.0, 6.0], gap=[nan, 7.0], norm=[nan, nan]), 0.0)
    totals = tally.reduce(4, [], False)
    assert totals.figures == {"gap": 5.5}
    assert totals.loss == 3.0
    assert totals.bins == pytest.approx({"0.0-0.2": 2.0, "0.8-1.0": 4.0})
